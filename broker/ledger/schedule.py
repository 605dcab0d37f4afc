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
import sys
from collections.abc import Container
from dataclasses import dataclass
from typing import Final

OLDEST_EVERY: Final = 4
MAX_COST_RATIO: Final = 100.0
MEMORY_LEASES: Final = 64

GroupRank = tuple[int, int, str]
"""(missing results, seq of the oldest waiting ticket, group id)"""

_LAST: Final[GroupRank] = (sys.maxsize, 0, "")


class Waiting:
    """Waiting tickets by age: a lazy heap of (seq, ticket id).

    A ticket that waits no more stays in the heap until it comes to the front, or until such leftovers are more than
    half of it. One that comes back may lie there twice, with the same seq: no harm. So every operation is O(log n)
    amortised and memory O(n), and the usual one, of a ticket younger than all others, is a plain append.
    """

    __slots__ = ("heap", "num")

    def __init__(self) -> None:
        self.heap: list[tuple[int, str]] = []
        self.num = 0  # tickets that wait

    def add(self, seq: int, ticket_id: str) -> None:
        """A ticket waits."""
        heapq.heappush(self.heap, (seq, ticket_id))
        self.num += 1

    def remove(self, waiting: Container[str]) -> None:
        """One of them waits no more; `waiting` has those that still do."""
        self.num -= 1
        if len(self.heap) > 2 * self.num + 16:
            self.heap = sorted({item for item in self.heap if item[1] in waiting})

    def first(self, waiting: Container[str]) -> tuple[int, str]:
        """The oldest. IndexError where there is none."""
        heap = self.heap
        while heap[0][1] not in waiting:
            heapq.heappop(heap)
        return heap[0]


@dataclass(slots=True)
class LeasedTime:
    """How long leases last, the running ones included; remembers about as many as run, and at least MEMORY_LEASES."""

    running: int = 0
    num_ended: float = 0.0  # decayed, together with the seconds
    seconds: float = 0.0
    updated_at: float = 0.0

    def began(self, now: float) -> None:
        """A lease began."""
        if now != self.updated_at:
            self.seconds += self.running * (now - self.updated_at)
            self.updated_at = now
        self.running += 1

    def ended(self, now: float, num: int = 1) -> None:
        """So many leases ended."""
        running, seconds, num_ended = self.running, self.seconds, self.num_ended
        if now != self.updated_at:
            seconds += running * (now - self.updated_at)
            self.updated_at = now
        for _ in range(num):
            keep = 1.0 - 1.0 / (running if running > MEMORY_LEASES else MEMORY_LEASES)
            seconds *= keep
            num_ended = num_ended * keep + 1.0
            running -= 1
        self.running, self.seconds, self.num_ended = running, seconds, num_ended

    def mean_s(self, now: float) -> float:
        """Leased seconds by lease. While fewer have ended than run, what they have lasted so far: an environment must
        not look quick because none of its episodes has come to an end."""
        seconds = self.seconds + self.running * (now - self.updated_at)
        return seconds / max(self.num_ended, float(self.running), 1.0)


class _Group:
    """The waiting tickets of one group. `rank`: by which it stands in its environment's order, see there."""

    __slots__ = ("environment", "group_id", "num_missing", "rank", "tickets")

    def __init__(self, environment: _Environment, group_id: str) -> None:
        self.environment, self.group_id = environment, group_id
        self.tickets = Waiting()
        self.num_missing = 0  # results that the group lacks
        self.rank = _LAST


