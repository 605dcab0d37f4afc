"""The policy losses' surrogates, per token: pure functions on tensors. What they return is maximised.

Notation as in `importance`; A is the advantage, sg the stop-gradient, C the importance cap (infinite without the
correction `truncated`). "Clipped" means: the trust region leaves the token no policy gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from learner.losses.importance import carrying_gradient, sequence_means


class Surrogate(NamedTuple):
    """value_N carries the gradient; clipped_N bool."""

    value_N: torch.Tensor
    clipped_N: torch.Tensor


def clipped(log_ratio_N: torch.Tensor, advantages_N: torch.Tensor, clip: tuple[float, float], cap: float) -> Surrogate:
    """PPO's clip (arXiv 1707.06347) with an asymmetric range (clip-higher of DAPO, arXiv 2503.14476), on a group's
    advantages (GRPO, arXiv 2402.03300). With r the ratio:

        min(w * A, clip(r, 1 - clip_low, 1 + clip_high) * A),   w = min(r, C), gradient min(r, C) * grad log pi

    The truncated weight (IMPALA, arXiv 1802.01561) matters where A < 0 and r > C, which PPO leaves unbounded: the token
    is still pushed down, with weight C.
    """
    ratio_N = log_ratio_N.detach().exp()
    weighted_N = carrying_gradient(ratio_N.clamp(max=cap), log_ratio_N) * advantages_N
    bound_N = ratio_N.clamp(1 - clip[0], 1 + clip[1]) * advantages_N
    # where, not minimum: inside the clip range both are equal, and minimum would halve the gradient there.
    clipped_N = bound_N < weighted_N.detach()
    return Surrogate(torch.where(clipped_N, bound_N, weighted_N), clipped_N)


def decoupled(
    proximal_log_ratio_N: torch.Tensor,
    behaviour_log_ratio_N: torch.Tensor,
    advantages_N: torch.Tensor,
    clip: tuple[float, float],
    cap: float,
) -> Surrogate:
    """Decoupled PPO (arXiv 2110.00641), as asynchronous training uses it (AReaL, arXiv 2505.24298). With u = pi / rho
    and v = rho / mu, `proximal_log_ratio_N` = log u, `behaviour_log_ratio_N` = log v (no gradient):

        min(v, C) * min(u * A, clip(u, 1 - clip_low, 1 + clip_high) * A)

    The trust region lies around rho, so that stale tokens are not clipped for their staleness alone.
    """
    inner = clipped(proximal_log_ratio_N, advantages_N, clip, float("inf"))
    return Surrogate(behaviour_log_ratio_N.exp().clamp(max=cap) * inner.value_N, inner.clipped_N)


def cispo(logprobs_N: torch.Tensor, log_ratio_N: torch.Tensor, advantages_N: torch.Tensor, cap: float) -> Surrogate:
    """CISPO (MiniMax-M1, arXiv 2506.13585): sg(min(r, C)) * A * log pi. The weight is truncated, above only; no token
    loses its gradient, so `clipped_N` says whose weight was truncated."""
    ratio_N = log_ratio_N.detach().exp()
    return Surrogate(ratio_N.clamp(max=cap) * advantages_N * logprobs_N, ratio_N > cap)


def reinforce(logprobs_N: torch.Tensor, advantages_N: torch.Tensor) -> Surrogate:
    """The score function, A * log pi (Williams, 1992): right for tokens that pi itself sampled, and for no others."""
    return Surrogate(advantages_N * logprobs_N, torch.zeros_like(advantages_N, dtype=torch.bool))


def gspo(
    log_ratio_N: torch.Tensor, sequence_ids_N: torch.Tensor, advantages_N: torch.Tensor, clip: tuple[float, float]
) -> Surrogate:
    """GSPO (arXiv 2507.18071). With s = exp(mean over the sequence's tokens of log r), the same for each of its tokens:

        min(s * A, clip(s, 1 - clip_low, 1 + clip_high) * A)

    Its gradient reaches every token through s; aggregated by sequence it is GSPO's.
    """
    ratio_N = sequence_means(log_ratio_N, sequence_ids_N).exp()[sequence_ids_N]
    weighted_N = ratio_N * advantages_N
    bound_N = ratio_N.detach().clamp(1 - clip[0], 1 + clip[1]) * advantages_N
    clipped_N = bound_N < weighted_N.detach()
    return Surrogate(torch.where(clipped_N, bound_N, weighted_N), clipped_N)


def dppo_tv(
    logprobs_N: torch.Tensor,
    behaviour_logprobs_N: torch.Tensor,
    log_ratio_N: torch.Tensor,
    advantages_N: torch.Tensor,
    bound: float,
    cap: float,
) -> Surrogate:
    """DPPO with the binary total variation (arXiv 2602.04879): M * min(r, C) * A, gradient as in `clipped`.

    M = 0 where |pi - mu| of the sampled token exceeds `bound` and the gradient would move pi further away (A > 0 and r
    > 1, or A < 0 and r < 1), else 1. Unlike a ratio, the difference lets rare tokens move and holds frequent ones.
    """
    ratio_N = log_ratio_N.detach().exp()
    moved_N = (logprobs_N.detach().exp() - behaviour_logprobs_N.exp()).abs()
    away_N = torch.where(advantages_N > 0, ratio_N > 1, (advantages_N < 0) & (ratio_N < 1))
    clipped_N = (moved_N > bound) & away_N
    weighted_N = carrying_gradient(ratio_N.clamp(max=cap), log_ratio_N) * advantages_N
    return Surrogate(torch.where(clipped_N, torch.zeros_like(weighted_N), weighted_N), clipped_N)
