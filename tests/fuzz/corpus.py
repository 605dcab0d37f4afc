"""Valid messages of both channels, as the raw material of mutations. Owns no randomness but what it is given."""

from __future__ import annotations

import random
import uuid

from broker.protocol import commands as wire
from broker.protocol import weight_messages as weights
from broker.protocol.codec import trajectory_to_message
from broker.protocol.commands import COMMANDS, Role
from broker.protocol.frames import Message
from broker.protocol.trajectory import PolicyVersion
from tests.unit.broker.samples import make_ticket, make_trajectory

TICKETS = 400  # ids that the attackers draw from; honest peers use others


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
    trajectory = make_trajectory(make_ticket(f"fuzz-t{rng.randrange(TICKETS)}"), num_segments=rng.choice((1, 1, 2, 5)))
    credit = rng.choice((0, 1, 1, 2, 2, 5) if rng.random() < 0.95 else (4096, 2**40))
    choices = (
        lambda: trajectory_to_message(trajectory),
        lambda: trajectory_to_message(trajectory),
        lambda: trajectory_to_message(trajectory, wire.Deliver),
        lambda: wire.Heartbeat(leases=ids).pack(),
        lambda: wire.Lease(credit=credit).pack(),
        lambda: wire.Release(request_id=request_id, ticket_ids=ids, reason="infra_failure", error="fuzz").pack(),
        lambda: wire.Release(request_id=request_id, ticket_ids=ids, reason="drain").pack(),
        lambda: wire.Durable(ticket_id=trajectory.ticket.ticket_id, status="accepted").pack(),
    )
    return rng.choice(choices)()


def _learner(rng: random.Random) -> Message:
    ids, request_id = _ids(rng), f"r{rng.randrange(50)}"
    tickets = tuple(make_ticket(ticket_id) for ticket_id in ids)
    credit = rng.choice((0, 3, 64, 2**40))
    choices = (
        lambda: wire.Resume(request_id=request_id, acked=ids, held=_ids(rng)).pack(),
        lambda: wire.Issue(request_id=request_id, tickets=tickets).pack(),
        lambda: wire.Credit(credit=credit, credit_bytes=rng.choice((None, 0, 2**40))).pack(),
        lambda: wire.Ack(request_id=request_id, ticket_ids=ids, dropped=ids[:1]).pack(),
        lambda: wire.Cancel(request_id=request_id).pack(),
        lambda: wire.Cancel(request_id=request_id, ticket_ids=ids, group_ids=("group-f",)).pack(),
    )
    return rng.choice(choices)()


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
    choices = (
        lambda: weight_hello(rng, run_id),
        lambda: Message("HEARTBEAT", {}),
        lambda: weights.watch(rng.choice((None, version))),
        lambda: weights.manifest_request(version),
        lambda: weights.chunk_request(version, rng.choice((0, 1, 2, 3, 1000, 2**62))),
        lambda: weights.announce(version, 17),
        lambda: weights.welcome(run_id, 1.0, 15),
    )
    return rng.choice(choices)()


def weight_hello(rng: random.Random, run_id: str) -> Message:
    """A HELLO of the weight channel that is welcome."""
    body = {"role": rng.choice(("relay", "actor")), "peer_id": f"fuzz-{rng.randrange(100)}", "run_id": run_id}
    return Message("HELLO", body | {"session": "fuzz"})
