"""Soft thinking budgets: what thinking beyond the budget costs, and how its price is adapted. Pure functions.

A group's budget b is drawn before its episodes and told to the policy. What the advantage sees of an episode is then
R = r_task - price * max(0, (n - b) / b), n being the tokens that the policy thought.

From L1 (LCPO, arXiv 2503.04697): the budget is drawn for each prompt and told in it, and one policy learns all budgets
from a reward that falls linearly with the deviation. Not taken: its fixed factor, and that it punishes thinking too
little (LCPO-Exact) or multiplies the reward (LCPO-Max); here only the overrun costs, relative to the budget, so that a
price means the same for budgets of 16 and of 16,000 tokens.

From AnytimeReasoner (BRPO, arXiv 2505.13438): budgets come from a prior distribution, thinking that is not finished is
cut and answered as it stands, and rewards are compared with others under the same budget: a group has one budget, so
its baseline is relative to it. Not taken: several cuts of one thinking with a reward each, and a policy of its own for
the answers.

The price is the Lagrange multiplier of the constraint P(n > b) <= epsilon, as in reward-constrained policy
optimisation (arXiv 1805.11074), and moves by dual ascent. Plain ascent misses its target in a run of tens of steps:
from a small price it needs as many steps as the policy has, and what it has built up by then goes on pushing long
after the policy has turned. So two things are taken from elsewhere. The step is multiplicative, as in exponentiated
gradient (Kivinen, Warmuth 1997): a price that is a hundred times too small is found as fast as one that is twice too
small. And it has a proportional part beside the integral one, as Lagrangian controllers have (Stooke, Achiam, Abbeel,
arXiv 2007.03964): a policy learns from a price, it does not obey it, so its overruns lag, and the proportional part
takes the price back while they fall instead of when they have fallen. Both act on the price's logarithm in velocity
form, so that a price at its bound winds up nothing. What is followed is a mean over some steps, as there: the few
groups of one step have what budgets they have, and a step of hard tasks with small budgets overruns all of them.

Under a strict budget n never exceeds b and there is nothing to learn from; so a soft budget lets thinking go on up to
a multiple of b (`thinking.soft.limit`), where it is stopped all the same. Siblings that overrun alike cost alike, and
their baseline takes that away: a policy learns to keep its budget from those that do. So demonstrations keep it by
themselves (actors/script.py). The cost of an episode is therefore at most price * (limit - 1), for each turn where
the budget is of a turn. A budget of 0 has no multiple and is kept strictly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from broker.process.thinking_settings import SoftSection
from broker.protocol.trajectory import TrajectoryHead


def overrun_cost(head: TrajectoryHead, price: float) -> float:
    """What is subtracted from the episode's reward: price * max(0, (n - b) / b); 0 without a budget above 0."""
    budget = head.ticket.thinking_budget
    return price * head.num_overrun_tokens / budget if budget else 0.0


def overrun_rate(heads: Iterable[TrajectoryHead]) -> float | None:
    """Share of the episodes with a budget above 0 that thought beyond it; None where there is none."""
    over = [head.num_overrun_tokens > 0 for head in heads if head.ticket.thinking_budget]
    return sum(over) / len(over) if over else None


def followed_rate(rate: float | None, before: float | None, settings: SoftSection) -> float | None:
    """The share of overruns that the price follows, after a step with a share of `rate`: its mean over the steps, those
    before weighted down by price_memory for every step. before: what it was until now; None where there was none."""
    if rate is None or before is None:
        return before if rate is None else rate
    return settings.price_memory * before + (1 - settings.price_memory) * rate


def next_price(price: float, rate: float | None, before: float | None, settings: SoftSection) -> float:
    """The price after a step in which the followed share of overruns has come from `before` to `rate`:
    price * exp(price_rate * (rate - epsilon) + price_gain * (rate - before)), within price_bounds.

    Without a rate the price stays as it is; without one before it, the second term is 0.
    """
    if rate is None or settings.overrun_rate is None:
        return price
    low, high = settings.price_bounds
    turned = 0.0 if before is None else settings.price_gain * (rate - before)
    moved = price * math.exp(settings.price_rate * (rate - settings.overrun_rate) + turned)
    return min(high, max(low, moved))
