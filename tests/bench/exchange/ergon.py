"""Ergon's two sides as thin clients: raw DEALERs that speak the exact protocol, with parcels prebuilt as Redis'
pipelines are (tests/bench/exchange/parcel.py).

The real clients validate and keep state for reconnections, in Python, one thread each; 256 of them would measure
themselves. What a real client sends these send, byte for byte, but for two things: their heartbeats name no lease,
because leases outlast every run, and what is above 1 MiB is sent without an OFFER, because the load itself bounds what
is on the way. Of what they hear, actors read the tickets, which stay packed, and the statuses of a DURABLE; the learner
reads the ids of a DELIVER and leaves everything else of it unread, the arrays included.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec
import zmq

from broker.process.keys import Identity, read_pair
from broker.process.security import OPEN, Security
from broker.protocol.commands import (
    Ack,
    Body,
    Cancel,
    Credit,
    ErrorBody,
    Heartbeat,
    Hello,
    Issue,
    Lease,
    Resume,
    Role,
)
from broker.protocol.frames import Frame, encode
from tests.bench.exchange.load import RUN_ID, Job, make_ticket
from tests.bench.exchange.parcel import Parcels

WINDOW_BYTES = 512 << 20  # of arrays that may wait for the learner, as in the real client
ISSUE_CHUNK = 1000
LEASE_CHUNK = 2000  # tickets asked for at once, over all actors' sockets


class _Envelope(msgspec.Struct):
    t: str
    b: msgspec.Raw


class _Tickets(msgspec.Struct):
    tickets: tuple[msgspec.Raw, ...]


class _Results(msgspec.Struct):
    results: tuple[tuple[msgspec.Raw, str], ...]


class _Ticket(msgspec.Struct):
    ticket_id: str


class _Head(msgspec.Struct):
    ticket: _Ticket


class _Item(msgspec.Struct):
    head: _Head


class _Items(msgspec.Struct):
    items: tuple[_Item, ...]


class _Counted(msgspec.Struct):
    request_id: str
    count: int


_read_envelope = msgspec.msgpack.Decoder(_Envelope).decode
_read_tickets = msgspec.msgpack.Decoder(_Tickets).decode
_read_results = msgspec.msgpack.Decoder(_Results).decode
_read_items = msgspec.msgpack.Decoder(_Items).decode
_read_counted = msgspec.msgpack.Decoder(_Counted).decode


def hello(role: Role, peer_id: str) -> list[Frame]:
    """The HELLO of a new process."""
    return encode(Hello(role=role, peer_id=peer_id, run_id=RUN_ID, session=uuid.uuid4().hex).pack())


def client_security(job: Job, identity: Identity) -> Security:
    """What a peer of this identity shows, and expects of the broker: nothing, unless the job names keys."""
    return OPEN if job.keys is None else Security(identity, read_pair(job.keys, identity), job.keys)


def open_dealer(context: zmq.Context[zmq.Socket[bytes]], port: int, security: Security = OPEN) -> zmq.Socket[bytes]:
    """A DEALER connected to the broker."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.SNDHWM, 0)
    security.protect_client(dealer, Identity.BROKER)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    return dealer


def unpack(envelope: Any) -> tuple[str, msgspec.Raw]:
    """Command and packed body; an ERROR is the benchmark's end."""
    read = _read_envelope(envelope)
    if read.t == ErrorBody.COMMAND:
        raise RuntimeError(f"the broker refused a message: {msgspec.msgpack.decode(read.b)}")
    return read.t, read.b


def expect(dealer: zmq.Socket[bytes], command: str) -> msgspec.Raw:
    """The packed body of the next message of this command."""
    while True:
        if not dealer.poll(60_000):
            raise TimeoutError(f"no {command} from the broker within 60 s")
        name, body = unpack(dealer.recv_multipart()[1])
        if name == command:
            return body


