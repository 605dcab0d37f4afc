"""What a broker costs that nobody sends to: connected idle actors, and tickets that ended long ago."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import zmq

from broker.protocol.frames import Message, encode
from tests.bench.exchange.ergon import expect, hello, open_dealer
from tests.bench.exchange.load import Job, Worker, run
from tests.bench.exchange.servers import ergon_settings, start_ergon

HEARTBEATS = 3  # of every idle actor, before the memory is read


class Idle(NamedTuple):
    """Connected actors without work."""

    num: int
    before_mib: float
    after_mib: float
    cores: float  # the broker's, while they send their heartbeats

    @property
    def mib_per_1000(self) -> float:
        """Memory that a thousand of them take."""
        return (self.after_mib - self.before_mib) / self.num * 1000


def idle_peers(directory: Path, num: int) -> Idle:
    """Connect `num` actors that wait for a ticket and send heartbeats."""
    server = start_ergon(directory)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, num + 16)
    dealers: list[zmq.Socket[bytes]] = []
    try:
        before_mib = server.memory_mib("VmRSS")
        server.reset_peak()
        beat = encode(Message("HEARTBEAT", {"leases": []}))
        for index in range(num):
            dealer = open_dealer(context, server.port)
            dealer.send_multipart(hello("actor", f"idle-{index:05d}"))
            dealers.append(dealer)
        for dealer in dealers:
            expect(dealer, "WELCOME")
            dealer.send_multipart(beat)
            dealer.send_multipart(encode(Message("LEASE", {"credit": 32})))
        cpu_s, started = server.cpu_s(), time.monotonic()
        for _ in range(HEARTBEATS):
            due = time.monotonic() + 1.0
            for dealer in dealers:
                dealer.send_multipart(beat)
                while dealer.poll(0):
                    dealer.recv_multipart()
            time.sleep(max(0.0, due - time.monotonic()))
        cores = (server.cpu_s() - cpu_s) / (time.monotonic() - started)
        known = _connected(server.port, context)
        if known != num:
            raise RuntimeError(f"{num} actors were connected, the broker knows {known}")
        return Idle(num, before_mib, server.memory_mib(), cores)
    finally:
        for dealer in dealers:
            dealer.close()
        context.term()
        server.stop()


def _connected(port: int, context: zmq.Context[zmq.Socket[bytes]]) -> int:
    operator = open_dealer(context, port)
    try:
        operator.send_multipart(hello("operator", "bench"))
        expect(operator, "WELCOME")
        operator.send_multipart(encode(Message("STATUS", {"request_id": "status"})))
        return int(expect(operator, "STATUS_REPLY")["peers"]["actor"])
    finally:
        operator.close()


class Done(NamedTuple):
    """A broker whose store holds tickets that have ended."""

    num: int
    start_s: float
    memory_mib: float
    per_s: float
    cpu_ms: float  # the broker's, per trajectory


def done_tickets(
    directory: Path, nums: tuple[int, int], job: Job, repeats: int, workers: tuple[Worker, Worker]
) -> list[Done]:
    """The same load on stores with few and with many ended tickets, alternating; the median of each."""
    runs: dict[int, list[Done]] = {num: [] for num in nums}
    for num in nums:
        _make_done(directory / str(num), num, job, workers)
    for repeat in range(repeats):
        for num in nums:
            runs[num].append(_measure(directory / str(num), num, replace(job, name=f"done{repeat}"), workers))
    return [sorted(runs[num], key=lambda done: done.cpu_ms)[repeats // 2] for num in nums]


def _make_done(directory: Path, num: int, job: Job, workers: tuple[Worker, Worker]) -> None:
    """A store with `num` acked tickets: some through the broker, the rest as copies of the last one's row."""
    settings = ergon_settings(directory)
    server = start_ergon(directory, settings)
    run("ergon", replace(job, name="seed", port=server.port), *workers)
    server.end()
    database = sqlite3.connect(settings.run_dir / "broker" / "journal.db")
    columns = [row[1] for row in database.execute("PRAGMA table_info(tickets)")]
    (have,) = database.execute("SELECT COUNT(*) FROM tickets").fetchone()
    values = ", ".join({"ticket_id": "'old-' || n", "seq": "-n", "end_seq": "n"}.get(name, name) for name in columns)
    database.execute(
        f"WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?) "
        f"INSERT INTO tickets ({', '.join(columns)}) SELECT {values} FROM numbers, "
        f"(SELECT * FROM tickets WHERE state = 'acked' ORDER BY seq DESC LIMIT 1)",
        (max(1, num - have),),
    )
    database.commit()
    database.close()


def _measure(directory: Path, num: int, job: Job, workers: tuple[Worker, Worker]) -> Done:
    started = time.monotonic()
    server = start_ergon(directory, ergon_settings(directory))
    start_s = time.monotonic() - started
    try:
        sent, received, cpu_s = run("ergon", replace(job, port=server.port), *workers, server.cpu_s)
        cpu_ms = 1000 * cpu_s / sent.num
        return Done(num, start_s, server.memory_mib(), sent.num / (received.ended - sent.started), cpu_ms)
    finally:
        server.end()
