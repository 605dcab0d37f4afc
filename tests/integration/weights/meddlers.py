"""Between a receiver and its server: one that cuts the wire at an exact byte, one that changes whole messages."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from broker.protocol import frames
from broker.protocol.frames import Message
from tests.integration.proxy import Proxy


@dataclass
class Cut:
    """Where to cut: so many bytes after the `count`th time that `marker` passes, from the server or to it."""

    marker: bytes
    from_server: bool = True
    count: int = 1
    after: int = 0


class Cutter(Proxy):
    """Before a server's port. `arm` says where it stops passing bytes on and calls `kill`."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self._lock = threading.Lock()
        self._cut: Cut | None = None
        self._kill: Callable[[], None] = lambda: None
        self._num_seen = 0
        self.fired = threading.Event()
        self.start()

    def arm(self, cut: Cut, kill: Callable[[], None]) -> None:
        """Cut there, once, from now on."""
        with self._lock:
            self._cut, self._kill, self._num_seen = cut, kill, 0
            self.fired.clear()

    def _pass(self, inside: socket.socket, outside: socket.socket) -> None:
        tails = {inside: b"", outside: b""}
        left: int | None = None  # bytes that may still pass on the way that is cut
        with inside, outside, contextlib.suppress(OSError):
            while True:
                for source in select.select([inside, outside], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    cut = self._cut
                    cuts = cut is not None and cut.from_server is (source is outside)
                    if cut is not None and cuts and left is None:
                        left = self._find(cut, tails[source], data)
                        tails[source] = (tails[source] + data)[-len(cut.marker) + 1 :]
                    if cuts and left is not None:
                        data, left = data[:left], left - len(data)
                    (outside if source is inside else inside).sendall(data)
                    if left is not None and left <= 0:
                        self._fire()
                        return

    def _find(self, cut: Cut, tail: bytes, data: bytes) -> int | None:
        """How many bytes of `data`, and of what follows it, are to pass; None where the place has not come yet."""
        joined, start = tail + data, 0
        while (place := joined.find(cut.marker, start)) >= 0:
            start = place + 1
            self._num_seen += 1
            if self._num_seen == cut.count:
                return max(place + len(cut.marker) - len(tail), 0) + cut.after
        return None

    def _fire(self) -> None:
        with self._lock:
            self._cut = None
        self._kill()
        self.fired.set()


Rule = Callable[[Message], Message | None]


class Meddler(threading.Thread):
    """A server to one receiver, which passes on what the real one says as `rule` makes it; None is kept back."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(daemon=True)
        self._context = zmq.Context()
        self._front, self._back = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        self.endpoint = f"tcp://127.0.0.1:{self._front.bind_to_random_port('tcp://127.0.0.1')}"
        self._back.connect(endpoint)
        self._ended = threading.Event()
        self.rule: Rule = lambda message: message
        self.start()

    def run(self) -> None:
        routing = b""
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._back, zmq.POLLIN)
        while not self._ended.is_set():
            ready = dict(poller.poll(20))
            if self._front in ready:
                routing, *parts = self._front.recv_multipart()
                self._back.send_multipart(parts)
            if self._back in ready:
                message = self.rule(frames.decode(self._back.recv_multipart()))
                if message is not None:
                    self._front.send_multipart([routing, *frames.encode(message)])
        self._context.destroy(linger=0)

    def close(self) -> None:
        """End the connections."""
        self._ended.set()
        self.join()
