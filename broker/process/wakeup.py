"""A wake-up for a thread that waits in a poll, given by another thread as often as it likes. Owns a pair of sockets."""

from __future__ import annotations

import contextlib
import socket


class Wakeup:
    """`fileno` is to be polled for reading: it is readable from `wake` until `drain`."""

    def __init__(self) -> None:
        self._in, self._out = socket.socketpair()
        for end in (self._in, self._out):
            end.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._out.fileno()

    def wake(self) -> None:
        """Wake whoever polls; from any thread, also after `close`."""
        # A full pipe means that a wake-up is pending already; a closed one that there is nobody to wake.
        with contextlib.suppress(BlockingIOError, OSError):
            self._in.send(b"\0")

    def drain(self) -> None:
        """Take back every wake-up there is."""
        with contextlib.suppress(BlockingIOError):
            while self._out.recv(4096):
                pass

    def close(self) -> None:
        """Close both ends."""
        self._in.close()
        self._out.close()
