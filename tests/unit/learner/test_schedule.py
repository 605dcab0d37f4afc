"""The learning rate of every step."""

from __future__ import annotations

import math

import pytest

from broker.process.learner_settings import LearnerSection
from learner.schedule import scheduled_rate


def rates(**values: object) -> list[float]:
    section = LearnerSection.model_validate({"num_steps": 12, "learning_rate": 1e-3, **values})
    return [scheduled_rate(section, step) for step in range(section.num_steps)]


def test_the_default_rises_over_the_first_steps_and_stays() -> None:
    assert rates(learning_rate_warmup_steps=2) == pytest.approx([1e-3 / 3, 2e-3 / 3, *[1e-3] * 10])


def test_linear_falls_to_its_final_share_after_the_warm_up() -> None:
    found = rates(learning_rate_warmup_steps=2, learning_rate_schedule="linear", learning_rate_final=0.1)
    assert found[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert found[3:] == pytest.approx([1e-3 * (1 - 0.9 * k / 10) for k in range(1, 10)])


def test_cosine_is_half_a_cosine() -> None:
    found = rates(learning_rate_warmup_steps=0, learning_rate_schedule="cosine", learning_rate_final=0.2)
    expected = [1e-3 * (0.2 + 0.8 * (1 + math.cos(math.pi * step / 12)) / 2) for step in range(12)]
    assert found == pytest.approx(expected)
    assert found[0] == 1e-3
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_no_rate_is_negative_nor_above_the_peak(schedule: str) -> None:
    for warmup in (0, 5, 12, 30):
        found = rates(learning_rate_schedule=schedule, learning_rate_warmup_steps=warmup)
        assert all(0 <= rate <= 1e-3 for rate in found)


def test_steps_beyond_the_last_stay_at_the_end() -> None:
    section = LearnerSection(num_steps=4, learning_rate=1e-3, learning_rate_schedule="linear", learning_rate_final=0.5)
    assert scheduled_rate(section, 9) == pytest.approx(5e-4)
