"""Held-out evaluation: collects the results of one phase, means per kind, and the paired bootstrap. No sockets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from broker.protocol.trajectory import Trajectory
from learner.tickets import EvalStyle

STYLES: tuple[EvalStyle, EvalStyle] = ("sampled", "greedy")

_NUM_RESAMPLES = 10_000
_BOOTSTRAP_SEED = 0


class Evaluation:
    """Results of one phase: for each style, task number -> (kind, reward). A dead letter leaves a task without one."""

    def __init__(self, phase: str, num_tasks: int) -> None:
        self.phase = phase
        self.num_tasks = num_tasks
        self._results: dict[str, dict[int, tuple[str, float]]] = {style: {} for style in STYLES}
        self._missing: dict[str, set[int]] = {style: set() for style in STYLES}

    @property
    def complete(self) -> bool:
        """Whether every task of every style has a result or a dead letter."""
        return all(len(self._results[style]) + len(self._missing[style]) >= self.num_tasks for style in STYLES)

    @property
    def num_received(self) -> int:
        """Results so far, of 2 * num_tasks."""
        return sum(len(results) for results in self._results.values())

    def add(self, style: str, number: int, trajectory: Trajectory) -> None:
        """Take a result; the first one of a task counts."""
        head = trajectory.head
        kind = head.kind or head.ticket.task.env
        self._results[style].setdefault(number, (kind, head.reward))

    def add_dead(self, style: str, number: int) -> None:
        """Take note that a task will have no result."""
        self._missing[style].add(number)

    def rewards(self, style: str) -> dict[int, float]:
        """Reward by task number."""
        return {number: reward for number, (_, reward) in self._results[style].items()}

    def mean(self, style: str) -> float | None:
        """Mean reward over the tasks with a result."""
        values = list(self.rewards(style).values())
        return float(np.mean(values)) if values else None

    def mean_by_kind(self, style: str) -> dict[str, float]:
        """Mean reward of each kind of task."""
        by_kind: dict[str, list[float]] = {}
        for kind, reward in self._results[style].values():
            by_kind.setdefault(kind, []).append(reward)
        return {kind: float(np.mean(values)) for kind, values in sorted(by_kind.items())}

    def to_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "num_tasks": self.num_tasks,
            "results": {
                style: {str(number): list(result) for number, result in results.items()}
                for style, results in self._results.items()
            },
            "missing": {style: sorted(numbers) for style, numbers in self._missing.items()},
        }

    @classmethod
    def from_state(cls, phase: str, state: Mapping[str, Any]) -> Evaluation:
        """From the checkpoint."""
        evaluation = cls(phase, int(state["num_tasks"]))
        for style in STYLES:
            results = state["results"][style]
            evaluation._results[style] = {int(n): (str(kind), float(reward)) for n, (kind, reward) in results.items()}
            evaluation._missing[style] = set(state["missing"][style])
        return evaluation


def is_better(candidate: Evaluation, best: Evaluation) -> bool:
    """Whether the candidate's reward at the training temperature is at least the best one's, over the tasks that both
    have: evaluations differ in how many they take, and some tasks are easier than others."""
    new, old = candidate.rewards("sampled"), best.rewards("sampled")
    common = sorted(set(new) & set(old))
    if not common:
        return bool(new)
    return sum(new[task] for task in common) >= sum(old[task] for task in common)


def parse_eval_id(ticket_id: str, run: str) -> tuple[str, str, int]:
    """(phase, style, task number) of an evaluation ticket's id."""
    family, phase, style, number = ticket_id.removeprefix(f"{run}/").split("/")
    if family != "eval" or style not in STYLES:
        raise ValueError(f"{ticket_id!r} is no evaluation ticket of the run {run!r}")
    return phase, style, int(number)


def paired_ci95(start: Mapping[int, float], end: Mapping[int, float]) -> list[float] | None:
    """95 % percentile bootstrap interval of the mean gain over the tasks that have both results; None without any."""
    common = sorted(set(start) & set(end))
    if not common:
        return None
    gains_K = np.asarray([end[task] - start[task] for task in common], dtype=np.float64)
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    means = gains_K[rng.integers(0, len(gains_K), size=(_NUM_RESAMPLES, len(gains_K)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(low), float(high)]
