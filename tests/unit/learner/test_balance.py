"""Shares of equal work."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.training.balance import balanced, imbalance

COSTS = st.lists(st.integers(0, 5000), max_size=60)


@given(COSTS, st.integers(1, 9))
def test_every_item_is_in_exactly_one_share(costs: list[int], num_shares: int) -> None:
    shares = balanced(costs, num_shares)
    assert len(shares) == num_shares
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    assert balanced(costs, num_shares) == shares


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_the_largest_share_is_within_grahams_bound_of_the_best(costs: list[int], num_shares: int) -> None:
    best = min(
        max(sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == n) for n in range(num_shares))
        for owners in itertools.product(range(num_shares), repeat=len(costs))
    )
    largest = max(sum(costs[item] for item in share) for share in balanced(costs, num_shares))
    assert largest <= best * (4 / 3 - 1 / (3 * num_shares)) + 1e-9


def test_heavy_tails_are_spread() -> None:
    costs = [2000, 1200, 900, 700, 300, 280, 240, 200, 180, 100, 60, 40]
    assert imbalance(costs, balanced(costs, 2)) < 1.02
    assert imbalance(costs, [list(range(6)), list(range(6, 12))]) > 1.7  # as they came


def test_more_shares_than_items() -> None:
    assert sorted(balanced([5, 7], 4)) == [[], [], [0], [1]]


def test_items_that_cost_nothing_are_spread_too() -> None:
    assert sorted(len(share) for share in balanced([0] * 8, 4)) == [2, 2, 2, 2]


@pytest.mark.parametrize(("costs", "num_shares"), [([1], 0), ([-1, 3], 2)])
def test_nonsense_is_refused(costs: list[int], num_shares: int) -> None:
    with pytest.raises(ValueError, match=r"shares; there must|costs must not"):
        balanced(costs, num_shares)


def test_no_work_is_perfectly_balanced() -> None:
    assert imbalance([], balanced([], 3)) == 1.0
