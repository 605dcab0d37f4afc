"""pyzmq + fsync: the shortest durable queue one can write, which says what durability alone costs on a machine.

A process takes what its actors have sent, writes it to a log, waits for the disk once for all of it (group commit),
answers every actor and passes the frames on to the learner. It checks nothing, remembers nothing, reads nothing back,
and its log is one file that is written round and round, so that not even its size changes. No exchange that keeps its
word can be expected to be faster.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import zmq

from broker.protocol.codec import pack_trajectories
from broker.protocol.frames import encode
from tests.bench.exchange.load import MAX_ON_THE_WAY_BYTES, Job, make_trajectory

COPY_BELOW = 64 << 10
BATCH_BYTES = 64 << 20
LEARNER = b"learner"  # what the learner says, and is answered

Dealer = zmq.Socket[bytes]


class FloorActors:
    """One DEALER per actor; a trajectory a message, as with bare pyzmq."""

    def __init__(self) -> None:
        self.left = 0
        self._context: zmq.Context[Dealer] = zmq.Context()
        self._dealers: list[Dealer] = []
        self._index: dict[Dealer, int] = {}
        self._poller = zmq.Poller()

    def connect(self, job: Job) -> dict[str, float]:
        self.left, self._copy = 1 << 60, job.size < COPY_BELOW
        self._frames = encode(pack_trajectories([make_trajectory(job)]))
        for actor in range(job.actors):
            dealer = _connect(self._context, job.port)
            self._dealers.append(dealer)
            self._index[dealer] = actor
            self._poller.register(dealer, zmq.POLLIN)
        return {}

    def send(self, actor: int, num: int) -> int:
        for _ in range(num):
            self._dealers[actor].send_multipart(self._frames, copy=self._copy)
        return num

    def durable(self, timeout_s: float) -> Iterator[tuple[int, int]]:
        for dealer, _ in self._poller.poll(int(timeout_s * 1000)):
            yield self._index[dealer], int(dealer.recv())

    def close(self) -> None:
        for dealer in self._dealers:
            dealer.close()
        self._context.term()


class FloorLearner:
    """One DEALER."""

    def __init__(self) -> None:
        self._context: zmq.Context[Dealer] = zmq.Context()

    def prepare(self, job: Job) -> dict[str, float]:
        self._window = job.learner_window
        self._dealer = _connect(self._context, job.port)
        self._dealer.send(LEARNER)
        if not self._dealer.poll(60_000) or self._dealer.recv() != LEARNER:
            raise RuntimeError("the durable queue does not answer the learner")
        return {}

    def receive(self, timeout_s: float) -> int:
        if not self._dealer.poll(int(timeout_s * 1000)):
            return 0
        num = 0
        while num < self._window:
            try:
                self._dealer.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            num += 1
        return num

    def close(self) -> None:
        self._dealer.close()
        self._context.term()


def _connect(context: zmq.Context[Dealer], port: int) -> Dealer:
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.SNDHWM, 0)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    return dealer


class Log:
    """A file of fixed size, written round and round. It can hold all that the load has on the way."""

    def __init__(self, path: Path) -> None:
        self._descriptor, self._at = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), 0
        zeros = bytes(1 << 20)
        for start in range(0, MAX_ON_THE_WAY_BYTES, len(zeros)):
            os.pwrite(self._descriptor, zeros, start)
        os.fsync(self._descriptor)

    def write(self, frames: list[zmq.Frame]) -> None:
        """Write a message after the one before."""
        num_bytes = sum(map(len, frames))
        if self._at + num_bytes > MAX_ON_THE_WAY_BYTES:
            self._at = 0
        written = os.pwritev(self._descriptor, [frame.buffer for frame in frames], self._at)
        if written != num_bytes:
            raise OSError(f"{written} of {num_bytes} bytes were written")
        self._at += num_bytes

    def sync(self) -> None:
        """Wait for the disk."""
        os.fdatasync(self._descriptor)


def serve(port: int, path: Path) -> None:
    """The durable queue, until it is killed."""
    log, router = Log(path), zmq.Context().socket(zmq.ROUTER)
    router.setsockopt(zmq.SNDHWM, 0)
    router.bind(f"tcp://127.0.0.1:{port}")
    learner = b""
    while True:
        router.poll()
        arrived: list[list[zmq.Frame]] = []
        answers, num_bytes = Counter[bytes](), 0
        while num_bytes < BATCH_BYTES:
            try:
                sender, *frames = router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            if frames[0].bytes == LEARNER:
                learner = sender.bytes
                router.send_multipart([learner, LEARNER])
                continue
            log.write(frames)
            arrived.append(frames)
            answers[sender.bytes] += 1
            num_bytes += sum(map(len, frames))
        if arrived:
            log.sync()
        for routing, num in answers.items():
            router.send_multipart([routing, str(num).encode()])
        for frames in arrived:
            router.send_multipart([learner, *frames], copy=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    arguments = parser.parse_args()
    serve(arguments.port, arguments.log)
