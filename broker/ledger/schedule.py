"""Which issued ticket is leased next: a pure queue with operations of O(log n) in the tickets that wait.

- Evaluation and reference tickets come before training tickets, the oldest first: the learner waits for them.
- Among training tickets, environments take turns by stride scheduling. A grant costs its environment what one of its
  leases lasts, so environments that have tickets waiting get equal shares of *leased time*, however long their episodes
  are and however many wait. One without waiting tickets takes no share and saves none up. The learner's own mix is kept
  in the long run: admission bounds what is outstanding, and everything that is issued is leased.
- Within an environment, the group with the fewest missing results comes first, so that groups finish: a ticket that is
  retried comes before those of groups that have only begun. Every `OLDEST_EVERY`th grant goes to the environment's
  oldest ticket instead, so that a large group among small ones is not passed over for ever.

Owns the order. Knows no actor, and of a ticket only that it waits; reads no clock: its owner sets `now`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Final

OLDEST_EVERY: Final = 4
MAX_COST_RATIO: Final = 100.0
MEMORY_LEASES: Final = 64

Rank = tuple[float, ...]


class Ranked:
    """Keys in the order of their rank, which may change. O(log n) amortised, memory O(keys)."""

    __slots__ = ("_heap", "_ranks")

    def __init__(self) -> None:
        self._ranks: dict[str, Rank] = {}
        self._heap: list[tuple[Rank, str]] = []  # lazy: an entry counts only while it is the key's rank

    def __len__(self) -> int:
        return len(self._ranks)

    def set(self, key: str, rank: Rank) -> None:
        """Add a key, or change its rank."""
        if self._ranks.get(key) != rank:
            self._ranks[key] = rank
            heapq.heappush(self._heap, (rank, key))
            if len(self._heap) > 2 * len(self._ranks) + 16:
                self._trim()

    def discard(self, key: str) -> None:
        """Remove a key, if it is there."""
        if self._ranks.pop(key, None) is not None and len(self._heap) > 2 * len(self._ranks) + 16:
            self._trim()

    def first(self) -> tuple[Rank, str]:
        """The lowest rank and its key. IndexError where there is none."""
        while True:
            rank, key = self._heap[0]
            if self._ranks.get(key) == rank:
                return rank, key
            heapq.heappop(self._heap)

    def _trim(self) -> None:
        self._heap = [(rank, key) for key, rank in self._ranks.items()]
        heapq.heapify(self._heap)


@dataclass(slots=True)
class LeasedTime:
    """How long leases last, the running ones included; remembers about as many as run, and at least MEMORY_LEASES."""

    running: int = 0
    num_ended: float = 0.0  # decayed, together with the seconds
    seconds: float = 0.0
    updated_at: float = 0.0

    def note(self, now: float, change: int) -> None:
        """A lease began (+1) or ended (-1)."""
        self.seconds += self.running * (now - self.updated_at)
        self.updated_at = now
        if change < 0:
            keep = 1.0 - 1.0 / max(MEMORY_LEASES, self.running)
            self.seconds, self.num_ended = self.seconds * keep, self.num_ended * keep + 1.0
        self.running += change

    def mean_s(self, now: float) -> float:
        """Leased seconds by lease. While fewer have ended than run, what they have lasted so far: an environment must
        not look quick because none of its episodes has come to an end."""
        seconds = self.seconds + self.running * (now - self.updated_at)
        return seconds / max(self.num_ended, float(self.running), 1.0)


class _Environment:
    """The waiting training tickets of one environment, and what it has had."""

    def __init__(self) -> None:
        self.leased = LeasedTime()
        self.virtual_time = 0.0  # leased time that it was granted, in mean leases
        self._num_grants = 0
        self._oldest = Ranked()  # tickets by seq
        self._groups = Ranked()  # groups by (missing results, seq of their oldest waiting ticket)
        self._members: dict[str, Ranked] = {}  # of a group: its waiting tickets by seq
        self._missing: dict[str, int] = {}  # results that a group with waiting tickets lacks

    def __len__(self) -> int:
        return len(self._oldest)

    def add(self, ticket_id: str, group_id: str, seq: int, num_missing: int) -> None:
        self._oldest.set(ticket_id, (seq,))
        if group_id not in self._members:
            self._members[group_id] = Ranked()
        self._members[group_id].set(ticket_id, (seq,))
        self._missing[group_id] = num_missing
        self._rank(group_id)

    def discard(self, ticket_id: str, group_id: str) -> None:
        self._oldest.discard(ticket_id)
        self._members[group_id].discard(ticket_id)
        self._rank(group_id)

    def set_missing(self, group_id: str, num_missing: int) -> None:
        if group_id in self._members:
            self._missing[group_id] = num_missing
            self._rank(group_id)

    def choose(self) -> str:
        """The ticket that this environment's turn goes to."""
        self._num_grants += 1
        if self._num_grants % OLDEST_EVERY == 0:
            return self._oldest.first()[1]
        return self._members[self._groups.first()[1]].first()[1]

    def _rank(self, group_id: str) -> None:
        members = self._members[group_id]
        if members:
            self._groups.set(group_id, (self._missing[group_id], members.first()[0][0]))
        else:
            self._groups.discard(group_id)
            del self._members[group_id], self._missing[group_id]


