"""Advantages and punishments against a slow transcription of their definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.losses.advantage import Baseline, group_advantages, has_variance, soft_overlong_punishment
from tests.unit.learner import transcriptions

MEMBER = st.tuples(st.one_of(st.floats(-5, 5), st.sampled_from([0.0, 1.0])), st.booleans())


@given(
    members=st.lists(MEMBER, min_size=1, max_size=12),
    baseline=st.sampled_from(["mean", "leave_one_out"]),
    divide_by_std=st.booleans(),
)
def test_advantages_equal_their_transcription(
    members: list[tuple[float, bool]], baseline: Baseline, divide_by_std: bool
) -> None:
    rewards = np.asarray([reward for reward, _ in members])
    counted = np.asarray([count for _, count in members])
    actual = group_advantages(rewards, counted, baseline, divide_by_std=divide_by_std)
    expected = transcriptions.advantages(*zip(*members, strict=True), baseline, divide_by_std=divide_by_std)
    assert actual == pytest.approx(np.asarray(expected), rel=1e-6, abs=1e-6)
    assert float(actual.sum()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("rewards", "counted", "expected"),
    [
        ([1.0, 1.0], [True, True], False),
        ([1.0, 0.0], [True, True], True),
        ([1.0, 0.0], [True, False], False),
        ([1.0, 0.0, 1.0], [True, False, True], False),
        ([0.5], [True], False),
        ([], [], False),
    ],
)
def test_has_variance_looks_at_counted_episodes_only(rewards: list[float], counted: list[bool], expected: bool) -> None:
    assert has_variance(np.asarray(rewards, dtype=float), np.asarray(counted, dtype=bool)) is expected


@given(longest=st.integers(2, 100), data=st.data(), length=st.integers(0, 250))
def test_overlong_punishment_equals_its_transcription(longest: int, data: st.DataObject, length: int) -> None:
    buffer = data.draw(st.integers(1, longest - 1))
    expected = transcriptions.overlong_punishment(length, longest, buffer)
    assert soft_overlong_punishment(length, longest, buffer) == pytest.approx(expected)
