"""What a scripted episode is: its duration, its failures, its tokens, its reward, and the weights of a version.

Everything is drawn from the run's seed and the ticket's id, so that any process can say what any other must hold. Pure;
never sleeps, sends or writes.
"""

from __future__ import annotations

import random
import time

import numpy as np
import numpy.typing as npt
import xxhash

from broker.protocol.trajectory import (
    Outcome,
    PolicyVersion,
    Segment,
    Ticket,
    Trajectory,
    TrajectoryHead,
    VersionRun,
)

INFRA_FAILURES = 0.03  # share of attempts that give their ticket back
FLAT_GROUPS = 0.1  # share of groups without variance, which fill no batch
BEAT_S = 0.2  # episodes end on the beat, so that several of an actor end together and share a message
WEIGHT_BYTES = 256 << 10
CHANGED_FRACTION = 0.01
NUM_PROMPT = 8


def _draw(seed: int, *what: object) -> random.Random:
    return random.Random(f"{seed}/{'/'.join(map(str, what))}")


def duration_s(seed: int, ticket: Ticket) -> float:
    """Seconds this attempt takes at least, to the next beat: 0.7 on average, with a tail beyond the lease (which
    heartbeats renew)."""
    return min(6.0, _draw(seed, ticket.ticket_id, ticket.attempt, "duration").lognormvariate(-0.7, 0.8))


def fails(seed: int, ticket: Ticket) -> bool:
    """Whether this attempt ends in an infrastructure failure."""
    return _draw(seed, ticket.ticket_id, ticket.attempt, "failure").random() < INFRA_FAILURES


def reward(seed: int, ticket: Ticket) -> float:
    """The same for every attempt; all equal within a flat group."""
    if _draw(seed, ticket.group_id, "flat").random() < FLAT_GROUPS:
        return 1.0
    return float(int(ticket.ticket_id.rpartition("/")[2]) % 2)


def num_tokens(seed: int, ticket_id: str) -> int:
    """Sampled tokens of a ticket's episode: mostly small; one in twenty up to a megabyte on the wire, which is a file
    beside the store; one in a hundred more, which is offered before it is sent."""
    rng = _draw(seed, ticket_id, "size")
    sizes = ((16, 512), (512, 8_000), (20_000, 110_000), (120_000, 220_000))
    low, high = rng.choices(sizes, weights=(80, 14, 5, 1))[0]
    return rng.randint(low, high)


def token_ids(seed: int, ticket_id: str) -> npt.NDArray[np.int32]:
    """Prompt and sampled tokens of a ticket's episode, int32 [NUM_PROMPT + num_tokens]."""
    generator = np.random.default_rng(xxhash.xxh3_64_intdigest(f"{seed}/{ticket_id}".encode()))
    return generator.integers(0, 32_000, NUM_PROMPT + num_tokens(seed, ticket_id), dtype=np.int32)


def make_trajectory(seed: int, ticket: Ticket, actor_id: str, version: PolicyVersion) -> Trajectory:
    """The record of a scripted episode that `version` sampled."""
    token_ids_T = token_ids(seed, ticket.ticket_id)
    mask_T = np.arange(token_ids_T.size) >= NUM_PROMPT
    logprobs_T = np.where(mask_T, -1.0 - (token_ids_T % 7), 0.0).astype(np.float32)
    run = VersionRun(version.lineage, version.version, int(mask_T.sum()))
    took_s = duration_s(seed, ticket)
    head = TrajectoryHead(
        ticket=ticket,
        kind="scripted",
        outcome=Outcome.COMPLETED,
        reward=reward(seed, ticket),
        num_turns=1,
        timings_s={"total": took_s, "model": took_s, "tool": 0.0},
        actor_id=actor_id,
        finished_at=max(0.0, time.time()),
    )
    return Trajectory(head, (Segment(token_ids_T, mask_T, logprobs_T, (run,)),))


def is_genuine(seed: int, trajectory: Trajectory) -> bool:
    """Whether the tokens are those of this ticket, bit for bit."""
    expected_T = token_ids(seed, trajectory.ticket.ticket_id)
    return len(trajectory.segments) == 1 and np.array_equal(trajectory.segments[0].token_ids_T, expected_T)


def weights(version: PolicyVersion) -> npt.NDArray[np.uint8]:
    """The snapshot of a version, uint8 [WEIGHT_BYTES]: two of a lineage differ in some bytes of every chunk, so that
    they travel as deltas; one in eight differs in all bytes, and travels as an anchor."""
    generator = np.random.default_rng((version.lineage, version.version))
    drawn = generator.integers(0, 256, WEIGHT_BYTES, dtype=np.uint8)
    if version.version % 8 == 7:
        return drawn
    common = np.random.default_rng(version.lineage).integers(0, 256, WEIGHT_BYTES, dtype=np.uint8)
    return np.where(generator.random(WEIGHT_BYTES) < CHANGED_FRACTION, drawn, common)
