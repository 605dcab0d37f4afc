"""[thinking] and eval.budgets: off by default, what contradicts itself is refused, buckets are bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.process.config import load_settings, save_settings
from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from broker.process.thinking_settings import BUDGET_BUCKETS, ThinkingSection, budget_bucket

ROOM = "sampling.max_turn_tokens=300"


def load(*overrides: str) -> Settings:
    return load_settings(None, [ROOM, "sampling.max_episode_tokens=900", *overrides], {})


def test_nothing_is_budgeted_by_default() -> None:
    settings = Settings()
    assert (settings.thinking.budgets.unlimited, settings.thinking.budgets.largest) == (1.0, 0)
    assert settings.thinking.soft.overrun_rate is None
    assert settings.eval.token_budgets == (None,)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["thinking.budgets.zero=0.5"], "zero + unlimited = 1.5; shares of the groups add up to 1 at most"),
        (["thinking.budgets.unlimited=0.5"], "say what the other groups have with between or choices"),
        (["thinking.budgets.between=[1, 2]"], "lower unlimited"),
        (["thinking.budgets.unlimited=0", "thinking.budgets.between=[9, 2]"], "the smaller budget comes first"),
        (
            ["thinking.budgets.unlimited=0", "thinking.budgets.between=[1, 2]", "thinking.budgets.choices=[[1, 1.0]]"],
            "remove one of them",
        ),
        (["thinking.budgets.unlimited=0", "thinking.budgets.choices=[[0, 1.0]]"], "greater than or equal to 1"),
        (["thinking.budgets.unlimited=0", "thinking.budgets.choices=[[300, 1.0]]"], "raise sampling.max_turn_tokens"),
        (
            [
                "thinking.budgets.unlimited=0",
                "thinking.budgets.between=[1, 200]",
                "thinking.soft.overrun_rate=0.1",
            ],
            "200 tokens per turn, which may become 400, but sampling.max_turn_tokens = 300",
        ),
        (["thinking.per=episode", "eval.budgets=[0, 900]"], "eval.budgets has 900 tokens per episode"),
        (["eval.budgets=[16, 16]"], "name each budget once"),
        (["eval.budgets=[-1]"], "eval.budgets.0"),
        (['thinking.tags=["<a>", "<a>"]'], "two texts, neither of which is part of the other"),
        (['thinking.stop_phrase="</think>"'], "contains a tag"),
        (["thinking.soft.price=20"], "it must lie between them, and both above 0"),
        (["thinking.soft.price_bounds=[0, 1]"], "it must lie between them, and both above 0"),
        (["thinking.soft.limit=1"], "greater than 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_remedy(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ErgonError) as caught:
        load(*overrides)
    assert sentence in str(caught.value)


def test_a_budget_of_an_episode_may_be_more_than_a_turn_takes() -> None:
    assert load("thinking.per=episode", "eval.budgets=[0, 600]").eval.token_budgets == (0, 600)


def test_evaluation_budgets_are_in_order_and_survive_the_file(tmp_path: Path) -> None:
    drawn = ["thinking.budgets.unlimited=0.2", "thinking.budgets.choices=[[16, 1], [64, 2.5]]"]
    settings = load('eval.budgets=["unlimited", 64, 0]', *drawn)
    assert settings.eval.token_budgets == (0, 64, None)
    save_settings(settings, tmp_path / "run.toml")
    assert load_settings(tmp_path / "run.toml", (), {}) == settings


def test_only_a_soft_budget_may_be_overrun() -> None:
    soft = ThinkingSection.model_validate({"soft": {"overrun_rate": 0.1, "limit": 1.5}})
    assert [ThinkingSection().limit(budget) for budget in (None, 0, 7)] == [None, 0, 7]
    assert [soft.limit(budget) for budget in (None, 0, 7)] == [None, 0, 10]


@given(st.integers(0, 10_000))
def test_every_budget_has_one_bucket_which_says_what_is_in_it(budget: int) -> None:
    bucket = budget_bucket(budget)
    assert bucket in BUDGET_BUCKETS
    low, _, high = bucket.rstrip("+").partition("-")
    assert int(low) <= budget
    assert bucket.endswith("+") or budget <= int(high or low)


def test_no_budget_is_a_bucket_of_its_own() -> None:
    assert budget_bucket(None) == BUDGET_BUCKETS[-1] == "unlimited"
