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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, NamedTuple

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
_TRAIN: Final = Mode.TRAIN
_new_row = tuple.__new__  # makes a NamedTuple in half the time that its own constructor takes


@dataclass(slots=True)
class _Group:
    reward_sum: float = 0.0
    num_rewards: int = 0
    num_open: int = 0  # results whose fate is open


class _Result(NamedTuple):
    env: str
    group_id: str
    group: _Group
    duration_bin: int
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
    """Memory is bounded by the results whose fate is open, the patience, and the number of environments."""

    def __init__(self, patience: int = PATIENCE) -> None:
        self._patience = patience
        self._results: dict[str, _Result] = {}
        self._groups: dict[str, _Group] = {}
        self._by_age: deque[tuple[int, list[str]]] = deque()  # (due, ids of tickets that came together), lazy
        self._num_settled = 0
        self._histograms: dict[str, _Histograms] = {}

    def observe(self, action: Finished | Settle) -> None:
        """One action of the ledger."""
        if isinstance(action, Settle):
            dropped = action.dropped
            for ticket_id in action.ticket_ids:
                if (result := self._results.pop(ticket_id, None)) is not None:
                    self._num_settled += 1
                    self._count(result, consumed=ticket_id not in dropped)
                    if self._by_age and self._by_age[0][0] <= self._num_settled:
                        self._lose_patience()
        else:
            self._finish(action.results)

    def recalled(self, ticket_id: str) -> None:
        """A result was taken back: its stored trajectory is damaged, and its fate is nobody's doing."""
        if (result := self._results.pop(ticket_id, None)) is not None:
            group = result.group
            group.reward_sum -= result.reward
            group.num_rewards -= 1
            self._close(result.group_id, group)

    def drift(self) -> Mapping[tuple[str, str], float]:
        """By environment and quantity: how far the distribution of what was used lies from that of what was run."""
        return {
            (env, quantity): histograms.distance(index)
            for env, histograms in self._histograms.items()
            for index, quantity in enumerate(QUANTITIES)
        }

    def _finish(self, finished: Sequence[tuple[Ticket, Finish]]) -> None:
        """These came together."""
        results, groups = self._results, self._groups
        due = self._num_settled + self._patience
        ticket_ids = []
        for ticket, (_, reward, duration_s) in finished:
            if ticket.mode is not _TRAIN:
                continue
            ticket_id, group_id = ticket.ticket_id, ticket.group_id
            if ticket_id in results:  # replaced
                self.recalled(ticket_id)
            group = groups.get(group_id)
            if group is None:
                group = groups[group_id] = _Group()
            group.reward_sum += reward
            group.num_rewards += 1
            group.num_open += 1
            duration_bin = _duration_bin(duration_s)
            results[ticket_id] = _new_row(_Result, (ticket.task.env, group_id, group, duration_bin, reward, due))
            ticket_ids.append(ticket_id)
        if ticket_ids:
            self._by_age.append((due, ticket_ids))

    def _lose_patience(self) -> None:
        """What was left lying for too long will not be used."""
        while self._by_age and self._by_age[0][0] <= self._num_settled:
            due, ticket_ids = self._by_age.popleft()
            for ticket_id in ticket_ids:
                if (result := self._results.get(ticket_id)) is not None and result.due == due:
                    del self._results[ticket_id]
                    self._count(result, consumed=False)

    def _count(self, result: _Result, consumed: bool) -> None:
        """The fate of a result is known, which is not among `_results` any more."""
        group = result.group
        histograms = self._histograms.get(result.env)
        if histograms is None:
            histograms = self._histograms[result.env] = _Histograms()
        histograms.add(result.duration_bin, _unit_bin(1.0 - group.reward_sum / group.num_rewards), consumed)
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
