"""Seeded faults for environments: errors, lost answers, cut answers and slowness, by named profile. Does no I/O.

The n-th draw depends on the seed and n alone, so the same actions meet the same faults in every process. Never more
than `max_in_a_row` calls in a row go wrong, so whoever tries again gets through.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

FaultKind = Literal["none", "error", "lost", "partial"]
MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class FaultProfile:
    """Chances per call, in 0 to 1. error: refused with a 5xx, nothing done. lost: done, but answered with a 5xx.
    partial: the answer is cut short. slow: it takes up to `slow_s` seconds more."""

    error: float = 0.0
    lost: float = 0.0
    partial: float = 0.0
    slow: float = 0.0
    slow_s: float = 8.0
    max_in_a_row: int = 3


PROFILES = {
    "none": FaultProfile(),
    "mild": FaultProfile(error=0.04, lost=0.02, partial=0.02, slow=0.1),
    "rough": FaultProfile(error=0.12, lost=0.06, partial=0.06, slow=0.2),
    "hostile": FaultProfile(error=0.25, lost=0.15, partial=0.15, slow=0.3, slow_s=20.0),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one call. keep: the share of a partial answer that arrives. delay_s: extra seconds."""

    kind: FaultKind = "none"
    status: int = 200
    keep: float = 1.0
    delay_s: float = 0.0

    def cut(self, text: str) -> str:
        """What arrives of an answer: all of it, or the beginning; a cut answer always lacks something."""
        return text[: int(len(text) * self.keep)] if self.kind == "partial" else text


class FaultInjector:
    """The faults of one episode, one after the other."""

    def __init__(self, profile: FaultProfile, seed: str) -> None:
        self._profile = profile
        self._random = random.Random(f"faults|{seed}")
        self._in_a_row = self._num_drawn = 0

    @property
    def position(self) -> tuple[int, int]:
        """How many were drawn, and how many of the last ones in a row went wrong."""
        return self._num_drawn, self._in_a_row

    def go_to(self, num_drawn: int, num_in_a_row: int) -> None:
        """Of a fresh injector: be where another one of its seed was at this position."""
        for _ in range(4 * num_drawn):
            self._random.random()
        self._num_drawn, self._in_a_row = num_drawn, num_in_a_row

    def draw(self) -> Fault:
        """The next call's fault. Always four random numbers, so that what one call met does not shift the others'."""
        self._num_drawn += 1
        which, status, keep, slow = (self._random.random() for _ in range(4))
        profile = self._profile
        delay_s = round(slow / profile.slow * profile.slow_s, 1) if slow < profile.slow else 0.0
        kind: FaultKind = "none"
        if which < profile.error:
            kind = "error"
        elif which < profile.error + profile.lost:
            kind = "lost"
        elif which < profile.error + profile.lost + profile.partial:
            kind = "partial"
        if kind != "none" and self._in_a_row >= profile.max_in_a_row:
            kind = "none"
        self._in_a_row = 0 if kind == "none" else self._in_a_row + 1
        if kind == "error":
            return Fault(kind, (500, 502, 503)[int(status * 3)], 1.0, delay_s)
        if kind == "lost":
            return Fault(kind, 504, 1.0, delay_s)
        return Fault(kind, 200, 0.9 * keep if kind == "partial" else 1.0, delay_s)


def check_profile(name: str) -> str:
    """The name, if there is such a profile. Raises ValueError."""
    if name not in PROFILES and name != MIXED:
        raise ValueError(f"faults is {name!r}; choose {', '.join(PROFILES)} or {MIXED} (another one for every task)")
    return name


def profile_of(name: str, seed: str) -> FaultProfile:
    """The profile of this name; for `mixed`, one that the seed chooses. Raises ValueError."""
    if check_profile(name) == MIXED:
        return PROFILES[random.Random(f"profile|{seed}").choice(tuple(PROFILES))]
    return PROFILES[name]
