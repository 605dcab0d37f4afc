"""Simulated actors, hundreds in one process: what an actor says on both channels, without engines and threads.

Leases, heartbeats that name every lease, parcels and offers are the real client's, byte for byte; an episode is a time
that passes and a trajectory of as many tokens as the script says. Functions take a worker's state.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import zmq

from broker.client.parcels import Parcels
from broker.process.lifecycle import raise_file_limit
from broker.protocol.commands import (
    Clear,
    Durable,
    ErrorBody,
    Heartbeat,
    Lease,
    Role,
    TicketBody,
    Welcome,
    parse_body,
)
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message, decode, encode
from broker.protocol.trajectory import (
    Outcome,
    PolicyVersion,
    Segment,
    Ticket,
    Trajectory,
    TrajectoryHead,
    VersionRun,
)
from tests.bench.exchange.ergon import expect, hello, open_dealer
from tests.bench.scaling.profile import PROFILES, Episode, Script
from tests.bench.scaling.receiver import Receiver
from tests.bench.weightchannel.workers import State

BEAT_S = 1.0  # as broker.heartbeat_s and weights.heartbeat_s
POLL_S = 0.005
PAUSE_S = 8e-6  # between two looks at the sockets, for each actor: looking at idle ones must not cost more than they do
FILL_S = 240.0  # for all actors to have their first tickets


class Sent(NamedTuple):
    """What a fleet saw of a window; of versions, beyond it."""

    num_finished: int
    durable_s: list[float]  # from the send until the broker's answer, of those that were answered
    cpu_s: float  # of the process
    late_s: float  # how far behind its script the process itself was, at worst
    num_idle: float  # episodes that waited for a ticket, mean
    arrived: dict[int, list[float]]  # by version, when each actor had verified it
    num_pulled: int  # versions that were not pushed, and had to be asked for
    num_lost: int  # times that a server knew an actor no more
    num_not_taken: int  # results that were late, or another actor's already, because a lease had run out


class Actor:
    """One of them. It says HELLO again where the broker knows it no more, and hands in what is unanswered."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], port: int, relay: int, name: str, have: PolicyVersion):
        self.name = name
        self.num_lost = self.num_not_taken = 0
        self._hello, self._lost = hello(Role.ACTOR, name), False
        self.dealer = open_dealer(context, port)
        self.dealer.send_multipart(self._hello)
        self.weights = Receiver(context, relay, name, have)
        self.held: dict[str, Ticket] = {}  # leased and not durable
        self.sent_at: dict[str, float] = {}
        self.ready: deque[Ticket] = deque()
        self._parcels = Parcels()
        self._credit = self._received = 0  # since HELLO

    def send(self, message: Message) -> None:
        """Say something to the broker."""
        self.dealer.send_multipart(encode(message), copy=message.array_bytes < 1 << 16)

    def lease(self, num: int) -> None:
        """Ask for so many more tickets."""
        self._credit += num
        self.send(Lease(credit=self._credit).pack())

    def beat(self) -> None:
        """A sign of life on both channels."""
        if not self._lost:
            self.send(Heartbeat(leases=tuple(self.held)).pack())
        self.weights.beat()

    def hand_in(self, trajectories: Iterable[Trajectory], now: float) -> None:
        """Send these, together as far as they fit."""
        for trajectory in trajectories:
            self.sent_at[trajectory.ticket.ticket_id] = now
            self._parcels.add(trajectory)
        for message in self._parcels.take():
            self.send(message)

    def receive(self) -> list[str]:
        """Take everything that has come from the broker; tickets that are durable now."""
        durable: list[str] = []
        while True:
            try:
                frames = self.dealer.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return durable
            message = decode([frame.buffer for frame in frames])
            if message.command == TicketBody.COMMAND:
                self._take(parse_body(message, TicketBody).tickets)
            elif message.command == Durable.COMMAND:
                durable += self._answered(parse_body(message, Durable))
            elif message.command == Clear.COMMAND:
                self.send(self._parcels.cleared(parse_body(message, Clear).ticket_id))
            elif message.command == Welcome.COMMAND:
                self._welcomed_again()
            elif message.command == ErrorBody.COMMAND:
                self._on_error(parse_body(message, ErrorBody))

    def _take(self, tickets: Sequence[Ticket]) -> None:
        new = [ticket for ticket in tickets if ticket.ticket_id not in self.held]
        self._received += len(tickets)
        self.held.update((ticket.ticket_id, ticket) for ticket in new)
        self.ready += new
        if len(new) < len(tickets):  # it is being run here still, though its lease had run out
            self.lease(len(tickets) - len(new))

    def _answered(self, body: Durable) -> list[str]:
        self.num_not_taken += sum(status != "accepted" for _, status in body.results)
        durable = [ticket_id for ticket_id, _ in body.results if ticket_id in self.held]
        self._parcels.answered(durable)
        for message in self._parcels.take():
            self.send(message)
        return durable

    def _on_error(self, error: ErrorBody) -> None:
        if error.known_code != ErrorCode.UNKNOWN_PEER:
            raise ProtocolError(error.known_code, error.message)
        if not self._lost:  # what was on its way meanwhile is refused as well, once each
            self._lost = True
            self.num_lost += 1
            self.dealer.send_multipart(self._hello)

    def _welcomed_again(self) -> None:
        self._lost = False
        wanted = self._credit - self._received
        self._credit = self._received = 0
        self.send(Heartbeat(leases=tuple(self.held)).pack())
        for message in self._parcels.again():
            self.send(message)
        if wanted > 0:
            self.lease(wanted)


