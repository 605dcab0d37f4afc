"""The losses: pure functions of a TokenBatch. They sum over tokens; the engine divides by the global token count.

Notation for a token: d = log pi - log mu, the log-ratio of the target policy (being trained) to the behaviour policy
(the engine's own log-prob at sampling time), r = exp(d), A its advantage, sg = stop-gradient.
"""

from __future__ import annotations

import torch

from broker.process.learner_settings import LossSection
from learner.engine import LossFn, TokenBatch

_MAX_LOG_RATIO = 20.0  # exp stays finite in float32; such tokens are far outside every window


def policy_loss(settings: LossSection) -> LossFn:
    """The default recipe's loss. Per token, with C = importance_cap and the clip range [1 - clip_low, 1 + clip_high]:

        w    = sg(min(r, C)) * exp(d - sg(d))            value min(r, C), gradient min(r, C) * grad log pi
        s    = min(w * A, clip(r, 1 - clip_low, 1 + clip_high) * A)
        loss = keep * (-s + drift_penalty * d^2)

    `min` of the two surrogates is PPO's clip (arXiv 1707.06347) with the asymmetric range of DAPO (arXiv 2503.14476).
    The truncated weight (IMPALA, arXiv 1802.01561) matters where A < 0 and r > C, which PPO leaves unbounded: the token
    is still pushed down, with weight C. `keep` is 0 or 1: the token's r lies in `token_window` (IcePop's mask, arXiv
    2510.18855), and the geometric mean of r over the sequence's trained tokens in `sequence_guard` (the sequence mask
    of arXiv 2507.18071's ratio). The ratio is against mu directly: there is no third, decoupled policy. Masked tokens
    stay in the denominator, so masking never inflates the others.
    """
    token_low, token_high = settings.token_window
    guard_low, guard_high = settings.sequence_guard

    def loss(batch: TokenBatch) -> tuple[torch.Tensor, dict[str, float]]:
        log_ratio_N = (batch.logprobs_N - batch.behaviour_logprobs_N).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        detached_N = log_ratio_N.detach()
        ratio_N = detached_N.exp()
        geometric_S = sequence_means(detached_N, batch.sequence_ids_N).exp()
        guarded_S = (geometric_S >= guard_low) & (geometric_S <= guard_high)
        keep_N = (ratio_N >= token_low) & (ratio_N <= token_high) & guarded_S[batch.sequence_ids_N]

        weight_N = ratio_N.clamp(max=settings.importance_cap) * torch.exp(log_ratio_N - detached_N)
        clipped_N = ratio_N.clamp(1 - settings.clip_low, 1 + settings.clip_high) * batch.advantages_N
        weighted_N = weight_N * batch.advantages_N
        # where, not minimum: inside the clip range both are equal, and minimum would halve the gradient there.
        clips_N = clipped_N < weighted_N.detach()
        per_token_N = -torch.where(clips_N, clipped_N, weighted_N) + settings.drift_penalty * log_ratio_N.square()
        # where, not multiply: a masked token's infinity must not become NaN.
        total = torch.where(keep_N, per_token_N, torch.zeros_like(per_token_N)).sum()
        stats = {
            "ratio": float(ratio_N.sum()),
            "ratio_squared": float(ratio_N.square().sum()),
            "mismatch_kl": float((ratio_N - 1 - detached_N).sum()),  # k3: unbiased for KL(mu || pi), never negative
            "logprob_gap": float(detached_N.abs().sum()),
            "clip_fraction": float((keep_N & clips_N).sum()),
            "loss_masked_fraction": float((~keep_N).sum()),
            "entropy": float(batch.entropy_N.sum()),
        }
        return total, stats

    return loss


def supervised_loss(batch: TokenBatch) -> tuple[torch.Tensor, dict[str, float]]:
    """Negative log-likelihood of the trained tokens: imitation, for the warm start. Uses nothing of the behaviour."""
    total = -batch.logprobs_N.sum()
    return total, {"nll": float(total.detach()), "entropy": float(batch.entropy_N.sum())}


def sequence_means(values_N: torch.Tensor, sequence_ids_N: torch.Tensor) -> torch.Tensor:
    """Mean of the values of each sequence, indexed by sequence id (0 for an id without a token)."""
    num_sequences = int(sequence_ids_N.max()) + 1 if sequence_ids_N.numel() else 0
    sums_S = torch.zeros(num_sequences, dtype=values_N.dtype, device=values_N.device)
    counts_S = torch.zeros_like(sums_S)
    sums_S.index_add_(0, sequence_ids_N, values_N)
    counts_S.index_add_(0, sequence_ids_N, torch.ones_like(values_N))
    return sums_S / counts_S.clamp(min=1)


def effective_sample_size(mean_ratio: float, mean_squared_ratio: float) -> float:
    """Kish's effective sample size as a share of the tokens, (sum r)^2 / (n * sum r^2): 1 on-policy, 0 if undefined."""
    return mean_ratio * mean_ratio / mean_squared_ratio if mean_squared_ratio > 0 else 0.0
