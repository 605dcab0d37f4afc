"""Which thinking budget a group has: a function of the run's seed and the group's number. Pure; remembers nothing.

So a learner that resumes draws the same ones, and siblings, which share a group, share a budget: their rewards are
compared under equal conditions. Numbers follow a Weyl sequence of the golden ratio instead of a random one: any stretch
of groups has each share of the distribution as evenly as can be, so that batches resemble each other.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from itertools import accumulate

from broker.process.thinking_settings import Budget, BudgetsSection

_BITS = 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, odd


def draw_budget(settings: BudgetsSection, seed: int, family: str, number: int) -> Budget:
    """The budget of group `number` (from 0) of a family of tickets; None is any number of tokens."""
    place = _place(seed, family, number)
    if place < settings.zero:
        return 0
    place -= settings.zero
    if place >= settings.bounded:
        return None
    return _bounded(settings, place / settings.bounded)


def _bounded(settings: BudgetsSection, place: float) -> int:
    """The budget above 0 at a place within [0, 1) of their distribution."""
    if settings.between is None:
        sums = list(accumulate(weight for _, weight in settings.choices))
        at = bisect_right(sums, place * sums[-1])
        return settings.choices[min(at, len(sums) - 1)][0]
    low, high = settings.between
    # Equal mass for equal ratios: b has the weight log((b + 1) / b).
    return min(high, int(low * ((high + 1) / low) ** place))


def _place(seed: int, family: str, number: int) -> float:
    start = int.from_bytes(hashlib.blake2b(f"{seed}/{family}".encode(), digest_size=_BITS // 8).digest(), "big")
    return ((start + number * _GOLDEN) % (1 << _BITS)) / (1 << _BITS)
