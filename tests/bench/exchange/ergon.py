"""Ergon's two sides as thin clients: raw DEALERs that speak the exact protocol with the project's own frames and codec.

The real clients validate and keep state for reconnections, in Python, one thread each; 256 of them would measure
themselves. What is left out costs the broker nothing less: every byte that a real client sends is sent.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgpack
import zmq

from broker.protocol.codec import trajectory_to_message
from broker.protocol.frames import Frame, Message, encode
from tests.bench.exchange.load import RUN_ID, Job, make_ticket, make_trajectory, ticket_id

ISSUE_CHUNK = 1000
LEASE_CHUNK = 2000  # tickets asked for at once, over all actors' sockets
COPY_BELOW = 64 << 10  # smaller frames are cheaper copied than referenced


def hello(role: str, peer_id: str) -> list[Frame]:
    """The HELLO of a new process."""
    body = {"role": role, "peer_id": peer_id, "run_id": RUN_ID, "session": uuid.uuid4().hex}
    return encode(Message("HELLO", body))


def open_dealer(context: zmq.Context[zmq.Socket[bytes]], port: int) -> zmq.Socket[bytes]:
    """A DEALER connected to the broker."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.SNDHWM, 0)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    return dealer


def unpack(parts: list[Any]) -> tuple[str, dict[str, Any]]:
    """Command and body; an ERROR is the benchmark's end."""
    envelope = msgpack.unpackb(parts[1])
    if envelope["t"] == "ERROR":
        raise RuntimeError(f"the broker refused a message: {envelope['b']}")
    return envelope["t"], envelope["b"]


def expect(dealer: zmq.Socket[bytes], command: str) -> dict[str, Any]:
    """The body of the next message of this command."""
    while True:
        if not dealer.poll(60_000):
            raise TimeoutError(f"no {command} from the broker within 60 s")
        name, body = unpack(dealer.recv_multipart())
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
        self._in_loop, self._window = job.lease_in_loop, job.window
        frames = encode(trajectory_to_message(make_trajectory(job)))
        self._head, self._tail = bytes(frames[1]).split(ticket_id(job, 0).encode())
        self._preamble, self._arrays, self._copy = frames[0], frames[3:], job.size < COPY_BELOW
        self._token_ids, self._num_sent = bytes(frames[2])[4:], 0
        for actor in range(job.actors):
            dealer = open_dealer(self._context, job.port)
            dealer.send_multipart(hello("actor", f"actor-{actor:04d}"))
            self._dealers.append(dealer)
            self._index[dealer] = actor
            self._poller.register(dealer, zmq.POLLIN)
        for dealer in self._dealers:
            expect(dealer, "WELCOME")
            dealer.send_multipart(encode(Message("HEARTBEAT", {"leases": []})))
        self._ready: list[deque[str]] = [deque() for _ in self._dealers]
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
        self._dealers[actor].send_multipart(encode(Message("LEASE", {"credit": self._credit[actor]})))

    def send(self, actor: int, num: int) -> int:
        dealer, ready = self._dealers[actor], self._ready[actor]
        num = min(num, len(ready))
        for _ in range(num):
            envelope = self._head + ready.popleft().encode() + self._tail
            self._num_sent += 1  # the first token: no two trajectories are equal, as the store would notice
            token_ids = self._num_sent.to_bytes(4, "little") + self._token_ids
            dealer.send_multipart([self._preamble, envelope, token_ids, *self._arrays], copy=self._copy)
        self.left -= num
        return num

    def durable(self, timeout_s: float) -> Iterator[tuple[int, int]]:
        for dealer, _ in self._poller.poll(int(timeout_s * 1000)):
            actor, num = self._index[dealer], 0
            while True:
                try:
                    command, body = unpack(dealer.recv_multipart(zmq.NOBLOCK))
                except zmq.Again:
                    break
                if command == "DURABLE":
                    if body["status"] != "accepted":
                        raise RuntimeError(f"the broker answered {body}")
                    num += 1
                elif command == "TICKET":
                    self._ready[actor].append(body["ticket"]["ticket_id"])
                    self.left += not self._in_loop
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
        self._received = self._credit = self._num_asked = 0
        self._asked: dict[str, int] = {}
        started = time.monotonic()
        while True:  # the learner of the run before may be on its way out
            self._dealer = open_dealer(self._context, job.port)
            self._dealer.send_multipart(hello("learner", f"learner-{os.getpid()}"))
            try:
                expect(self._dealer, "WELCOME")
                break
            except RuntimeError:
                self._dealer.close()
                if time.monotonic() - started > 30:
                    raise
                time.sleep(0.05)
        self._send("RESUME", request_id="resume", acked=[], held=[])
        expect(self._dealer, "RESUMED")
        template = make_ticket(job, 0).model_dump(mode="json")
        tickets = []
        for index in range(job.tickets):
            ticket = make_ticket(job, index)
            task = template["task"] | {"index": index}
            tickets.append(template | {"ticket_id": ticket.ticket_id, "group_id": ticket.group_id, "task": task})
        started = time.monotonic()
        for start in range(0, job.tickets, ISSUE_CHUNK):
            self._send("ISSUE", request_id=f"issue-{start}", tickets=tickets[start : start + ISSUE_CHUNK])
            expect(self._dealer, "ISSUED")
        return {"issue_s": time.monotonic() - started, "issued": job.tickets}

    def _send(self, command: str, **body: Any) -> None:
        self._dealer.send_multipart(encode(Message(command, body)))

    def receive(self, timeout_s: float) -> int:
        if self._received + self._window - self._credit >= max(1, self._window // 4):
            self._credit = self._received + self._window
            self._send("CREDIT", credit=self._credit)
        if not self._dealer.poll(int(timeout_s * 1000)):
            return 0
        ids, confirmed = [], 0
        while len(ids) < self._window:
            try:
                parts = self._dealer.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            command, body = unpack([None, parts[1].buffer])
            if command == "DELIVER":
                ids.append(body["head"]["ticket"]["ticket_id"])
            elif command == "ACKED":
                num = self._asked.pop(body["request_id"])
                if body["count"] != num:
                    raise RuntimeError(f"{body['count']} of {num} trajectories were newly acked")
                confirmed += num
        if ids:
            self._received += len(ids)
            self._num_asked += 1
            self._asked[f"ack-{self._num_asked}"] = len(ids)
            self._send("ACK", request_id=f"ack-{self._num_asked}", ticket_ids=ids)
        return confirmed

    def close(self) -> None:
        self._send("CANCEL", request_id="cancel")
        expect(self._dealer, "CANCELLED")
        self._dealer.close()
        self._context.term()
