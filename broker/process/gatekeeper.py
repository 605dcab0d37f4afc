"""Who is let in: answers ZeroMQ's authentication requests (ZAP, RFC 27) for the server socket of one context.

Owns the allow-list of public keys, read again whenever its file changes, and the thread that asks it. A key that is not
listed, or whose identity has no business on this channel, gets nothing but the refusal of its handshake. What is let in
carries its identity on every message (`identity_of`). Knows no command.
"""

from __future__ import annotations

import logging
import socket as sockets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from broker.process.keys import PUBLIC_FILE, Identity, read_public
from broker.process.lifecycle import ErgonError
from broker.process.security import Security

log = logging.getLogger(__name__)

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
ZAP_VERSION: Final = b"1.0"
LOG_EVERY_S: Final = 1.0  # a flood of refusals is counted, not logged
_EVENTS: Final = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL

Refused = Callable[[str], None]
"""Called with the reason of each refused handshake: unknown_key, wrong_role, not_encrypted or broken_off."""


class AllowList:
    """The public keys of `directory` and whose they are. A file that turned bad leaves the last good list in force."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stamp = self._stat()
        self._owners: Mapping[str, Identity] = read_public(directory)

    def owner(self, key: str) -> Identity | None:
        """Whose public key (Z85) this is."""
        self._refresh()
        return self._owners.get(key)

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            status = (self._directory / PUBLIC_FILE).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size

    def _refresh(self) -> None:
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._owners = read_public(self._directory)
            log.info("Allow-list read again. directory=%s keys=%d", self._directory, len(self._owners))
        except ErgonError as error:
            log.error("The former allow-list stays in force. error=%s", error)


class Gatekeeper:
    """Guards the one server socket of a context, from its own thread; does nothing where `security` has no keys.

    Make it before the socket binds. `admitted`: the identities that have business on this channel.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        security: Security,
        admitted: frozenset[Identity],
        refused: Refused,
    ) -> None:
        self._admitted, self._refused = admitted, refused
        self.failure: Exception | None = None  # why the thread ended; nobody new is let in from then on
        self._thread: threading.Thread | None = None
        self._guarded: zmq.Socket[bytes] | None = None
        self._logged_at = float("-inf")
        if not security.curve:
            return
        self._allowed = AllowList(security.directory)
        self._requests = context.socket(zmq.REP)
        self._requests.setsockopt(zmq.LINGER, 0)
        self._requests.bind(ZAP_ENDPOINT)
        self._wake_in, self._wake_out = sockets.socketpair()
        self._thread = threading.Thread(target=self._run, name="gatekeeper", daemon=True)

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Begin, with this socket's failed handshakes counted too."""
        if self._thread is None:
            return
        self._guarded = socket
        self._monitor = socket.get_monitor_socket(_EVENTS)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Call it from the guarded socket's thread, before that socket is closed. Idempotent."""
        if self._thread is None:
            return
        if self._guarded is not None:
            self._wake_in.send(b"\0")
            self._thread.join()
            self._guarded.disable_monitor()
            self._monitor.close(linger=0)
        self._thread = None
        self._requests.close(linger=0)
        self._wake_in.close()
        self._wake_out.close()

    # --- the thread

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._requests, self._monitor, self._wake_out):
            poller.register(source, zmq.POLLIN)
        try:
            while self._wake_out.fileno() not in (ready := dict(poller.poll())):
                if self._requests in ready:
                    self._requests.send_multipart(self._answer(self._requests.recv_multipart()))
                if self._monitor in ready:
                    self._count(recv_monitor_message(self._monitor)["event"])
        except Exception as error:
            log.exception("The gatekeeper died; nobody new is let in.")
            self.failure = error

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """The ZAP reply to a request: version, request id, domain, address, identity, mechanism, credentials."""
        request_id, address = request[1], request[3].decode(errors="replace")
        owner, reason = judge(request, self._allowed.owner, self._admitted)
        if reason or owner is None:
            self._refuse(reason, f"address={address} owner={owner}")
            return [ZAP_VERSION, request_id, b"400", reason.encode(), b"", b""]
        return [ZAP_VERSION, request_id, b"200", b"OK", owner.value.encode(), b""]

    def _count(self, event: int) -> None:
        broken_off = event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL  # also by an honest peer that died just then
        self._refuse("broken_off" if broken_off else "not_encrypted", "no key was shown")

    def _refuse(self, reason: str, detail: str) -> None:
        self._refused(reason)
        now = time.monotonic()
        if now - self._logged_at >= LOG_EVERY_S and reason != "broken_off":
            self._logged_at = now
            log.warning("Handshake refused. reason=%s %s", reason, detail)


def judge(
    request: Sequence[bytes], owner_of: Callable[[str], Identity | None], admitted: frozenset[Identity]
) -> tuple[Identity | None, str]:
    """Whose key a ZAP request shows, and why it is refused ("" where it is let in)."""
    if len(request) != 7 or request[0] != ZAP_VERSION or request[5] != b"CURVE" or len(request[6]) != 32:
        return None, "unknown_key"
    owner = owner_of(z85.encode(request[6]).decode())
    if owner is None:
        return None, "unknown_key"
    return owner, "" if owner in admitted else "wrong_role"


def identity_of(frame: zmq.Frame) -> Identity | None:
    """Whose key the connection showed that this message came from; None on an open channel."""
    try:
        return Identity(str(frame.get("User-Id")))
    except (zmq.ZMQError, ValueError):
        return None