class ErgonActors:
    """One DEALER per actor. Tickets are leased before the clock starts, or with `lease_in_loop` while it runs."""

    def __init__(self) -> None:
        self.left = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._dealers: list[zmq.Socket[bytes]] = []
        self._poller = zmq.Poller()
        self._index: dict[zmq.Socket[bytes], int] = {}

    def connect(self, job: Job) -> dict[str, float]:
        self._in_loop, self._parcels = job.lease_in_loop, Parcels(job)
        security = client_security(job, Identity.ACTOR)
        for actor in range(job.actors):
            dealer = open_dealer(self._context, job.port, security)
            dealer.send_multipart(hello(Role.ACTOR, f"actor-{actor:04d}"))
            self._dealers.append(dealer)
            self._index[dealer] = actor
            self._poller.register(dealer, zmq.POLLIN)
        for dealer in self._dealers:
            expect(dealer, "WELCOME")
            dealer.send_multipart(encode(Heartbeat().pack()))
        self._ready: list[deque[msgspec.Raw]] = [deque() for _ in self._dealers]
        self._credit = [0] * job.actors
        self.left = job.tickets if self._in_loop else 0
        if self._in_loop:
            for actor in range(job.actors):
                self._lease(actor, job.window)
            return {}
        started = time.monotonic()
        share = job.tickets // job.actors
        for start in range(0, share, step := max(1, LEASE_CHUNK // job.actors)):
            for actor in range(job.actors):
                self._lease(actor, min(step, share - start))
            while self.left < self._credit[0] * job.actors:
                for _ in self.durable(60.0):
                    raise AssertionError("a result before the first send")
        return {"lease_s": time.monotonic() - started, "leased": self.left}

    def _lease(self, actor: int, num: int) -> None:
        self._credit[actor] += num
        self._dealers[actor].send_multipart(encode(Lease(credit=self._credit[actor]).pack()))

    def send(self, actor: int, num: int) -> int:
        ready = self._ready[actor]
        num = min(num, len(ready))
        tickets = [ready.popleft() for _ in range(num)]
        self._parcels.take_back(actor)
        for frames, copy in self._parcels.make(actor, tickets):
            self._dealers[actor].send_multipart(frames, copy=copy)
        self.left -= num
        return num

    def durable(self, timeout_s: float) -> Iterator[tuple[int, int]]:
        for dealer, _ in self._poller.poll(int(timeout_s * 1000)):
            actor, num = self._index[dealer], 0
            while True:
                try:
                    command, body = unpack(dealer.recv_multipart(zmq.NOBLOCK)[1])
                except zmq.Again:
                    break
                if command == "DURABLE":
                    results = _read_results(body).results
                    if wrong := {status for _, status in results} - {"accepted"}:
                        raise RuntimeError(f"the broker answered {sorted(wrong)} to an actor's first results")
                    num += len(results)
                elif command == "TICKET":
                    tickets = _read_tickets(body).tickets
                    self._ready[actor] += tickets
                    self.left += 0 if self._in_loop else len(tickets)
            if num:
                if self._in_loop:
                    self._lease(actor, num)
                yield actor, num

    def close(self) -> None:
        for dealer in self._dealers:
            dealer.close()
        self._context.term()


class ErgonLearner:
    """One DEALER: issues the run's tickets, then takes deliveries under credit and acks each batch that it took."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def prepare(self, job: Job) -> dict[str, float]:
        self._window = job.learner_window
        self._received = self._credit = self._num_asked = self._received_bytes = 0
        self._asked: dict[str, int] = {}
        security = client_security(job, Identity.LEARNER)
        started = time.monotonic()
        while True:  # the learner of the run before may be on its way out
            self._dealer = open_dealer(self._context, job.port, security)
            self._dealer.send_multipart(hello(Role.LEARNER, f"learner-{os.getpid()}"))
            try:
                expect(self._dealer, "WELCOME")
                break
            except RuntimeError:
                self._dealer.close()
                if time.monotonic() - started > 30:
                    raise
                time.sleep(0.05)
        self._send(Resume(request_id="resume"))
        expect(self._dealer, "RESUMED")
        tickets = tuple(make_ticket(job, index) for index in range(job.tickets))
        started = time.monotonic()
        for start in range(0, job.tickets, ISSUE_CHUNK):
            self._send(Issue(request_id=f"issue-{start}", tickets=tickets[start : start + ISSUE_CHUNK]))
            expect(self._dealer, "ISSUED")
        return {"issue_s": time.monotonic() - started, "issued": job.tickets}

    def _send(self, body: Body) -> None:
        self._dealer.send_multipart(encode(body.pack()))

    def receive(self, timeout_s: float) -> int:
        if self._received + self._window - self._credit >= max(1, self._window // 4):
            self._credit = self._received + self._window
            self._send(Credit(credit=self._credit, credit_bytes=self._received_bytes + WINDOW_BYTES))
        if not self._dealer.poll(int(timeout_s * 1000)):
            return 0
        ids: list[str] = []
        confirmed = 0
        while len(ids) < self._window:
            try:
                parts = self._dealer.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            command, body = unpack(parts[1].buffer)
            if command == "DELIVER":
                self._received_bytes += sum(map(len, parts[2:]))
                ids += [item.head.ticket.ticket_id for item in _read_items(body).items]
            elif command == "ACKED":
                acked = _read_counted(body)
                num = self._asked.pop(acked.request_id)
                if acked.count != num:
                    raise RuntimeError(f"{acked.count} of {num} trajectories were newly acked")
                confirmed += num
        if ids:
            self._received += len(ids)
            self._num_asked += 1
            self._asked[f"ack-{self._num_asked}"] = len(ids)
            self._send(Ack(request_id=f"ack-{self._num_asked}", ticket_ids=tuple(ids)))
        return confirmed

    def close(self) -> None:
        self._send(Cancel(request_id="cancel"))
        expect(self._dealer, "CANCELLED")
        self._dealer.close()
        self._context.term()
