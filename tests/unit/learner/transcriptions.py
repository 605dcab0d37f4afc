"""The losses' formulas, written out slowly: one token at a time, in Python's own floats, without torch.

Every function has the log-probs twice: `live`, which a derivative is taken by, and `fixed`, the same numbers behind a
stop-gradient. So the value is f(x, x), and the gradient at x is the finite difference of f(., x). `fixed` also decides
masks and clips, which have no derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from broker.process.loss_settings import LossSection


class Token(NamedTuple):
    """One trained token: its log-prob under behaviour, proximal and reference policy, and its factors."""

    behaviour: float
    proximal: float
    reference: float
    advantage: float
    entropy: float
    sequence: int
    weight: float


class Transcribed(NamedTuple):
    """The loss, and which tokens are masked and clipped."""

    loss: float
    masked_window: list[bool]
    masked_guard: list[bool]
    not_finite: list[bool]
    clipped: list[bool]


def bounded(log_ratio: float) -> float:
    """Log-ratios beyond 20 are taken for 20."""
    return min(max(log_ratio, -20.0), 20.0)


def clip(value: float, low: float, high: float) -> float:
    """The value, or the nearer bound."""
    return min(max(value, low), high)


def objective(tokens: Sequence[Token], live: Sequence[float], fixed: Sequence[float], s: LossSection) -> Transcribed:
    """Sum over tokens of weight * keep * (-surrogate + penalties)."""
    finite = [math.isfinite(token.behaviour) for token in tokens]
    tokens = [
        token if known else token._replace(behaviour=at) for token, known, at in zip(tokens, finite, fixed, strict=True)
    ]
    loss, window, guard, clips = 0.0, [], [], []
    for i, token in enumerate(tokens):
        window.append("window" in s.corrections and not _inside(_weight(token, fixed[i], s), s.token_window))
        guard.append("guard" in s.corrections and not _inside(_geometric(tokens, i, fixed, s), s.sequence_guard))
        value, clipped = surrogate(tokens, i, live, fixed, s)
        clips.append(clipped and finite[i] and not window[i] and not guard[i])
        if not finite[i] or window[i] or guard[i]:
            continue
        weight = token.weight / (s.constant_tokens if s.aggregation == "constant" else 1)
        loss += weight * (-value + penalties(token, live[i], fixed[i], s))
    return Transcribed(loss, window, guard, [not known for known in finite], clips)


def _weight(token: Token, fixed: float, s: LossSection) -> float:
    """What importance correction looks at: pi / mu; with a proximal policy rho, rho / mu."""
    return math.exp(bounded((token.proximal if s.kind == "decoupled" else fixed) - token.behaviour))


def _geometric(tokens: Sequence[Token], i: int, fixed: Sequence[float], s: LossSection) -> float:
    """(product of the weights over the token's sequence) ^ (1 / its length)."""
    logs = [
        math.log(_weight(token, at, s))
        for token, at in zip(tokens, fixed, strict=True)
        if token.sequence == tokens[i].sequence
    ]
    return math.exp(sum(logs) / len(logs))


def _inside(value: float, interval: tuple[float, float]) -> bool:
    return interval[0] <= value <= interval[1]


def surrogate(
    tokens: Sequence[Token], i: int, live: Sequence[float], fixed: Sequence[float], s: LossSection
) -> tuple[float, bool]:
    """What a token adds to the objective, and whether the trust region takes its gradient away."""
    token, cap = tokens[i], s.importance_cap if "truncated" in s.corrections else math.inf
    A, mu = token.advantage, token.behaviour
    r, r_fixed = math.exp(bounded(live[i] - mu)), math.exp(bounded(fixed[i] - mu))
    match s.kind:
        case "grpo":  # min(w A, clip(r) A), w = min(r, C) with gradient min(r, C) grad log pi
            bound = clip(r_fixed, 1 - s.clip_low, 1 + s.clip_high) * A
            if bound < min(r_fixed, cap) * A:
                return bound, True
            return min(r_fixed, cap) * (r / r_fixed) * A, False
        case "cispo":  # sg(min(r, C)) A log pi
            return min(r_fixed, cap) * A * live[i], r_fixed > cap
        case "reinforce":  # A log pi
            return A * live[i], False
        case "gspo":  # min(s A, clip(s) A), s the geometric mean of r over the sequence
            members = [j for j, other in enumerate(tokens) if other.sequence == token.sequence]
            ratio, ratio_fixed = (
                math.prod(math.exp(bounded(x[j] - tokens[j].behaviour) / len(members)) for j in members)
                for x in (live, fixed)
            )
            bound = clip(ratio_fixed, 1 - s.sequence_clip[0], 1 + s.sequence_clip[1]) * A
            return (bound, True) if bound < ratio_fixed * A else (ratio * A, False)
        case "dppo_tv":  # M min(r, C) A; M = 0 beyond the bound on |pi - mu| where the gradient leads further away
            away = (A > 0 and r_fixed > 1) or (A < 0 and r_fixed < 1)
            if away and abs(math.exp(fixed[i]) - math.exp(mu)) > s.divergence_bound:
                return 0.0, True
            return min(r_fixed, cap) * (r / r_fixed) * A, False
        case "decoupled":  # min(v, C) min(u A, clip(u) A), u = pi / rho, v = rho / mu
            u, u_fixed = math.exp(bounded(live[i] - token.proximal)), math.exp(bounded(fixed[i] - token.proximal))
            v = min(math.exp(bounded(token.proximal - mu)), cap)
            bound = clip(u_fixed, 1 - s.clip_low, 1 + s.clip_high) * A
            return (v * bound, True) if bound < u_fixed * A else (v * u * A, False)


def penalties(token: Token, live: float, fixed: float, s: LossSection) -> float:
    """drift_penalty d^2 + reference_kl w k - entropy_bonus H."""
    cap = s.importance_cap if "truncated" in s.corrections else math.inf
    w = 1.0 if s.kind == "reinforce" else min(math.exp(bounded(fixed - token.behaviour)), cap)
    total = s.drift_penalty * bounded(live - token.behaviour) ** 2
    d, d_fixed = bounded(live - token.reference), bounded(fixed - token.reference)
    estimate = {
        "k1": d_fixed + d_fixed * (live - fixed),
        "k2": d**2 / 2,
        "k3": math.exp(-d) - 1 + d,
    }[s.reference_estimator]
    total += s.reference_kl * w * estimate if s.reference_kl else 0.0
    return total + s.entropy_bonus * (-token.entropy + w * (fixed + token.entropy) * (live - fixed))


def gradient(tokens: Sequence[Token], at: Sequence[float], s: LossSection, width: float = 1e-6) -> list[float]:
    """d loss / d log pi by central differences."""
    result = []
    for i in range(len(at)):
        up, down = list(at), list(at)
        up[i] += width
        down[i] -= width
        result.append((objective(tokens, up, at, s).loss - objective(tokens, down, at, s).loss) / (2 * width))
    return result


def advantages(rewards: Sequence[float], counted: Sequence[bool], baseline: str, *, divide_by_std: bool) -> list[float]:
    """r_i minus the mean of all counted rewards, or of the others'; by choice over their standard deviation."""
    result = []
    of_all = [r for r, c in zip(rewards, counted, strict=True) if c]
    for i, (reward, count) in enumerate(zip(rewards, counted, strict=True)):
        compared = [
            r for j, (r, c) in enumerate(zip(rewards, counted, strict=True)) if c and (baseline == "mean" or j != i)
        ]
        if not count or len(of_all) < 2:
            result.append(0.0)
            continue
        advantage = reward - sum(compared) / len(compared)
        if divide_by_std:
            mean = sum(of_all) / len(of_all)
            advantage /= math.sqrt(sum((r - mean) ** 2 for r in of_all) / (len(of_all) - 1)) + 1e-6
        result.append(advantage)
    return result


def overlong_punishment(length: int, longest: int, buffer: int) -> float:
    """Three cases, as published."""
    if length <= longest - buffer:
        return 0.0
    if length <= longest:
        return ((longest - buffer) - length) / buffer
    return -1.0


def soft_budget_rewards(episodes: Sequence[tuple[float, int | None, int]], price: float) -> list[float]:
    """R = r - price * max(0, (n - b) / b) for (r, b, n); no b, or one of 0: R = r."""
    rewards = []
    for reward, budget, thought in episodes:
        relative = 0.0
        if budget is not None and budget > 0:
            relative = (thought - budget) / budget
        rewards.append(reward - price * max(0.0, relative))
    return rewards