class Fleet:
    """All actors of a process, and the episodes they run."""

    def __init__(self, script: Script, port: int, relay: int, names: Iterable[str], have: PolicyVersion) -> None:
        raise_file_limit()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 8192)
        self._script, self._fresh = script, script.fresh()
        self._actors = [Actor(self._context, port, relay, name, have) for name in names]
        # (due, actor, ticket, what, the version it began with), a heap
        self._running: list[tuple[float, int, str, Episode, PolicyVersion]] = []
        self._filled = False
        self._idle = [0] * len(self._actors)  # episodes that wait for a ticket
        self._poller = zmq.Poller()
        self._actor_of: dict[Any, int] = {}
        self._receiver_of: dict[Any, int] = {}
        most = script.profile.most_sampled
        num_tokens = most + round(most * script.profile.context) + 1
        self._token_ids_T = np.random.default_rng(0).integers(0, 49_152, num_tokens, dtype=np.int32)
        self._logprobs_T = -np.random.default_rng(1).exponential(0.7, num_tokens).astype(np.float32)
        self._next_beats = deque[tuple[float, int]]()
        for number, actor in enumerate(self._actors):
            expect(actor.dealer, "WELCOME")
            for socket, of in ((actor.dealer, self._actor_of), (actor.weights.dealer, self._receiver_of)):
                of[socket] = number
                self._poller.register(socket, zmq.POLLIN)

    def fill(self) -> None:
        """Lease a window of tickets for each actor, whose episodes are met at any moment of their time."""
        now, running = time.monotonic(), self._script.running()
        for number, actor in enumerate(self._actors):
            actor.beat()
            self._next_beats.append((now + BEAT_S * (1 + number / len(self._actors)), number))
            actor.lease(self._script.episodes)
            self._idle[number] = self._script.episodes
        deadline = now + FILL_S
        waiting = set(range(len(self._actors)))
        while waiting:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(waiting)} actors did not get their tickets within {FILL_S:g} s")
            self._beat()
            self._poll()
            waiting = {n for n in waiting if len(self._actors[n].ready) < self._idle[n] or not self._welcomed(n)}
        begin = time.monotonic()
        self._filled = True
        for number, actor in enumerate(self._actors):
            self._idle[number] = 0
            while actor.ready:
                self._begin(number, actor.ready.popleft(), next(running), begin)

    def run(self, starts: float, ends: float) -> Sent:
        """Run until `ends`; what is told is of the time from `starts` on."""
        num_finished, late_s, idle, looks, cpu_s = 0, 0.0, 0, 0, 0.0
        durable_s: list[float] = []
        measuring = False
        while (now := time.monotonic()) < ends:
            if not measuring and now >= starts:
                measuring, cpu_s = True, time.process_time()
            if measuring and self._running:
                late_s = max(late_s, now - self._running[0][0])
            finished = self._finish(now)
            self._beat()
            time.sleep(max(0.0, now + PAUSE_S * len(self._actors) - time.monotonic()))
            took = self._poll()
            if measuring:
                num_finished += finished
                durable_s += took
                idle, looks = idle + sum(self._idle), looks + 1
        arrived: dict[int, list[float]] = {}
        for actor in self._actors:
            for version, at in actor.weights.arrived.items():
                arrived.setdefault(version.version, []).append(at)
        return Sent(
            num_finished,
            durable_s,
            time.process_time() - cpu_s,
            late_s,
            idle / max(1, looks),
            arrived,
            sum(actor.weights.num_pulled for actor in self._actors),
            sum(actor.num_lost + actor.weights.num_lost for actor in self._actors),
            sum(actor.num_not_taken for actor in self._actors),
        )

    def close(self) -> None:
        """Let go of everything."""
        for actor in self._actors:
            actor.dealer.close()
            actor.weights.dealer.close()
        self._context.term()

    def _welcomed(self, number: int) -> bool:
        return self._actors[number].weights.welcomed

    def _begin(self, number: int, ticket: Ticket, episode: Episode, now: float) -> None:
        have = self._actors[number].weights.have
        heapq.heappush(self._running, (now + episode.seconds, number, ticket.ticket_id, episode, have))

    def _finish(self, now: float) -> int:
        """Hand in what is due; how many that were."""
        due: dict[int, list[Trajectory]] = {}
        num = 0
        while self._running and self._running[0][0] <= now:
            _, number, ticket_id, episode, version = heapq.heappop(self._running)
            due.setdefault(number, []).append(self._trajectory(self._actors[number], ticket_id, episode, version))
            num += 1
        for number, trajectories in due.items():
            self._actors[number].hand_in(trajectories, time.monotonic())
        return num

    def _beat(self) -> None:
        now = time.monotonic()
        while self._next_beats[0][0] <= now:
            due, number = self._next_beats.popleft()
            self._actors[number].beat()
            self._next_beats.append((max(due + BEAT_S, now), number))

    def _poll(self) -> list[float]:
        """Take what has come; how long those trajectories took that are durable now, seconds."""
        took: list[float] = []
        for socket, _ in self._poller.poll(int(POLL_S * 1000)):
            if (number := self._receiver_of.get(socket)) is not None:
                self._actors[number].weights.receive()
                continue
            number = self._actor_of[socket]
            actor = self._actors[number]
            durable, now = actor.receive(), time.monotonic()
            for ticket_id in durable:
                took.append(now - actor.sent_at.pop(ticket_id))
                del actor.held[ticket_id]
            if durable:
                actor.lease(len(durable))
                self._idle[number] += len(durable)
            if self._filled:
                while self._idle[number] and actor.ready:
                    self._idle[number] -= 1
                    self._begin(number, actor.ready.popleft(), next(self._fresh), now)
        return took

    def _trajectory(self, actor: Actor, ticket_id: str, episode: Episode, version: PolicyVersion) -> Trajectory:
        num_tokens = episode.context + episode.sampled
        mask_T = np.arange(num_tokens) >= episode.context
        run = VersionRun(*version, episode.sampled)
        logprobs_T = np.where(mask_T, self._logprobs_T[:num_tokens], np.float32(0.0))
        head = TrajectoryHead(
            ticket=actor.held[ticket_id],
            kind="scripted",
            outcome=Outcome.COMPLETED,
            reward=1.0,
            num_turns=self._script.profile.turns,
            num_tool_calls=self._script.profile.turns,
            timings_s={"total": episode.seconds},
            actor_id=actor.name,
            finished_at=time.time(),
        )
        return Trajectory(head, (Segment(self._token_ids_T[:num_tokens], mask_T, logprobs_T, (run,)),))


def open_fleet(state: State, profile: str, ports: tuple[int, int], first: int, num: int, have: tuple[int, int]) -> None:
    """Connect so many actors, the first of this number; `ports` of the broker and the relay."""
    script = Script(PROFILES[profile], seed=first)
    names = [f"actor-{number:04d}" for number in range(first, first + num)]
    state["fleet"] = Fleet(script, *ports, names, PolicyVersion(*have))


def fill_fleet(state: State) -> None:
    """Give all of them their tickets."""
    state["fleet"].fill()


def run_fleet(state: State, starts: float, ends: float) -> Sent:
    """See Fleet.run."""
    sent: Sent = state["fleet"].run(starts, ends)
    return sent


def close_fleet(state: State) -> None:
    """Let them go."""
    state.pop("fleet").close()
