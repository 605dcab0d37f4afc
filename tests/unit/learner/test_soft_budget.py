"""Soft budgets: the cost against a slow transcription, where it enters, and that the price finds its target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.process.loss_settings import LossSection
from broker.process.thinking_settings import SoftSection
from learner.batching import Batcher, Reason, judge
from learner.losses.soft_budget import followed_rate, next_price, overrun_cost, overrun_rate
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
    assert next_price(0.3, 0.9, 0.5, SoftSection()) == 0.3


def test_only_budgets_above_0_have_a_rate() -> None:
    heads = [make_trajectory(make_ticket(budget=b), thinking=(9, 1, 0)).head for b in (None, 0)]
    assert overrun_rate(heads) is None
    assert next_price(0.3, None, 0.5, SOFT) == 0.3
    kept = make_trajectory(make_ticket(budget=9), thinking=(9, 0, 0)).head
    over = make_trajectory(make_ticket(budget=8), thinking=(9, 1, 0)).head
    assert overrun_rate([*heads, kept, over]) == 0.5


shares = st.floats(0, 1)


@given(st.floats(0.1, 1), shares, st.none() | shares, st.floats(0, 0.99))
def test_the_price_moves_as_its_formula_says(price: float, rate: float, before: float | None, target: float) -> None:
    moved = next_price(price, rate, before, SoftSection(overrun_rate=target, price_bounds=(0.1, 1.0)))
    change = 0.5 * (rate - target) + 3.0 * (rate - (rate if before is None else before))
    assert moved == pytest.approx(min(1.0, max(0.1, price * math.exp(change))))
    # A share that stays where it is moves the price towards the target's side alone.
    stays = next_price(price, rate, rate, SoftSection(overrun_rate=target, price_bounds=(0.1, 1.0)))
    assert (stays - price) * (rate - target) >= 0


@pytest.mark.parametrize("target", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("taste", [-0.5, 1.0, 3.0])
def test_the_share_of_overruns_comes_to_its_target_and_stays(target: float, taste: float) -> None:
    """A policy that thinks too long with a probability that falls with the price, slowly (it has to learn): the share
    comes to the target where a price within its bounds brings it there, and the price does not swing."""
    rng = np.random.default_rng(0)
    soft = SoftSection(overrun_rate=target)
    price, believed, followed, shares, prices = soft.price, soft.price, None, [], []
    for _ in range(1500):
        believed += 0.2 * (price - believed)  # what the policy has learnt of it so far
        probability = 1 / (1 + math.exp(-(taste - 4.0 * believed)))
        share = rng.binomial(64, probability) / 64
        before, followed = followed, followed_rate(share, followed, soft)
        price = next_price(price, followed, before, soft)
        shares.append(share)
        prices.append(price)
    assert np.mean(shares[750:]) == pytest.approx(target, abs=0.02)
    assert np.std(np.log(prices[750:])) < 0.3
    assert soft.price_bounds[0] < np.mean(prices[750:]) < soft.price_bounds[1]


class Thinker:
    """A scripted policy that learns how long to think, relative to its budget, by policy gradient with Adam's steps.

    It thinks exp(log_length + need + 0.3 z) budgets, z normal, need by chance for each group, and is stopped at two.
    Thinking longer makes a right answer likelier, so that without a price it learns to think on. 4 groups of 8 episodes
    a step, as in a small run.
    """

    def __init__(self, seed: int, spread: float, step: float) -> None:
        self.rng, self.spread, self.step = np.random.default_rng(seed), spread, step
        self.log_length, self.taken, self.moment, self.square = 0.3, 0, 0.0, 0.0

    def learn(self, price: float) -> float:
        """One step under this price; the share of overruns among its episodes."""
        z, need = self.rng.normal(size=(4, 8)), self.spread * self.rng.normal(size=(4, 1))
        length = np.minimum(np.exp(self.log_length + need + 0.3 * z), 2.0)
        chance = 1 / (1 + np.exp(-4 * (np.log(length) - self.rng.normal(-0.3, 0.3, size=(4, 1)))))
        rewards = (self.rng.random(z.shape) < chance).astype(float)
        priced = [
            soft_budget_rewards([(reward, 1000, round(1000 * n)) for reward, n in zip(*group, strict=True)], price)
            for group in zip(rewards, length, strict=True)
        ]
        advantage = np.asarray(priced) - np.mean(priced, axis=1, keepdims=True)
        gradient = float(np.mean(advantage * z / 0.3))
        self.taken += 1
        self.moment += 0.1 * (gradient - self.moment)
        self.square += 0.05 * (gradient**2 - self.square)
        size = math.sqrt(self.square / (1 - 0.95**self.taken))
        self.log_length += self.step * self.moment / (1 - 0.9**self.taken) / size
        return float(np.mean(length > 1))


Rule = Callable[[float, float], float]


def controlled() -> Rule:
    """The learner's rule, with what it remembers between two steps."""
    seen: list[float | None] = [None]

    def rule(price: float, share: float) -> float:
        before, seen[0] = seen[0], followed_rate(share, seen[0], SOFT)
        return next_price(price, seen[0], before, SOFT)

    return rule