@dataclass(frozen=True, slots=True)
class _Place:
    env: str
    group_id: str
    urgent: bool


class Schedule:
    """The tickets that wait for a lease: those whose state is `issued`.

    `max_cost_ratio`: a grant costs between 1 / ratio and ratio mean leases. So an environment with waiting tickets gets
    its turn within (ratio² + 1) grants of each other environment; and its ticket with k older ones waiting is leased
    within OLDEST_EVERY · (k + 1) turns.
    """

    def __init__(self, max_cost_ratio: float = MAX_COST_RATIO) -> None:
        self.now = 0.0
        """Seconds of the owner's clock, at which the calls that follow happen."""
        self._max_cost_ratio = max_cost_ratio
        self._places: dict[str, _Place] = {}
        self._urgent = Ranked()  # tickets by seq
        self._environments: dict[str, _Environment] = {}
        self._turns = Ranked()  # environments with waiting tickets, by virtual time
        self._virtual_time = 0.0  # of the latest turn
        self._leased = LeasedTime()

    def __len__(self) -> int:
        return len(self._places)

    def add(
        self, ticket_id: str, *, env: str, group_id: str, seq: int, urgent: bool = False, num_missing: int = 1
    ) -> None:
        """A ticket begins to wait. `seq`: its age, lowest first. `num_missing`: results that its group lacks now."""
        self._places[ticket_id] = _Place(env, group_id, urgent)
        if urgent:
            self._urgent.set(ticket_id, (seq,))
            return
        environment = self._environment(env)
        if not environment:
            environment.virtual_time = max(environment.virtual_time, self._virtual_time)
            self._turns.set(env, (environment.virtual_time,))
        environment.add(ticket_id, group_id, seq, num_missing)

    def discard(self, ticket_id: str) -> None:
        """A ticket waits no more, whether it was taken here or got its end elsewhere."""
        place = self._places.pop(ticket_id, None)
        if place is None:
            return
        if place.urgent:
            self._urgent.discard(ticket_id)
            return
        environment = self._environments[place.env]
        environment.discard(ticket_id, place.group_id)
        if not environment:
            self._turns.discard(place.env)

    def set_missing(self, env: str, group_id: str, num_missing: int) -> None:
        """A group lacks another number of results now."""
        if (environment := self._environments.get(env)) is not None:
            environment.set_missing(group_id, num_missing)

    def take(self) -> str | None:
        """Take out the ticket that is to be leased now; None where none waits."""
        if self._urgent:
            ticket_id = self._urgent.first()[1]
        elif self._turns:
            (self._virtual_time, *_), env = self._turns.first()
            environment = self._environments[env]
            ticket_id = environment.choose()
            environment.virtual_time += self._cost(environment)
            self._turns.set(env, (environment.virtual_time,))
        else:
            return None
        self.discard(ticket_id)
        return ticket_id

    def lease_began(self, env: str) -> None:
        """A training ticket of this environment was leased."""
        self._note(env, 1)

    def lease_ended(self, env: str) -> None:
        """A training ticket of this environment is leased no more."""
        self._note(env, -1)

    def _note(self, env: str, change: int) -> None:
        for leased in (self._environment(env).leased, self._leased):
            leased.note(self.now, change)

    def _environment(self, env: str) -> _Environment:
        if env not in self._environments:
            self._environments[env] = _Environment()
        return self._environments[env]

    def _cost(self, environment: _Environment) -> float:
        """What one of its leases lasts, in mean leases of all; 1 while that is not known."""
        mean_s, overall_s = environment.leased.mean_s(self.now), self._leased.mean_s(self.now)
        if mean_s <= 0.0 or overall_s <= 0.0:
            return 1.0
        return min(max(mean_s / overall_s, 1.0 / self._max_cost_ratio), self._max_cost_ratio)
