"""Valid messages of both channels, as the raw material of mutations. Owns no randomness but what it is given."""

from __future__ import annotations

import random
import uuid

import numpy as np

from broker.protocol import commands as wire
from broker.protocol import weight_messages as weights
from broker.protocol.codec import Parcel, pack_trajectories
from broker.protocol.commands import COMMANDS, Role
from broker.protocol.frames import Message
from broker.protocol.partials import Partial, pack_continue, pack_handover
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import MIN_CHUNK_BYTES, Bytes, Manifest, describe, describe_delta, lay_out
from tests.unit.broker.samples import make_segment, make_ticket, make_trajectory

TICKETS = 2000  # ids that the attackers draw from; honest peers use others


def hello(rng: random.Random, run_id: str, role: Role) -> Message:
    """A HELLO that is welcome: one of a few hundred pods, of a process that was there before or of a new one."""
    peer_id = f"fuzz-{role}-{rng.randrange(200)}"
    session = uuid.UUID(int=rng.getrandbits(128)).hex if rng.random() < 0.3 else f"session-{peer_id}"
    return wire.Hello(role=role, peer_id=peer_id, run_id=run_id, session=session).pack()


def _ids(rng: random.Random) -> tuple[str, ...]:
    return tuple(f"fuzz-t{rng.randrange(TICKETS)}" for _ in range(rng.choice((0, 1, 2, 8))))


def experience(rng: random.Random, run_id: str, role: Role) -> Message:
    """A valid message of the experience channel: mostly one that this role may send, now and then any other."""
    kind = rng.random()
    if kind < 0.1:
        return hello(rng, run_id, role)
    if kind < 0.2:
        return rng.choice((wire.Status(request_id="r").pack(), Message(rng.choice(sorted(COMMANDS)))))
    commands = {Role.ACTOR: _actor, Role.LEARNER: _learner, Role.OPERATOR: _operator}
    return commands[role if kind < 0.9 else rng.choice(tuple(Role))](rng)


def _actor(rng: random.Random) -> Message:
    ids, request_id = _ids(rng), f"r{rng.randrange(50)}"
    ticket_id = f"fuzz-t{rng.randrange(TICKETS)}"
    credit = rng.choice((0, 1, 1, 2, 2, 5) if rng.random() < 0.95 else (4096, 2**40))
    choices = (
        lambda: parcel(rng),
        lambda: parcel(rng),
        lambda: parcel(rng),
        lambda: wire.Offer(ticket_id=ticket_id, num_bytes=rng.choice((0, 1, 2 << 20, 2**40))).pack(),
        lambda: wire.Heartbeat(leases=ids).pack(),
        lambda: wire.Lease(credit=credit).pack(),
        lambda: handover(rng, ticket_id),
        lambda: wire.Release(request_id=request_id, ticket_ids=ids, reason="infra_failure", error="fuzz").pack(),
        lambda: wire.Release(request_id=request_id, ticket_ids=ids, reason="drain").pack(),
        lambda: _of_the_broker(rng),
    )
    return rng.choice(choices)()


def parcel(rng: random.Random, body: type[Parcel] = wire.TrajectoryBody) -> Message:
    """One to eight trajectories of different tickets, of a few segments each."""
    ids = rng.sample(range(TICKETS), rng.choice((1, 1, 2, 3, 8)))
    trajectories = [
        make_trajectory(make_ticket(f"fuzz-t{number}"), num_segments=rng.choice((1, 1, 2, 5))) for number in ids
    ]
    return pack_trajectories(trajectories, body)


def handover(rng: random.Random, ticket_id: str) -> Message:
    """A partial of one to three segments, with a snapshot of noise."""
    segments = tuple(make_segment() for _ in range(rng.choice((1, 1, 3))))
    turn = rng.choice((None, wire.UnfinishedTurn(num_tokens=rng.randrange(7), began_open=rng.random() < 0.5)))
    snapshot = rng.randbytes(rng.choice((0, 8, 2000)))
    return pack_handover(ticket_id, Partial(wire.PartialHead(num_turns=2, turn=turn), segments, snapshot))


def _of_the_broker(rng: random.Random) -> Message:
    """What only the broker may say, said by a peer."""
    ids, request_id = [f"fuzz-t{n}" for n in rng.sample(range(TICKETS), 3)], f"r{rng.randrange(50)}"
    statuses: tuple[wire.SendStatus, ...] = ("accepted", "late", "unwanted")
    choices = (
        lambda: parcel(rng, wire.Deliver),
        lambda: wire.Durable(results=tuple(zip(ids, statuses, strict=True))).pack(),
        lambda: wire.TicketBody(tickets=tuple(make_ticket(ticket_id) for ticket_id in ids)).pack(),
        lambda: wire.Clear(ticket_id=ids[0]).pack(),
        lambda: pack_continue(make_ticket(ids[0]), handover(rng, ids[0])),
        lambda: wire.HandedOver(ticket_id=ids[0], status="kept").pack(),
        lambda: wire.Withdrawn(ticket_ids=tuple(ids)).pack(),
        lambda: wire.Acked(request_id=request_id, count=3).pack(),
    )
    return rng.choice(choices)()


