"""Advantages against a slow transcription of their definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.losses.advantage import Baseline, group_advantages, has_variance

MEMBER = st.tuples(st.floats(-5, 5), st.booleans())


@given(members=st.lists(MEMBER, min_size=1, max_size=12), baseline=st.sampled_from(["mean", "leave_one_out"]))
def test_advantages_equal_their_transcription(members: list[tuple[float, bool]], baseline: Baseline) -> None:
    rewards = np.asarray([reward for reward, _ in members])
    counted = np.asarray([count for _, count in members])
    expected = []
    for i, (reward, count) in enumerate(members):
        others = [r for j, (r, c) in enumerate(members) if c and (baseline == "mean" or j != i)]
        alone = sum(c for _, c in members) < 2
        expected.append(0.0 if not count or alone else reward - sum(others) / len(others))
    assert group_advantages(rewards, counted, baseline) == pytest.approx(np.asarray(expected), abs=1e-9)


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
