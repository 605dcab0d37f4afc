"""What a broker costs that nobody sends to: connected idle actors, and tickets that ended long ago."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq

from broker.ledger.events import EndedRow, JournalEnds, JournalTickets
from broker.protocol.commands import Heartbeat, Lease, Role, Status, StatusReply, TicketState
from broker.protocol.frames import encode
from broker.store.journal import Journal
from tests.bench.exchange.ergon import expect, hello, open_dealer
from tests.bench.exchange.load import Job, Worker, make_ticket, run
from tests.bench.exchange.servers import ergon_settings, start_ergon

HEARTBEATS = 3  # of every idle actor, before the memory is read
ROWS = 10_000  # tickets written in one commit


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
        beat, lease = encode(Heartbeat().pack()), encode(Lease(credit=32).pack())
        for index in range(num):
            dealer = open_dealer(context, server.port)
            dealer.send_multipart(hello(Role.ACTOR, f"idle-{index:05d}"))
            dealers.append(dealer)
        for dealer in dealers:
            expect(dealer, "WELCOME")
            dealer.send_multipart(beat)
            dealer.send_multipart(lease)
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
        operator.send_multipart(hello(Role.OPERATOR, "bench"))
        expect(operator, "WELCOME")
        operator.send_multipart(encode(Status(request_id="status").pack()))
        reply = msgspec.msgpack.decode(expect(operator, "STATUS_REPLY"), type=StatusReply)
        return reply.peers[Role.ACTOR]
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
        _make_done(directory / str(num), num, job)
    for repeat in range(repeats):
        for num in nums:
            runs[num].append(_measure(directory / str(num), num, replace(job, name=f"done{repeat}"), workers))
    return [sorted(runs[num], key=lambda done: done.cpu_ms)[repeats // 2] for num in nums]


def _make_done(directory: Path, num: int, job: Job) -> None:
    """A store with `num` acked tickets, as the broker's own journal writes them."""
    settings = ergon_settings(directory)
    journal = Journal(settings.run_dir / "broker", settings.run.name, "interval")
    old = replace(job, name="old")
    for start in range(0, num, ROWS):
        tickets = [(index + 1, make_ticket(old, index)) for index in range(start, min(num, start + ROWS))]
        journal.apply(JournalTickets(tuple(tickets)))
        ends = (EndedRow(seq, ticket.ticket_id, ticket.mode, TicketState.ACKED) for seq, ticket in tickets)
        journal.apply(JournalEnds(tuple(ends)))
        journal.commit()
    journal.sync()
    journal.close()


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