def linear() -> Rule:
    """The rule that was: from 0.1, a fifth of the error a step."""
    return lambda price, share: min(10.0, max(0.0, price + 0.2 * (share - 0.1)))


def follow(rule: Callable[[], Rule], price: float, spread: float, step: float) -> tuple[Any, Any]:
    """Mean share of overruns by step over 16 policies, and their prices."""
    shares, prices = [], []
    for seed in range(16):
        thinker, at, of = Thinker(seed, spread, step), price, rule()
        seen, paid = [], []
        for _ in range(40):
            paid.append(at)
            seen.append(thinker.learn(at))
            at = of(at, seen[-1])
        shares.append(seen)
        prices.append(paid)
    return np.mean(shares, axis=0), np.asarray(prices)


@pytest.mark.parametrize("spread", [0.25, 0.5])
def test_a_policy_that_learns_comes_to_its_target_within_some_ten_steps(spread: float) -> None:
    """Also where a step's groups are all hard, or none; the rule that was has hardly begun by then."""
    shares, prices = follow(controlled, SOFT.price, spread, 0.1)
    before, _ = follow(linear, 0.1, spread, 0.1)
    assert min(shares[:2]) > 0.6
    assert np.mean(shares[10:16]) < 0.22 < 0.4 < np.mean(before[10:16])
    assert 0.03 < np.mean(shares[16:]) < 0.2  # and does not forget to think
    assert np.mean(np.abs(np.diff(np.log(prices), axis=1))) < 0.2  # nor does the price follow chance


def test_a_slow_policy_is_as_fast_as_it_can_learn() -> None:
    """At half the step size no price is faster: one that stands at its bound takes as long."""
    shares, _ = follow(controlled, SOFT.price, 0.25, 0.05)
    at_bound, _ = follow(lambda: lambda price, _: price, SOFT.price_bounds[1], 0.25, 0.05)
    for limit in (0.5, 0.2):
        assert np.argmax(shares < limit) <= np.argmax(at_bound < limit) + 2


def test_a_policy_that_never_overruns_is_priced_at_the_lower_bound_in_the_end() -> None:
    price = SOFT.price
    for _ in range(200):
        price = next_price(price, 0.0, 0.0, SOFT)
    assert price == SOFT.price_bounds[0]


def test_a_price_at_its_bound_gives_way_at_once_when_overruns_fall() -> None:
    high = SOFT.price_bounds[1]
    assert next_price(high, 0.9, 0.9, SOFT) == high
    assert next_price(high, 0.7, 0.9, SOFT) < 0.8 * high


def test_the_followed_share_is_a_mean_over_the_steps() -> None:
    assert followed_rate(None, None, SOFT) is None
    assert followed_rate(0.5, None, SOFT) == 0.5
    assert followed_rate(None, 0.5, SOFT) == 0.5
    assert followed_rate(1.0, 0.5, SOFT) == pytest.approx(0.7 * 0.5 + 0.3 * 1.0)
    assert followed_rate(1.0, 0.5, SoftSection(overrun_rate=0.1, price_memory=0)) == 1.0
