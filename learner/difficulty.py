"""How hard tasks are for the policy, and which one of an environment comes next. Pure, deterministic, bounded.

A task's solve rate is a running mean of its groups' rewards, each cut to 0..1. Tasks come in order, each once, until a
band of solve rates is asked for: then tasks whose rate lies in it come again, the one that waited longest first, and a
share of the draws goes on in order, so that new ones are found. Groups that always or never succeed have no gradient,
and the bound on what a step can gain is largest half way between (arXiv 2504.03380).

How hard a task is depends on how long the policy may think, so it has a solve rate for each bucket of thinking budgets,
and a group's task is chosen by those of the group's bucket.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from broker.process.learner_settings import CurriculumSection
from broker.process.thinking_settings import UNLIMITED

_PATIENCE_GROUPS = 256  # after so many further groups a task may come again although its group never closed


@dataclass(slots=True)
class Estimate:
    """What is known of a task with budgets of a bucket: its running solve rate, over how many groups, and the group it
    was last given to."""

    rate: float
    num_groups: int
    issued: int
    open: bool = False


class TaskPool:
    """The training tasks of one environment."""

    def __init__(
        self,
        settings: CurriculumSection,
        seed: str,
        num_tasks: int | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._settings = settings
        self._seed = seed
        self._num_tasks = num_tasks
        self._tasks: dict[tuple[int, str], Estimate] = {}  # by index and bucket; the longest unheard of first
        self._next = 0
        if state is not None:
            self._next = int(state["next"])
            for index, rate, num_groups, issued, is_open, *bucket in state["tasks"]:
                estimate = Estimate(float(rate), int(num_groups), int(issued), bool(is_open))
                self._tasks[int(index), str(*bucket) or UNLIMITED] = estimate

    def choose(self, group: int, bucket: str = UNLIMITED) -> int:
        """The task of group number `group`, whose budget is of this bucket. The same one for the same state, seed and
        number."""
        band = self._settings.band
        if band is not None and random.Random(f"{self._seed}/{group}").random() >= self._settings.explore:
            waiting = [
                (estimate.issued, index)
                for (index, known), estimate in self._tasks.items()
                if known == bucket
                and band[0] <= estimate.rate <= band[1]
                and not (estimate.open and group - estimate.issued < _PATIENCE_GROUPS)
            ]
            if waiting:
                return self.take(min(waiting)[1], group, bucket)
        return self.take(self._in_order(), group, bucket)

    def take(self, index: int, group: int, bucket: str = UNLIMITED) -> int:
        """A group of this task is issued."""
        if index == self._in_order():
            self._next += 1
        if (estimate := self._tasks.get((index, bucket))) is not None:
            estimate.issued, estimate.open = group, True
        return index

    def learn(self, index: int, solve_rate: float, group: int, bucket: str = UNLIMITED) -> None:
        """A group of this task is over; 0..1."""
        known = self._tasks.pop((index, bucket), None)
        if known is None:
            self._tasks[index, bucket] = Estimate(solve_rate, 1, group)
        else:
            rate = known.rate + self._settings.smoothing * (solve_rate - known.rate)
            self._tasks[index, bucket] = Estimate(rate, known.num_groups + 1, known.issued)
        if len(self._tasks) > self._settings.memory:
            del self._tasks[self._least_useful()]

    def counts(self) -> dict[str, int]:
        """Remembered tasks, once for each bucket, by how often they are solved."""
        rates = [estimate.rate for estimate in self._tasks.values()]
        never, always = sum(rate <= 0.0 for rate in rates), sum(rate >= 1.0 for rate in rates)
        return {"never": never, "sometimes": len(rates) - never - always, "always": always}

    def to_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        rows = [
            [index, round(e.rate, 6), e.num_groups, e.issued, int(e.open), *([bucket] if bucket != UNLIMITED else [])]
            for (index, bucket), e in self._tasks.items()
        ]
        return {"next": self._next, "tasks": rows}

    def _in_order(self) -> int:
        return self._next if self._num_tasks is None else self._next % self._num_tasks

    def _least_useful(self) -> tuple[int, str]:
        low, high = self._settings.band or (1.0, 0.0)
        outside = (key for key, estimate in self._tasks.items() if not low <= estimate.rate <= high)
        return next(outside, next(iter(self._tasks)))
