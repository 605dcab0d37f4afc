"""Soft budgets: the cost against a slow transcription, where it enters, and that the price finds its target."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.process.loss_settings import LossSection
from broker.process.thinking_settings import SoftSection
from learner.batching import Batcher, Reason, judge
from learner.losses.soft_budget import next_price, overrun_cost, overrun_rate
from tests.unit.learner.make import make_ticket, make_trajectory
from tests.unit.learner.transcriptions import soft_budget_rewards

SOFT = SoftSection(overrun_rate=0.1)


@given(
    st.lists(
        st.tuples(st.floats(-2, 2), st.one_of(st.none(), st.integers(0, 50)), st.integers(0, 100)),
        min_size=1,
        max_size=8,
    ),
    st.floats(0, 3),
)
def test_rewards_equal_their_transcription(episodes: list[tuple[float, int | None, int]], price: float) -> None:
    trajectories = []
    for i, (reward, budget, thought) in enumerate(episodes):
        over = 0 if not budget else max(0, thought - budget)  # a budget of 0 is kept strictly
        ticket = make_ticket(0, i, len(episodes), budget=budget)
        trajectories.append(make_trajectory(ticket, reward, thinking=(thought, over, 0)))
    rewards_G, _, _ = judge(trajectories, LossSection(), price)
    assert rewards_G.tolist() == pytest.approx(soft_budget_rewards(episodes, price))


def test_a_group_that_solves_its_task_can_still_learn_to_think_less() -> None:
    batcher = Batcher(groups_per_step=1, max_groups_per_step=1, group_size=2, max_staleness=8, loss=LossSection())
    batcher.overrun_price = 0.5
    for member, thinking in enumerate([(4, 0, 0), (12, 4, 0)]):
        batcher.add(make_trajectory(make_ticket(0, member, budget=8), 1.0, thinking=thinking))
    batch = batcher.next(0)
    assert batch is not None
    assert batch.overrun_price == 0.5
    assert [item.reason for item in batch.consumed] == [Reason.TRAINED] * 2
    assert [s.advantage for s in batch.sequences] == pytest.approx([0.125, -0.125])


def test_groups_with_and_without_thinking_are_compared_only_among_themselves() -> None:
    """The hybrid of thinking and instruct: one batch, budgets of 0 and unlimited, a baseline for each group."""
    batcher = Batcher(groups_per_step=2, max_groups_per_step=2, group_size=2, max_staleness=8, loss=LossSection())
    for group, (budget, rewards) in enumerate([(0, (0.0, 0.2)), (None, (0.8, 1.0))]):
        for member, reward in enumerate(rewards):
            batcher.add(make_trajectory(make_ticket(group, member, budget=budget), reward))
    batch = batcher.next(0)
    assert batch is not None
    assert [s.advantage for s in batch.sequences] == pytest.approx([-0.1, 0.1, -0.1, 0.1])


def test_without_a_price_nothing_changes() -> None:
    head = make_trajectory(make_ticket(budget=4), 1.0, thinking=(8, 4, 1)).head
    assert overrun_cost(head, 0.0) == 0.0
    assert next_price(0.3, 0.9, SoftSection()) == 0.3


def test_only_budgets_above_0_have_a_rate() -> None:
    heads = [make_trajectory(make_ticket(budget=b), thinking=(9, 1, 0)).head for b in (None, 0)]
    assert overrun_rate(heads) is None
    assert next_price(0.3, None, SOFT) == 0.3
    kept = make_trajectory(make_ticket(budget=9), thinking=(9, 0, 0)).head
    over = make_trajectory(make_ticket(budget=8), thinking=(9, 1, 0)).head
    assert overrun_rate([*heads, kept, over]) == 0.5


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.99))
def test_the_price_rises_above_the_target_and_falls_below_it(price: float, rate: float, target: float) -> None:
    moved = next_price(price, rate, SoftSection(overrun_rate=target, price_bounds=(0.0, 1.0)))
    assert 0.0 <= moved <= 1.0
    assert (moved - price) * (rate - target) >= 0
    assert moved == pytest.approx(min(1.0, max(0.0, price + 0.2 * (rate - target))))


@pytest.mark.parametrize("target", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("taste", [-0.5, 1.0, 3.0])
def test_the_share_of_overruns_comes_to_its_target(target: float, taste: float) -> None:
    """A policy that thinks too long with a probability that falls with the price, slowly (it has to learn): the share
    comes to the target where a price within its bounds brings it there, and the price does not swing."""
    rng = np.random.default_rng(0)
    soft = SoftSection(overrun_rate=target)
    price, believed, shares, prices = soft.price, soft.price, [], []
    for _ in range(1500):
        believed += 0.2 * (price - believed)  # what the policy has learnt of it so far
        probability = 1 / (1 + math.exp(-(taste - 8.0 * believed)))
        share = rng.binomial(64, probability) / 64
        price = next_price(price, share, soft)
        shares.append(share)
        prices.append(price)
    assert np.mean(shares[750:]) == pytest.approx(target, abs=0.02)
    assert np.std(prices[750:]) < 0.06
    assert 0.0 < np.mean(prices[750:]) < 1.0


def test_a_policy_that_never_overruns_pays_nothing_in_the_end() -> None:
    price = SOFT.price
    for _ in range(20):
        price = next_price(price, 0.0, SOFT)
    assert price == SOFT.price_bounds[0]
