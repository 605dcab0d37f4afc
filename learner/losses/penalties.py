"""What is added to the policy loss, per token: pure functions on tensors. Weights are the caller's."""

from __future__ import annotations

import torch

from learner.losses.importance import MAX_LOG_RATIO


def drift(log_ratio_N: torch.Tensor) -> torch.Tensor:
    """log(pi / mu)^2: pulls the target policy towards the one that sampled, twice the estimator k2 of their KL."""
    return log_ratio_N.square()


def reference_kl(logprobs_N: torch.Tensor, reference_logprobs_N: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimates of KL(pi || reference) from tokens of pi, with d = log pi - log reference (Schulman,
    "Approximating KL divergence", 2020):

        k1 = d                    unbiased, of either sign; its gradient here is d * grad log pi
        k2 = d^2 / 2              biased in value; the same gradient
        k3 = exp(-d) - 1 + d      unbiased, never negative: GRPO's (arXiv 2402.03300)
                                  gradient (1 - exp(-d)) * grad log pi

    Differentiating k1 as it stands would leave grad log pi, whose mean is zero. The score function's d * grad log pi
    is, in the mean, the gradient of the KL; k3's is that of the KL the other way round (arXiv 2506.09477). For tokens
    of another policy the caller weights the estimate with the importance weight.
    """
    distance_N = (logprobs_N - reference_logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match estimator:
        case "k1":
            fixed_N = distance_N.detach()
            return fixed_N + fixed_N * (logprobs_N - logprobs_N.detach())
        case "k2":
            return distance_N.square() / 2
        case "k3":
            return torch.exp(-distance_N) - 1 + distance_N
    raise ValueError(f"the KL estimator is {estimator!r}; it must be k1, k2 or k3")


def negative_entropy(logprobs_N: torch.Tensor, entropy_N: torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
    """-H of the policy at each token: exact in value; in gradient the score function's weight * (log pi + H) * grad log
    pi, whose mean over tokens of pi is the gradient of -H (H as the baseline of least effort). So no second softmax
    over the vocabulary has to be kept for the backward pass. weight_N: importance weights, no gradient."""
    slope_N = weight_N * (logprobs_N.detach() + entropy_N)
    return -entropy_N + slope_N * (logprobs_N - logprobs_N.detach())
