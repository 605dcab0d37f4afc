"""Whether what is trained on still looks like what was run: durations and difficulties, by environment.

A learner that throws results away (too old, too late, surplus) throws away the slow and the hard ones first, and its
curves look the better for it. So every training result that was taken is compared with those that the learner used:
two decayed histograms by environment and quantity, and the largest distance of their cumulated shares
(Kolmogorov-Smirnov, 0 to 1).

A result is *dispatched* once its fate is known: the learner used it, threw it away, or left it lying while `patience`
later ones were settled. What the learner may still use therefore counts on neither side, and one that uses everything
shows exactly 0. Difficulty is 1 - the mean reward of the group as far as it has come.

A pure data structure: no clock, no metrics, no tickets beyond those whose fate is open. Results restored after a
restart of the broker are not known here and count on neither side.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from broker.ledger.events import Finish, Finished, Settle
from broker.protocol.trajectory import Mode, Ticket

QUANTITIES: Final = ("duration", "difficulty")
NUM_BINS: Final = 48
SHORTEST_S: Final = 2.0**-7  # of the duration's first bin; each is half an octave, the last begins after 18 hours
MIN_RESULTS: Final = 100.0  # decayed, as LEAST_RESULTS
LEAST_RESULTS: Final = 1e-3
MEMORY_RESULTS: Final = 2000.0  # results over which a histogram forgets
MAX_WEIGHT: Final = 1e12
PATIENCE: Final = 4096  # settled results; far more than a learner that uses everything keeps waiting


@dataclass(slots=True)
class _Group:
    reward_sum: float = 0.0
    num_rewards: int = 0
    num_open: int = 0  # results whose fate is open

    @property
    def difficulty(self) -> float:
        return 1.0 - self.reward_sum / self.num_rewards


@dataclass(slots=True)
class _Result:
    env: str
    group_id: str
    duration_s: float
    reward: float
    due: int  # the number of settled results at which patience ends


class _Histograms:
    """Weights of the dispatched and of the consumed results by quantity and bin.

    Old results lose weight against new ones: instead of all bins being decayed at every result, results weigh more and
    more, until everything is scaled down.
    """

    def __init__(self) -> None:
        self.weight = 1.0  # of the newest result
        self.dispatched = [[0.0] * NUM_BINS for _ in QUANTITIES]
        self.consumed = [[0.0] * NUM_BINS for _ in QUANTITIES]

    def add(self, duration_bin: int, difficulty_bin: int, consumed: bool) -> None:
        self.weight = weight = self.weight * (1.0 + 1.0 / MEMORY_RESULTS)
        for durations, difficulties in (self.dispatched, self.consumed) if consumed else (self.dispatched,):
            durations[duration_bin] += weight
            difficulties[difficulty_bin] += weight
        if self.weight > MAX_WEIGHT:
            for weights in (*self.dispatched, *self.consumed):
                weights[:] = [weight / self.weight for weight in weights]
            self.weight = 1.0

    def distance(self, quantity: int) -> float:
        """0 while there are fewer than MIN_RESULTS; 1 where none of them was consumed."""
        dispatched, consumed = self.dispatched[quantity], self.consumed[quantity]
        num_dispatched, num_consumed = sum(dispatched), sum(consumed)
        if num_dispatched < MIN_RESULTS * self.weight:
            return 0.0
        if num_consumed < LEAST_RESULTS * self.weight:
            return 1.0
        difference = (d / num_dispatched - c / num_consumed for d, c in zip(dispatched, consumed, strict=True))
        return max(abs(share) for share in accumulate(difference))


class DriftMonitor:
    """Memory is bounded by the results whose fate is open and the number of environments."""

    def __init__(self, patience: int = PATIENCE) -> None:
        self._patience = patience
        self._results: dict[str, _Result] = {}
        self._groups: dict[str, _Group] = {}
        self._by_age: deque[tuple[int, str]] = deque()  # (due, ticket id), lazy
        self._num_settled = 0
        self._histograms: dict[str, _Histograms] = {}

    def observe(self, action: Finished | Settle) -> None:
        """One action of the ledger."""
        if isinstance(action, Settle):
            for ticket_id in action.ticket_ids:
                if ticket_id in self._results:
                    self._settle(ticket_id, consumed=ticket_id not in action.dropped)
        else:
            for ticket, finish in action.results:
                if ticket.mode is Mode.TRAIN:
                    self._finish(ticket, finish)

    def drift(self) -> Mapping[tuple[str, str], float]:
        """By environment and quantity: how far the distribution of what was used lies from that of what was run."""
        return {
            (env, quantity): histograms.distance(index)
            for env, histograms in self._histograms.items()
            for index, quantity in enumerate(QUANTITIES)
        }

    def _finish(self, ticket: Ticket, finish: Finish) -> None:
        self._forget(ticket.ticket_id)  # a result that was taken back and is replaced
        due = self._num_settled + self._patience
        result = _Result(ticket.task.env, ticket.group_id, finish.duration_s, finish.reward, due)
        self._results[ticket.ticket_id] = result
        self._by_age.append((due, ticket.ticket_id))
        group = self._groups.get(ticket.group_id)
        if group is None:
            group = self._groups[ticket.group_id] = _Group()
        group.reward_sum += finish.reward
        group.num_rewards += 1
        group.num_open += 1

    def _settle(self, ticket_id: str, consumed: bool) -> None:
        self._num_settled += 1
        self._count(ticket_id, consumed)
        while self._by_age:
            due, oldest = self._by_age[0]
            result = self._results.get(oldest)
            if result is not None and result.due == due:
                if due > self._num_settled:
                    return
                self._count(oldest, consumed=False)
            self._by_age.popleft()

    def _count(self, ticket_id: str, consumed: bool) -> None:
        result = self._results.pop(ticket_id)
        group = self._groups[result.group_id]
        histograms = self._histograms.get(result.env)
        if histograms is None:
            histograms = self._histograms[result.env] = _Histograms()
        histograms.add(_duration_bin(result.duration_s), _unit_bin(group.difficulty), consumed)
        self._close(result.group_id, group)

    def _forget(self, ticket_id: str) -> None:
        if (result := self._results.pop(ticket_id, None)) is not None:
            group = self._groups[result.group_id]
            group.reward_sum -= result.reward
            group.num_rewards -= 1
            self._close(result.group_id, group)

    def _close(self, group_id: str, group: _Group) -> None:
        group.num_open -= 1
        if not group.num_open:
            del self._groups[group_id]


def _duration_bin(seconds: float) -> int:
    """Half-octave bins; what is shorter or longer is in the first or the last."""
    if seconds <= SHORTEST_S:
        return 0
    index = 1 + int(2.0 * math.log2(seconds / SHORTEST_S))
    return index if index < NUM_BINS else NUM_BINS - 1


def _unit_bin(value: float) -> int:
    """Equal bins over 0 to 1; rewards beyond that range count as its ends."""
    if value <= 0.0:
        return 0
    index = int(value * NUM_BINS)
    return index if index < NUM_BINS else NUM_BINS - 1
