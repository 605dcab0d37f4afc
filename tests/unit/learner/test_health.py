"""Alarms begin and end once, with hysteresis; a guard refuses what nothing can be learnt from."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from broker.process.learner_settings import AlarmsSection
from learner.health import KINDS, Alarms, Edge, Guard

GOOD = {"ess": 0.9, "grad_norm": 1.0, "mismatch_kl": 0.001, "entropy": 2.0}


def run(alarms: Alarms, steps: list[dict[str, float]], reward: float = 0.5) -> list[tuple[int, str, bool]]:
    return [(i, edge.kind, edge.begins) for i, step in enumerate(steps) for edge in alarms.observe(GOOD | step, reward)]


@pytest.mark.parametrize(
    ("kind", "bad", "border"),
    [
        ("effective_sample_size", {"ess": 0.1}, {"ess": 0.32}),
        ("mismatch_kl", {"mismatch_kl": 0.5}, {"mismatch_kl": 0.09}),
        ("grad_norm", {"grad_norm": 50.0}, {"grad_norm": 4.5}),
        ("entropy", {"entropy": 0.1}, {"entropy": 0.21}),
    ],
)
def test_an_alarm_begins_after_two_steps_and_ends_well_within(
    kind: str, bad: dict[str, float], border: dict[str, float]
) -> None:
    alarms = Alarms(AlarmsSection())
    assert run(alarms, [{}] * 12) == []
    assert run(alarms, [bad, {}, bad]) == []  # never two in a row
    assert run(alarms, [bad, bad]) == [(0, kind, True)]
    assert alarms.raised[kind]
    assert run(alarms, [border] * 5) == []  # within the threshold, but only just
    assert run(alarms, [{}, border, {}]) == []
    assert run(alarms, [{}, {}]) == [(0, kind, False)]
    assert not any(alarms.raised.values())


def test_a_slow_rise_of_the_gradient_norm_is_no_spike() -> None:
    alarms = Alarms(AlarmsSection())
    assert run(alarms, [{"grad_norm": 1.03**i} for i in range(200)]) == []


def test_a_falling_reward_alarms_and_a_negative_one_does_not() -> None:
    alarms = Alarms(AlarmsSection())
    for _ in range(20):
        assert alarms.observe(GOOD, 0.8) == []
    edges = [edge for _ in range(20) for edge in alarms.observe(GOOD, 0.0)]
    assert [(edge.kind, edge.begins) for edge in edges] == [("reward", True)]
    assert edges[0].value < edges[0].threshold == pytest.approx(0.4)
    negative = Alarms(AlarmsSection())
    assert [edge for reward in (-1.0, -5.0, -9.0) * 5 for edge in negative.observe(GOOD, reward)] == []


def test_a_refused_batch_alarms_until_the_next_step() -> None:
    alarms = Alarms(AlarmsSection())
    assert alarms.refused(False) == []
    assert alarms.refused(True) == [Edge("refused", True, 1.0, 1.0)]
    assert alarms.refused(True) == []
    assert alarms.raised == dict.fromkeys(KINDS, False) | {"refused": True}
    assert alarms.refused(False) == [Edge("refused", False, 0.0, 1.0)]


def test_a_step_that_was_not_taken_has_no_numbers() -> None:
    alarms = Alarms(AlarmsSection())
    assert alarms.observe(None, 0.5) == []


def test_alarms_go_on_after_a_resume() -> None:
    steps: list[dict[str, float]] = [{"grad_norm": 1.0 + i % 3} for i in range(20)] + [{"grad_norm": 90.0, "ess": 0.1}]
    whole, half = Alarms(AlarmsSection()), Alarms(AlarmsSection())
    run(whole, steps)
    run(half, steps)
    resumed = Alarms(AlarmsSection(), json.loads(json.dumps(half.to_state())))
    last: list[dict[str, float]] = [{"grad_norm": 90.0, "ess": 0.1}]
    assert run(resumed, last) == run(whole, last) == [(0, "effective_sample_size", True), (0, "grad_norm", True)]
    assert resumed.to_state() == whole.to_state()


@pytest.mark.parametrize(
    ("means", "refuses"),
    [
        ({"ratio": 1.0, "ratio_squared": 1.01}, ""),
        ({"ratio": 0.01, "ratio_squared": 1.0}, "effective sample size"),
        ({"ratio": 1.0, "ratio_squared": 1.0, "loss_masked_fraction": 0.995}, "the loss masks 0.995"),
        ({"ratio": 1.0, "ratio_squared": 1.0, "loss_masked_fraction": 0.5}, ""),
        ({"nll": 3.0}, ""),  # a supervised batch has no ratios
    ],
)
def test_the_guard(means: dict[str, Any], refuses: str) -> None:
    guard = pickle.loads(pickle.dumps(Guard(0.01, 0.99)))
    verdict = guard(means)
    assert (verdict is None) if not refuses else refuses in verdict
