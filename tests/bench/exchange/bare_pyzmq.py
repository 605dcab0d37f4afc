"""Bare pyzmq PUSH/PULL: actors push straight into the learner's socket. No server, no durability, no acknowledgement.

The upper bound of what any exchange on the same transport can move: the bytes cross loopback once, not twice. "Durable"
means here that ZeroMQ has taken the message; its latency says nothing and is not reported.
"""

from __future__ import annotations

from collections.abc import Iterator

import zmq

from broker.protocol.codec import pack_trajectories
from broker.protocol.frames import encode
from tests.bench.exchange.load import Job, make_trajectory

COPY_BELOW = 64 << 10


class PyzmqActors:
    """One PUSH socket per actor."""

    def __init__(self) -> None:
        self.left = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._pending: dict[int, int] = {}

    def connect(self, job: Job) -> dict[str, float]:
        self.left, self._copy = 1 << 60, job.size < COPY_BELOW
        self._frames = encode(pack_trajectories([make_trajectory(job)]))
        for _ in range(job.actors):
            push = self._context.socket(zmq.PUSH)
            push.setsockopt(zmq.SNDHWM, job.window)
            push.connect(f"tcp://127.0.0.1:{job.port}")
            self._sockets.append(push)
        return {}

    def send(self, actor: int, num: int) -> int:
        self._pending[actor] = num
        return num

    def durable(self, timeout_s: float) -> Iterator[tuple[int, int]]:
        progress = False
        for actor in list(self._pending):
            if num := self._push(actor):
                progress = True
                yield actor, num
        if not progress and self._pending:
            poller = zmq.Poller()
            for actor in self._pending:
                poller.register(self._sockets[actor], zmq.POLLOUT)
            poller.poll(int(timeout_s * 1000))

    def _push(self, actor: int) -> int:
        num = 0
        while num < self._pending[actor]:
            try:
                self._sockets[actor].send_multipart(self._frames, zmq.NOBLOCK, copy=self._copy)
            except zmq.Again:
                break
            num += 1
        self._pending[actor] -= num
        if not self._pending[actor]:
            del self._pending[actor]
        return num

    def close(self) -> None:
        for push in self._sockets:
            push.close(linger=0)
        self._context.term()


class PyzmqLearner:
    """One PULL socket."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def prepare(self, job: Job) -> dict[str, float]:
        self._window = job.learner_window
        self._pull = self._context.socket(zmq.PULL)
        self._pull.setsockopt(zmq.RCVHWM, job.window)
        self._pull.bind(f"tcp://127.0.0.1:{job.port}")
        return {}

    def receive(self, timeout_s: float) -> int:
        if not self._pull.poll(int(timeout_s * 1000)):
            return 0
        num = 0
        while num < self._window:
            try:
                self._pull.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            num += 1
        return num

    def close(self) -> None:
        self._pull.close(linger=0)
        self._context.term()
