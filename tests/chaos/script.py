"""What a scripted episode is: its duration, its failures, its turns, its tokens, its reward; and a version's weights.

Everything is drawn from the run's seed and the ticket's id, so that any process can say what any other must hold. Pure;
never sleeps, sends or writes.
"""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import xxhash

from broker.protocol.trajectory import PolicyVersion, Ticket

INFRA_FAILURES = 0.03  # share of attempts that give their ticket back
FLAT_GROUPS = 0.1  # share of groups without variance, which fill no batch
BEAT_S = 0.2  # episodes end on the beat, so that several of an actor end together and share a message
WEIGHT_BYTES = 256 << 10
CHANGED_FRACTION = 0.01
NUM_PROMPT = 8
NUM_OBSERVED = 3  # tokens that answer a turn
MAX_TURNS = 4


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


def turn_ends(seed: int, ticket_id: str) -> list[int]:
    """Sampled tokens of a ticket's episode after each of its turns, one to MAX_TURNS; the last is `num_tokens`."""
    total = num_tokens(seed, ticket_id)
    num_turns = _draw(seed, ticket_id, "turns").randint(1, MAX_TURNS)
    return [total * (turn + 1) // num_turns for turn in range(num_turns)]


def trace(seed: int, ticket_id: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """The token ids (int32 [T]) and loss mask (bool [T]) of a ticket's whole episode: in each turn what was asked and
    what was sampled, drawn from ticket and turn."""
    ids, mask = list[npt.NDArray[np.int32]](), list[npt.NDArray[np.bool_]]()
    for turn, (start, end) in enumerate(pairwise([0, *turn_ends(seed, ticket_id)])):
        num_asked = NUM_OBSERVED if turn else NUM_PROMPT
        generator = np.random.default_rng(xxhash.xxh3_64_intdigest(f"{seed}/{ticket_id}/{turn}".encode()))
        ids.append(generator.integers(0, 32_000, num_asked + end - start, dtype=np.int32))
        mask.append(np.arange(ids[-1].size) >= num_asked)
    return np.concatenate(ids), np.concatenate(mask)


def weights(version: PolicyVersion) -> npt.NDArray[np.uint8]:
    """The snapshot of a version, uint8 [WEIGHT_BYTES]: two of a lineage differ in some bytes of every chunk, so that
    they travel as deltas; one in eight differs in all bytes, and travels as an anchor."""
    generator = np.random.default_rng((version.lineage, version.version))
    drawn = generator.integers(0, 256, WEIGHT_BYTES, dtype=np.uint8)
    if version.version % 8 == 7:
        return drawn
    common = np.random.default_rng(version.lineage).integers(0, 256, WEIGHT_BYTES, dtype=np.uint8)
    return np.where(generator.random(WEIGHT_BYTES) < CHANGED_FRACTION, drawn, common)
