"""Objectives: what the engine is asked to minimise. Owns how surrogate, masks and penalties become one loss and its
statistics; the formulas are in `surrogates`, `importance` and `penalties`, what tokens weigh in `aggregation`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from broker.process.loss_settings import LossSection
from learner.engine import Aggregation, TokenBatch
from learner.losses import penalties, surrogates
from learner.losses.importance import log_ratios, outside_guard, outside_window
from learner.losses.surrogates import Surrogate


def policy_loss(settings: LossSection) -> PolicyObjective:
    """The objective that the settings ask for."""
    return PolicyObjective(settings)


class _Masks(NamedTuple):
    """Why a token is left out, bool of N each; a token may be in several."""

    not_finite_N: torch.Tensor
    window_N: torch.Tensor
    guard_N: torch.Tensor

    def together(self) -> torch.Tensor:
        return self.not_finite_N | self.window_N | self.guard_N


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """A policy-gradient objective. Per token, with the kind's surrogate s and the log-ratio d = log pi - log mu:

        keep * (-s + drift_penalty * d^2 + reference_kl * w * k(pi, reference) - entropy_bonus * H)

    w is the importance weight. `keep` is 0 where a mask is on: the importance weight outside `token_window`, its
    geometric mean over the sequence outside `sequence_guard`, or a behaviour log-prob that is no finite number. The
    weight is pi / mu, for `decoupled` rho / mu. Masked tokens stay in the denominator, so masking never inflates the
    others. A target policy that is not a number is not masked: it makes the loss not a number, which the engine
    refuses.
    """

    settings: LossSection

    @property
    def aggregation(self) -> Aggregation:
        """Which weights the tokens shall come with."""
        return self.settings.aggregated_by

    @property
    def needs_proximal(self) -> bool:
        """Whether the policy at the beginning of the batch's first step is used."""
        return self.settings.kind == "decoupled"

    @property
    def needs_reference(self) -> bool:
        """Whether the reference policy is used."""
        return self.settings.reference_kl > 0

    def __call__(self, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss, and sums over tokens of its statistics."""
        settings = self.settings
        not_finite_N = ~torch.isfinite(batch.behaviour_logprobs_N)
        known_N = torch.where(not_finite_N, batch.logprobs_N.detach(), batch.behaviour_logprobs_N)
        batch = replace(batch, behaviour_logprobs_N=known_N)
        log_ratio_N = log_ratios(batch.logprobs_N, batch.behaviour_logprobs_N)
        corrected_N = log_ratio_N.detach()  # what the corrections look at
        if self.needs_proximal:
            corrected_N = log_ratios(_given(batch.proximal_logprobs_N, "proximal"), batch.behaviour_logprobs_N)
        masks = self._masks(corrected_N, batch.sequence_ids_N, not_finite_N)
        keep_N = ~masks.together()
        surrogate = self._surrogate(batch, log_ratio_N, corrected_N)
        weight_N = self._weight(log_ratio_N.detach())
        per_token_N = -surrogate.value_N
        if settings.drift_penalty:
            per_token_N = per_token_N + settings.drift_penalty * penalties.drift(log_ratio_N)
        if self.needs_reference:
            reference_N = _given(batch.reference_logprobs_N, "reference")
            estimate_N = penalties.reference_kl(batch.logprobs_N, reference_N, settings.reference_estimator)
            per_token_N = per_token_N + settings.reference_kl * weight_N * estimate_N
        if settings.entropy_bonus:
            per_token_N = per_token_N + settings.entropy_bonus * penalties.negative_entropy(
                batch.logprobs_N, batch.entropy_N, weight_N
            )
        # where, not multiply: a masked token's infinity must not become NaN.
        total = torch.where(keep_N, per_token_N * batch.weights_N, torch.zeros_like(per_token_N)).sum()
        if self.aggregation == "constant":
            total = total / settings.constant_tokens
        return total, self._statistics(batch, log_ratio_N.detach(), masks, keep_N & surrogate.clipped_N)

    @property
    def _cap(self) -> float:
        return self.settings.importance_cap if "truncated" in self.settings.corrections else float("inf")

    def _masks(self, log_ratio_N: torch.Tensor, sequence_ids_N: torch.Tensor, not_finite_N: torch.Tensor) -> _Masks:
        settings, none_N = self.settings, torch.zeros_like(not_finite_N)
        in_use = settings.corrections
        return _Masks(
            not_finite_N,
            outside_window(log_ratio_N.exp(), settings.token_window) if "window" in in_use else none_N,
            outside_guard(log_ratio_N, sequence_ids_N, settings.sequence_guard) if "guard" in in_use else none_N,
        )

    def _surrogate(self, batch: TokenBatch, log_ratio_N: torch.Tensor, corrected_N: torch.Tensor) -> Surrogate:
        settings, advantages_N = self.settings, batch.advantages_N
        clip = settings.clip_low, settings.clip_high
        match settings.kind:
            case "grpo":
                return surrogates.clipped(log_ratio_N, advantages_N, clip, self._cap)
            case "cispo":
                return surrogates.cispo(batch.logprobs_N, log_ratio_N, advantages_N, self._cap)
            case "gspo":
                return surrogates.gspo(log_ratio_N, batch.sequence_ids_N, advantages_N, settings.sequence_clip)
            case "dppo_tv":
                behaviour_N = batch.behaviour_logprobs_N
                bound = settings.divergence_bound
                return surrogates.dppo_tv(batch.logprobs_N, behaviour_N, log_ratio_N, advantages_N, bound, self._cap)
            case "decoupled":
                proximal_N = _given(batch.proximal_logprobs_N, "proximal")
                proximal_log_ratio_N = log_ratios(batch.logprobs_N, proximal_N)
                return surrogates.decoupled(proximal_log_ratio_N, corrected_N, advantages_N, clip, self._cap)
            case "reinforce":
                return surrogates.reinforce(batch.logprobs_N, advantages_N)

    def _weight(self, log_ratio_N: torch.Tensor) -> torch.Tensor:
        """The importance weight of the penalties, whose tokens mu sampled too."""
        if self.settings.kind == "reinforce":
            return torch.ones_like(log_ratio_N)
        return log_ratio_N.exp().clamp(max=self._cap)

    def _statistics(
        self, batch: TokenBatch, log_ratio_N: torch.Tensor, masks: _Masks, clipped_N: torch.Tensor
    ) -> dict[str, float]:
        ratio_N = log_ratio_N.exp()
        tensors = {
            "ratio": ratio_N,
            "ratio_squared": ratio_N.square(),
            "mismatch_kl": ratio_N - 1 - log_ratio_N,  # k3 the other way: unbiased for KL(mu || pi), never negative
            "logprob_gap": log_ratio_N.abs(),
            "clip_fraction": clipped_N,
            "loss_masked_fraction": masks.together(),
            "masked_window_fraction": masks.window_N,
            "masked_guard_fraction": masks.guard_N,
            "masked_not_finite_fraction": masks.not_finite_N,
            "entropy": batch.entropy_N,
        }
        if batch.reference_logprobs_N is not None:
            tensors["reference_kl"] = penalties.reference_kl(
                batch.logprobs_N.detach(), batch.reference_logprobs_N, "k3"
            )
        return _sums(tensors)


@dataclass(frozen=True, slots=True)
class SupervisedObjective:
    """Negative log-likelihood of the trained tokens: imitation, for the warm start. Uses nothing of the behaviour."""

    aggregation: Aggregation = "token"
    needs_proximal: bool = False
    needs_reference: bool = False

    def __call__(self, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss, and sums over tokens of its statistics."""
        total = -(batch.weights_N * batch.logprobs_N).sum()
        return total, _sums({"nll": -batch.logprobs_N.detach(), "entropy": batch.entropy_N})


supervised_loss = SupervisedObjective()


def _sums(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Sums of tensors, brought to the host at once."""
    sums = torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors.values()]).tolist()
    return dict(zip(tensors, sums, strict=True))


def _given(logprobs_N: torch.Tensor | None, name: str) -> torch.Tensor:
    if logprobs_N is None:
        raise ValueError(f"the {name} policy's log-probs are missing; the engine must provide what an objective needs")
    return logprobs_N
