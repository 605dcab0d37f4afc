"""Redis Streams' two sides, on redis-py's connections, packer and (hiredis) parser.

Used as somebody who knows Redis would: one connection per actor, a window of XADDs in one pipeline, packed once; the
learner acknowledges and deletes a batch and asks for the next one (XACK, XDEL, XREADGROUP) in a single round trip. An
XADD is answered after the fsync where `appendfsync` is `always`.
"""

from __future__ import annotations

import selectors
from collections.abc import Iterator
from typing import Any

from redis.connection import Connection

from broker.protocol.codec import pack_trajectories
from broker.protocol.frames import encode
from tests.bench.exchange.load import Job, make_trajectory

GROUP, CONSUMER = "learners", "learner"
JOIN_BELOW = 1 << 20  # a pipeline up to this size is one buffer and one system call


class RedisActors:
    """One connection per actor."""

    def __init__(self) -> None:
        self.left = 0
        self._selector = selectors.DefaultSelector()
        self._connections: list[Connection] = []

    def connect(self, job: Job) -> dict[str, float]:
        self.left, self._waiting = 1 << 60, [0] * job.actors  # Redis has no tickets
        _, envelope, *arrays = encode(pack_trajectories([make_trajectory(job)]))
        for actor in range(job.actors):
            connection = Connection(host="127.0.0.1", port=job.port)
            connection.connect()
            self._connections.append(connection)
            self._selector.register(connection._sock, selectors.EVENT_READ, actor)
        pack = self._connections[0].pack_command
        command = pack("XADD", job.name, "*", "envelope", envelope, "arrays", b"".join(arrays))
        one = [b"".join(command)] if job.size < JOIN_BELOW else command
        self._packed = {num: [b"".join(one * num)] if job.size < JOIN_BELOW else one * num for num in range(1, 9)}
        return {}

    def send(self, actor: int, num: int) -> int:
        num = min(num, self.left)
        if num:
            self._connections[actor].send_packed_command(self._packed[num])
            self._waiting[actor] = num
            self.left -= num
        return num

    def durable(self, timeout_s: float) -> Iterator[tuple[int, int]]:
        for key, _ in self._selector.select(timeout_s):
            actor, num = key.data, 0
            connection = self._connections[actor]
            while self._waiting[actor] and connection.can_read(0):
                connection.read_response()
                self._waiting[actor] -= 1
                num += 1
            if num:
                yield actor, num

    def close(self) -> None:
        self._selector.close()
        for connection in self._connections:
            connection.disconnect()


class RedisLearner:
    """One consumer of one group."""

    def prepare(self, job: Job) -> dict[str, float]:
        self._job, self._ids = job, list[bytes]()
        self._connection = Connection(host="127.0.0.1", port=job.port)
        self._connection.connect()
        self._ask(("XGROUP", "CREATE", job.name, GROUP, "0", "MKSTREAM"))
        return {}

    def _ask(self, *commands: tuple[Any, ...]) -> list[Any]:
        self._connection.send_packed_command(self._connection.pack_commands(commands))
        return [self._connection.read_response() for _ in commands]

    def receive(self, timeout_s: float) -> int:
        name, count = self._job.name, self._job.learner_window
        block_ms = max(1, int(timeout_s * 1000))
        read = ("XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", count, "BLOCK", block_ms, "STREAMS", name, ">")
        confirmed = 0
        if self._ids:
            acked, deleted, reply = self._ask(("XACK", name, GROUP, *self._ids), ("XDEL", name, *self._ids), read)
            if acked != len(self._ids) or deleted != acked:
                raise RuntimeError(f"{len(self._ids)} entries were taken, {acked} acknowledged, {deleted} deleted")
            confirmed = acked
        else:
            (reply,) = self._ask(read)
        entries = []
        if reply:  # RESP3 answers with a map, RESP2 with a list of pairs
            entries = next(iter(reply.values())) if isinstance(reply, dict) else reply[0][1]
        self._ids = [entry[0] for entry in entries]
        return confirmed

    def close(self) -> None:
        self._ask(("DEL", self._job.name))
        self._connection.disconnect()
