"""Held-out evaluation: the results of one phase, means per kind and budget, the paired bootstrap. No sockets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from broker.process.thinking_settings import UNLIMITED, Budget
from broker.protocol.trajectory import Trajectory
from learner.intervals import interval95
from learner.thinking import Result, describe
from learner.tickets import BUDGET_MARK, EvalStyle

STYLES: tuple[EvalStyle, EvalStyle] = ("sampled", "greedy")

_NUM_RESAMPLES = 10_000
_BOOTSTRAP_SEED = 0


class Evaluation:
    """Results of one phase: for each style, task number and budget -> result. A dead letter leaves one without.

    Keyed by numbers throughout: task number times the number of budgets, plus the budget's place among them. So where
    there are no budgets the key is the task's number, and evaluations of different lengths agree on their keys.
    """

    def __init__(self, phase: str, num_tasks: int, budgets: Sequence[Budget] = (None,)) -> None:
        self.phase = phase
        self.num_tasks = num_tasks
        self.budgets = tuple(budgets)
        self._results: dict[str, dict[int, Result]] = {style: {} for style in STYLES}
        self._missing: dict[str, set[int]] = {style: set() for style in STYLES}

    @property
    def has_budgets(self) -> bool:
        """Whether it goes through thinking budgets, so that there is a curve."""
        return self.budgets != (None,)

    @property
    def complete(self) -> bool:
        """Whether every task has a result or a dead letter for every style and budget."""
        wanted = self.num_tasks * len(self.budgets)
        return all(len(self._results[style]) + len(self._missing[style]) >= wanted for style in STYLES)

    @property
    def num_received(self) -> int:
        """Results so far, of 2 * num_tasks for each budget."""
        return sum(len(results) for results in self._results.values())

    def add(self, style: str, number: int, trajectory: Trajectory) -> None:
        """Take a result; the first one of a task and budget counts."""
        self._results[style].setdefault(self._key(number, trajectory.ticket.thinking_budget), Result.of(trajectory))

    def add_dead(self, style: str, number: int, budget: Budget = None) -> None:
        """Take note that a task will have no result."""
        self._missing[style].add(self._key(number, budget))

    def rewards(self, style: str) -> dict[int, float]:
        """Reward by task and budget."""
        return {key: result.reward for key, result in self._results[style].items()}

    def mean(self, style: str) -> float | None:
        """Mean reward over all results."""
        values = list(self.rewards(style).values())
        return float(np.mean(values)) if values else None

    def mean_by_kind(self, style: str) -> dict[str, float]:
        """Mean reward of each kind of task."""
        by_kind: dict[str, list[float]] = {}
        for result in self._results[style].values():
            by_kind.setdefault(result.kind, []).append(result.reward)
        return {kind: float(np.mean(values)) for kind, values in sorted(by_kind.items())}

    def mean_by_env(self, style: str) -> dict[str, float]:
        """Mean reward of each environment; empty for results of a checkpoint that did not keep them."""
        by_env: dict[str, list[float]] = {}
        for result in self._results[style].values():
            if result.env:
                by_env.setdefault(result.env, []).append(result.reward)
        return {env: float(np.mean(values)) for env, values in sorted(by_env.items())}

    def intervals(self, style: str, by: Literal["", "kind", "env"] = "") -> dict[str, list[float] | None]:
        """95 % intervals of the mean reward: of each kind or environment, or, under "", of all results.

        What varies are the tasks: where there are budgets, a task's results are taken together first.
        """
        found: dict[str, dict[int, list[float]]] = {}
        for key, result in self._results[style].items():
            of_task = found.setdefault(str(getattr(result, by)) if by else "", {})
            of_task.setdefault(key // len(self.budgets), []).append(result.reward)
        return {
            name: interval95([sum(rewards) / len(rewards) for rewards in tasks.values()])
            for name, tasks in sorted(found.items())
        }

    def outcomes(self) -> dict[str, dict[str, int]]:
        """How many episodes ended how, by environment, of both styles."""
        found: dict[str, Counter[str]] = {}
        for results in self._results.values():
            for result in results.values():
                if result.outcome:  # not kept by checkpoints of earlier releases
                    found.setdefault(result.env, Counter())[result.outcome] += 1
        return {env: dict(counts) for env, counts in sorted(found.items())}

    def curve(self, style: str) -> list[dict[str, Any]]:
        """What the episodes with each budget did, in the order of the budgets; those without a result are left out."""
        points = []
        for place, budget in enumerate(self.budgets):
            results = [r for key, r in self._results[style].items() if key % len(self.budgets) == place]
            if (thinking := describe(results)) is not None:
                points.append({"budget": UNLIMITED if budget is None else budget, **thinking.to_json()})
        return points

    def to_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "num_tasks": self.num_tasks,
            "budgets": list(self.budgets),
            "results": {
                style: {str(key): list(result) for key, result in results.items()}
                for style, results in self._results.items()
            },
            "missing": {style: sorted(keys) for style, keys in self._missing.items()},
        }

    @classmethod
    def from_state(cls, phase: str, state: Mapping[str, Any]) -> Evaluation:
        """From the checkpoint."""
        evaluation = cls(phase, int(state["num_tasks"]), state.get("budgets", (None,)))
        for style in STYLES:
            evaluation._results[style] = {int(key): Result(*row) for key, row in state["results"][style].items()}
            evaluation._missing[style] = set(state["missing"][style])
        return evaluation

    def _key(self, number: int, budget: Budget) -> int:
        return number * len(self.budgets) + self.budgets.index(budget)


def is_better(candidate: Evaluation, best: Evaluation) -> bool:
    """Whether the candidate's reward at the training temperature is at least the best one's, over the tasks that both
    have: evaluations differ in how many they take, and some tasks are easier than others."""
    new, old = candidate.rewards("sampled"), best.rewards("sampled")
    common = sorted(set(new) & set(old))
    if not common:
        return bool(new)
    return sum(new[task] for task in common) >= sum(old[task] for task in common)


class EvalId(NamedTuple):
    """What the id of an evaluation ticket says."""

    phase: str
    style: str
    number: int
    budget: Budget = None


def parse_eval_id(ticket_id: str, run: str) -> EvalId:
    """What an evaluation ticket's id says; raises ValueError for any other id."""
    match ticket_id.removeprefix(f"{run}/").split("/"):
        case ["eval", phase, style, number] if style in STYLES:
            return EvalId(phase, style, int(number))
        case ["eval", phase, style, budget, number] if style in STYLES and budget.startswith(BUDGET_MARK):
            name = budget.removeprefix(BUDGET_MARK)
            return EvalId(phase, style, int(number), None if name == UNLIMITED else int(name))
    raise ValueError(f"{ticket_id!r} is no evaluation ticket of the run {run!r}")


def paired_ci95(start: Mapping[int, float], end: Mapping[int, float], num_budgets: int = 1) -> list[float] | None:
    """95 % percentile bootstrap interval of the mean gain over the tasks that have both results; None without any.

    The results of a task with several budgets are not independent: what is drawn again are tasks.
    """
    gains: dict[int, list[float]] = {}
    for key in sorted(set(start) & set(end)):
        gains.setdefault(key // num_budgets, []).append(end[key] - start[key])
    if not gains:
        return None
    gains_K = np.asarray([sum(task) / len(task) for task in gains.values()], dtype=np.float64)
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    means = gains_K[rng.integers(0, len(gains_K), size=(_NUM_RESAMPLES, len(gains_K)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(low), float(high)]