class _Environment:
    """The waiting training tickets of one environment, and what it has had.

    `order` is a lazy heap of group ranks: (missing results, seq of the oldest waiting ticket, group id). An item counts
    only while it is its group's `rank`. A rank that has grown since, the common case, is put right when it comes to the
    front; only one that has fallen is pushed at once.
    """

    __slots__ = ("groups", "leased", "num_grants", "oldest", "order", "queued", "virtual_time")

    def __init__(self) -> None:
        self.leased = LeasedTime()
        self.virtual_time = 0.0  # leased time that it was granted, in mean leases
        self.queued = False  # whether it is in the heap of turns
        self.num_grants = 0
        self.oldest = Waiting()
        self.groups: dict[str, _Group] = {}  # those with waiting tickets
        self.order: list[GroupRank] = []

    def __len__(self) -> int:
        return self.oldest.num

    def add(self, ticket_id: str, group_id: str, seq: int, num_missing: int) -> _Group:
        """A ticket begins to wait; its group."""
        group = self.groups.get(group_id)
        if group is None:
            group = self.groups[group_id] = _Group(self, group_id)
        group.tickets.add(seq, ticket_id)
        self.oldest.add(seq, ticket_id)
        self.set_missing(group, num_missing)
        return group

    def remove(self, group: _Group, waiting: Container[str]) -> None:
        """A ticket of this group waits no more."""
        self.oldest.remove(waiting)
        group.tickets.remove(waiting)
        if not group.tickets.num:
            del self.groups[group.group_id]
            self._trim()

    def set_missing(self, group: _Group, num_missing: int) -> None:
        """The group lacks this number of results, and perhaps it has a new ticket."""
        group.num_missing = num_missing
        # The front of its heap may be a leftover, so this may be lower than its rank, never higher.
        lowest = (num_missing, group.tickets.heap[0][0], group.group_id)
        if lowest < group.rank:
            group.rank = lowest
            heapq.heappush(self.order, lowest)
            self._trim()

    def choose(self, waiting: Container[str]) -> str:
        """The ticket that this environment's turn goes to."""
        self.num_grants += 1
        if self.num_grants % OLDEST_EVERY == 0:
            return self.oldest.first(waiting)[1]
        order = self.order
        while True:
            item = order[0]
            group = self.groups.get(item[2])
            if group is None or item != group.rank:
                heapq.heappop(order)
                continue
            seq, ticket_id = group.tickets.first(waiting)
            rank = (group.num_missing, seq, group.group_id)
            if rank == item:
                return ticket_id
            group.rank = rank
            heapq.heapreplace(order, rank)

    def _trim(self) -> None:
        if len(self.order) > 2 * len(self.groups) + 16:
            self.order = sorted(group.rank for group in self.groups.values())


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
        self._places: dict[str, _Group | None] = {}  # of what waits; None where it is urgent
        self._urgent = Waiting()
        self._environments: dict[str, _Environment] = {}
        self._turns: list[tuple[float, str]] = []  # lazy: a virtual time may have grown, an environment may have gone
        self._virtual_time = 0.0  # of the latest turn
        self._leased = LeasedTime()

    def __len__(self) -> int:
        return len(self._places)

    def add(
        self, ticket_id: str, *, env: str, group_id: str, seq: int, urgent: bool = False, num_missing: int = 1
    ) -> None:
        """A ticket begins to wait. `seq`: its age, lowest first. `num_missing`: results that its group lacks now."""
        if urgent:
            self._places[ticket_id] = None
            self._urgent.add(seq, ticket_id)
            return
        environment = self._environment(env)
        if not environment.oldest.num:
            environment.virtual_time = max(environment.virtual_time, self._virtual_time)
            if not environment.queued:
                environment.queued = True
                heapq.heappush(self._turns, (environment.virtual_time, env))
        self._places[ticket_id] = environment.add(ticket_id, group_id, seq, num_missing)

    def discard(self, ticket_id: str) -> None:
        """A ticket waits no more, whether it was taken here or got its end elsewhere."""
        if ticket_id not in self._places:
            return
        group = self._places.pop(ticket_id)
        if group is None:
            self._urgent.remove(self._places)
        else:
            group.environment.remove(group, self._places)

    def set_missing(self, env: str, group_id: str, num_missing: int) -> None:
        """A group lacks another number of results now."""
        environment = self._environments.get(env)
        if environment is not None and (group := environment.groups.get(group_id)) is not None:
            environment.set_missing(group, num_missing)

    def take(self) -> str | None:
        """Take out the ticket that is to be leased now; None where none waits."""
        if self._urgent.num:
            ticket_id = self._urgent.first(self._places)[1]
        elif (environment := self._next_environment()) is not None:
            self._virtual_time = environment.virtual_time
            ticket_id = environment.choose(self._places)
            environment.virtual_time += self._cost(environment)
        else:
            return None
        self.discard(ticket_id)
        return ticket_id

    def _next_environment(self) -> _Environment | None:
        """The one with the lowest virtual time of those where tickets wait."""
        turns = self._turns
        while turns:
            virtual_time, env = turns[0]
            environment = self._environments[env]
            if not environment.oldest.num:
                environment.queued = False
                heapq.heappop(turns)
            elif virtual_time != environment.virtual_time:
                heapq.heapreplace(turns, (environment.virtual_time, env))
            else:
                return environment
        return None

    def lease_began(self, env: str) -> None:
        """A training ticket of this environment was leased."""
        self._environments[env].leased.began(self.now)
        self._leased.began(self.now)

    def lease_ended(self, env: str, num: int = 1) -> None:
        """So many training tickets of this environment are leased no more."""
        self._environments[env].leased.ended(self.now, num)
        self._leased.ended(self.now, num)

    def _environment(self, env: str) -> _Environment:
        environment = self._environments.get(env)
        if environment is None:
            environment = self._environments[env] = _Environment()
        return environment

    def _cost(self, environment: _Environment) -> float:
        """What one of its leases lasts, in mean leases of all; 1 while that is not known."""
        if len(self._environments) == 1:
            return 1.0  # its leases are all leases
        mean_s, overall_s = environment.leased.mean_s(self.now), self._leased.mean_s(self.now)
        if mean_s <= 0.0 or overall_s <= 0.0:
            return 1.0
        return min(max(mean_s / overall_s, 1.0 / self._max_cost_ratio), self._max_cost_ratio)
