"""Intervals of means: Wilson's against figures from the literature, the normal one, and where there is none."""

from __future__ import annotations

import pytest

from learner.evaluation import Evaluation
from learner.intervals import interval95
from tests.unit.learner.make import make_ticket, make_trajectory


@pytest.mark.parametrize(
    ("passed", "tasks", "low", "high"),
    # R. G. Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval(passed: int, tasks: int, low: float, high: float) -> None:
    found = interval95([1.0] * passed + [0.0] * (tasks - passed))
    assert found == pytest.approx([low, high], abs=5e-5)


def test_other_rewards_have_a_normal_interval() -> None:
    assert interval95([0.25, 0.75]) == pytest.approx([0.5 - 1.959964 * 0.25, 0.5 + 1.959964 * 0.25])
    assert interval95([0.5]) is None
    assert interval95([]) is None


def test_the_results_of_a_task_are_taken_together() -> None:
    evaluation = Evaluation("after", 2, (0, None))
    for number, budget, reward in ((0, 0, 0.0), (0, None, 1.0), (1, 0, 0.0), (1, None, 1.0)):
        ticket = make_ticket(number, budget=budget, env="shop" if number else "code")
        evaluation.add("sampled", number, make_trajectory(ticket, reward, kind=f"kind {number}"))
    assert evaluation.intervals("sampled") == {"": [0.5, 0.5]}  # two tasks of one half each
    assert evaluation.intervals("sampled", "kind") == {"kind 0": None, "kind 1": None}
    assert set(evaluation.intervals("sampled", "env")) == {"code", "shop"}
    assert evaluation.outcomes() == {"code": {"completed": 2}, "shop": {"completed": 2}}
    assert evaluation.intervals("greedy") == {}
