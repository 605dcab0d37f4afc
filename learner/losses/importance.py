"""Ratios between policies, and what is done about tokens that another policy sampled: pure functions on tensors.

Notation for a token: mu is the behaviour policy, whose log-probs the engine that sampled reported (they are never
computed again by the trainer: its numbers differ from the engine's, and the difference is what has to be corrected); pi
is the target policy, being trained; rho the proximal policy, the target policy at the beginning of the batch's first
optimiser step. r = pi / mu.
"""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0  # exp stays finite in float32; such tokens are far outside every window


def log_ratios(logprobs_N: torch.Tensor, others_N: torch.Tensor) -> torch.Tensor:
    """Log of the ratio of two policies, within +-20; beyond that it is constant, without a gradient."""
    return (logprobs_N - others_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def carrying_gradient(weight_N: torch.Tensor, log_ratio_N: torch.Tensor) -> torch.Tensor:
    """`weight_N` in value, weight_N times the gradient of the log-ratio in gradient: for a ratio the ratio itself, for
    a truncated one what truncated importance sampling asks for."""
    return weight_N * torch.exp(log_ratio_N - log_ratio_N.detach())


def outside_window(ratio_N: torch.Tensor, window: tuple[float, float]) -> torch.Tensor:
    """Tokens whose importance weight lies outside a window: they are masked, not clipped (IcePop, arXiv 2510.18855).

    A ratio that is not a number is not outside: a policy that computes nonsense must show in the loss.
    """
    return (ratio_N < window[0]) | (ratio_N > window[1])


def outside_guard(log_ratio_N: torch.Tensor, sequence_ids_N: torch.Tensor, guard: tuple[float, float]) -> torch.Tensor:
    """Tokens of sequences whose ratio's geometric mean (GSPO's ratio, arXiv 2507.18071) lies outside the guard.

    One token says little about a sequence; their mean tells whether another policy wrote it.
    """
    geometric_S = sequence_means(log_ratio_N, sequence_ids_N).exp()
    return outside_window(geometric_S, guard)[sequence_ids_N]


def sequence_means(values_N: torch.Tensor, sequence_ids_N: torch.Tensor) -> torch.Tensor:
    """Mean of the values of each sequence, indexed by sequence id (0 for an id without a token)."""
    num_sequences = int(sequence_ids_N.max()) + 1 if sequence_ids_N.numel() else 0
    sums_S = torch.zeros(num_sequences, dtype=values_N.dtype, device=values_N.device)
    counts_S = torch.zeros_like(sums_S).index_add_(0, sequence_ids_N, torch.ones_like(values_N))
    return sums_S.index_add(0, sequence_ids_N, values_N) / counts_S.clamp(min=1)


def effective_sample_size(mean_ratio: float, mean_squared_ratio: float) -> float:
    """Kish's effective sample size as a share of the tokens, (sum r)^2 / (n * sum r^2): 1 on-policy, 0 if undefined.

    It falls before training collapses (arXiv 2602.17616).
    """
    return mean_ratio * mean_ratio / mean_squared_ratio if mean_squared_ratio > 0 else 0.0
