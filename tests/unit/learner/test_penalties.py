"""Estimators against what they estimate: the mean over all tokens of a small vocabulary is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.losses.penalties import negative_entropy, reference_kl

SEEDS = st.integers(0, 2**31)


def policies(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the target policy, log-probs of a reference and of a behaviour policy, over six tokens."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=6)).requires_grad_()
    reference, behaviour = (torch.log_softmax(torch.from_numpy(rng.normal(size=6)), 0) for _ in range(2))
    return logits, reference, behaviour


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    return -(logprobs.exp() * logprobs).sum()


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_k1_and_k3_are_unbiased_and_k2_is_half_the_squared_distance(seed: int) -> None:
    logits, reference, _ = policies(seed)
    logprobs = torch.log_softmax(logits, 0).detach()
    exact = float((logprobs.exp() * (logprobs - reference)).sum())
    for estimator in ("k1", "k3"):
        mean = float((logprobs.exp() * reference_kl(logprobs, reference, estimator)).sum())
        assert mean == pytest.approx(exact, abs=1e-9)
    assert (reference_kl(logprobs, reference, "k3") >= 0).all()
    assert torch.allclose(reference_kl(logprobs, reference, "k2"), (logprobs - reference).square() / 2)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_k1_and_k2_have_the_gradient_of_the_kl_also_from_another_policys_tokens(seed: int) -> None:
    logits, reference, behaviour = policies(seed)
    logprobs = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    for sampled in (logprobs.detach(), behaviour):
        weight = (logprobs.detach() - sampled).exp()
        for estimator in ("k1", "k2"):
            mean = (sampled.exp() * weight * reference_kl(logprobs, reference, estimator)).sum()
            (actual,) = torch.autograd.grad(mean, logits, retain_graph=True)
            assert torch.allclose(actual, exact)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_k3_has_the_gradient_of_the_kl_the_other_way_round(seed: int) -> None:
    logits, reference, _ = policies(seed)
    logprobs = torch.log_softmax(logits, 0)
    (other_way,) = torch.autograd.grad((reference.exp() * (reference - logprobs)).sum(), logits, retain_graph=True)
    mean = (logprobs.exp().detach() * reference_kl(logprobs, reference, "k3")).sum()
    (actual,) = torch.autograd.grad(mean, logits)
    assert torch.allclose(actual, other_way)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="must be k1, k2 or k3"):
        reference_kl(torch.zeros(1), torch.zeros(1), "k4")


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_the_entropy_bonus_is_exact_in_value_and_has_the_gradient_of_the_entropy(seed: int) -> None:
    logits, _, behaviour = policies(seed)
    logprobs = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad(-entropy(logprobs), logits, retain_graph=True)
    everywhere = entropy(logprobs.detach()).expand(6)
    for sampled in (logprobs.detach(), behaviour):
        weight = (logprobs.detach() - sampled).exp()
        per_token = negative_entropy(logprobs, everywhere, weight)
        assert torch.allclose(per_token, -everywhere)
        (actual,) = torch.autograd.grad((sampled.exp() * per_token).sum(), logits, retain_graph=True)
        assert torch.allclose(actual, exact)