def _learner(rng: random.Random) -> Message:
    ids, request_id = _ids(rng), f"r{rng.randrange(50)}"
    credit = rng.choice((0, 3, 64, 2**40))
    choices = (
        lambda: wire.Resume(request_id=request_id, acked=ids, held=_ids(rng)).pack(),
        lambda: _issue(rng, request_id),
        lambda: _issue(rng, request_id),
        lambda: _issue(rng, request_id),
        lambda: wire.Credit(credit=credit, credit_bytes=rng.choice((None, 0, 2**40))).pack(),
        lambda: wire.Ack(request_id=request_id, ticket_ids=ids, dropped=ids[:1]).pack(),
        lambda: wire.Cancel(request_id=request_id).pack(),
        lambda: wire.Cancel(request_id=request_id, ticket_ids=ids, group_ids=("group-f",)).pack(),
        lambda: _of_the_broker(rng),
    )
    return rng.choice(choices)()


def _issue(rng: random.Random, request_id: str) -> Message:
    """Tickets, some of which were issued before; many at a time, so that attackers' results meet live tickets."""
    first = rng.randrange(TICKETS)
    tickets = tuple(make_ticket(f"fuzz-t{number}") for number in range(first, first + rng.choice((0, 1, 8, 100))))
    return wire.Issue(request_id=request_id, tickets=tickets).pack()


def _operator(rng: random.Random) -> Message:
    ids, request_id, all_dead = _ids(rng), f"r{rng.randrange(50)}", rng.random() < 0.3
    choices = (
        lambda: wire.Requeue(request_id=request_id, ticket_ids=ids, all_dead=all_dead).pack(),
        lambda: wire.Purge(request_id=request_id, ticket_ids=ids, all_dead=all_dead).pack(),
        lambda: wire.Inspect(request_id=request_id, max_dead=rng.choice((0, 3, 100))).pack(),
    )
    return rng.choice(choices)()


def weight(rng: random.Random, run_id: str, _role: Role) -> Message:
    """A valid message of the weight channel's requests, for versions that exist and that do not."""
    version = PolicyVersion(rng.choice((1, 1, 1, 0, 2**62)), rng.choice((0, 0, 0, 1, 2**62)))
    have = rng.choice((None, PolicyVersion(1, 0), version))
    choices = (
        lambda: weight_hello(rng, run_id),
        lambda: Message("HEARTBEAT"),
        lambda: weights.Watch(have=rng.choice((None, version)), push_bytes=rng.choice((0, 1 << 20, 2**62))).pack(),
        lambda: weights.manifest_request(version, have),
        lambda: weights.chunk_request(version, have, rng.choice((0, 1, 2, 3, 1000, 2**62))),
        lambda: weights.Announce(newest=version, num_bytes=17, proof=None).pack(),
        lambda: weights.Welcome(run_id=run_id, heartbeat_s=1.0, liveness=15).pack(),
        lambda: weights.chunk_reply(version, have, 0, np.zeros(64, np.uint8)),
        lambda: _manifest(rng, run_id, version),
        lambda: weights.push(*_pushed(run_id, version)),
        lambda: weights.push_part(weights.Part(version, version, rng.choice((0, 2**62)), np.zeros(64, np.uint8))),
    )
    return rng.choice(choices)()


def _manifest(rng: random.Random, run_id: str, version: PolicyVersion) -> Message:
    """What only a server of weights may say, said by a receiver."""
    tensors = lay_out([("w", "bfloat16", (64, 32)), ("b", "float32", (rng.choice((1, 64, 5000)),))])
    snapshot = np.zeros(tensors[-1].offset + tensors[-1].num_bytes, np.uint8)
    return weights.manifest_reply(describe(run_id, version, tensors, snapshot, MIN_CHUNK_BYTES, 1.75e9))


def _pushed(run_id: str, version: PolicyVersion) -> tuple[Manifest, Bytes]:
    """A delta, which only a server may push."""
    tensors = lay_out([("w", "bfloat16", (64, 32))])
    anchor = describe(run_id, version, tensors, np.zeros(4096, np.uint8), MIN_CHUNK_BYTES, 1.75e9)
    payload = np.zeros(100, np.uint8)
    return describe_delta(anchor, PolicyVersion(version.lineage, 0), payload), payload


def weight_hello(rng: random.Random, run_id: str) -> Message:
    """A HELLO of the weight channel that is welcome."""
    role = rng.choice((weights.Role.RELAY, weights.Role.ACTOR))
    return weights.Hello(role=role, peer_id=f"fuzz-{rng.randrange(100)}", run_id=run_id, session="fuzz").pack()
