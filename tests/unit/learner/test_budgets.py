"""The draw of budgets: a function of seed and number, of the asked-for distribution over any stretch of groups."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from broker.process.thinking_settings import BudgetsSection
from learner.budgets import draw_budget

SEEDS = st.integers(0, 2**31 - 1)
LARGEST_GAP = 6  # groups by which a share of any stretch may differ from what it should be


@st.composite
def sections(draw: st.DrawFn) -> BudgetsSection:
    zero = draw(st.sampled_from([0.0, 0.1, 0.25]))
    unlimited = draw(st.sampled_from([0.0, 0.2, 0.5]))
    if draw(st.booleans()):
        low = draw(st.integers(1, 100))
        return BudgetsSection(zero=zero, unlimited=unlimited, between=(low, low + draw(st.integers(0, 1000))))
    budgets = draw(st.lists(st.integers(1, 500), min_size=1, max_size=4, unique=True))
    return BudgetsSection(
        zero=zero, unlimited=unlimited, choices=tuple((b, draw(st.sampled_from([0.5, 1.0, 3.0]))) for b in budgets)
    )


@given(sections(), SEEDS, st.integers(0, 1 << 40))
def test_the_draw_depends_on_nothing_but_seed_and_number(section: BudgetsSection, seed: int, first: int) -> None:
    forwards = [draw_budget(section, seed, "train", first + k) for k in range(20)]
    backwards = [draw_budget(section, seed, "train", first + k) for k in reversed(range(20))]
    assert forwards == backwards[::-1]


@given(sections(), SEEDS, st.integers(0, 1 << 40), st.integers(1, 400))
def test_every_stretch_of_groups_has_its_shares(section: BudgetsSection, seed: int, first: int, length: int) -> None:
    drawn = Counter(draw_budget(section, seed, "train", first + k) for k in range(length))
    bounded = {budget: count for budget, count in drawn.items() if budget}
    assert abs(drawn[0] - section.zero * length) <= LARGEST_GAP
    assert abs(drawn[None] - section.unlimited * length) <= LARGEST_GAP
    if section.choices:
        total = sum(weight for _, weight in section.choices)
        for budget, weight in section.choices:
            assert abs(bounded.get(budget, 0) - section.bounded * length * weight / total) <= LARGEST_GAP
        assert bounded.keys() <= {budget for budget, _ in section.choices}
    elif section.between is not None:
        low, high = section.between
        assert all(low <= budget <= high for budget in bounded)
        middle = math.isqrt(low * high)
        below = sum(count for budget, count in bounded.items() if budget <= middle)
        share = math.log((middle + 1) / low) / math.log((high + 1) / low)
        assert abs(below - section.bounded * length * share) <= LARGEST_GAP


def test_seeds_and_families_differ() -> None:
    section = BudgetsSection(unlimited=0.0, between=(1, 100_000))
    series = [[draw_budget(section, seed, family, k) for k in range(20)] for seed in (0, 1) for family in ("a", "b")]
    assert len({tuple(draws) for draws in series}) == 4


def test_without_budgets_all_are_unlimited() -> None:
    assert {draw_budget(BudgetsSection(), 0, "train", k) for k in range(1000)} == {None}
    assert {draw_budget(BudgetsSection(zero=1.0, unlimited=0.0), 0, "train", k) for k in range(1000)} == {0}
