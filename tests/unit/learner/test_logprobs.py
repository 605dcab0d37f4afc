"""The head's own backward pass against autograd through the plain formula, and against finite differences."""

from __future__ import annotations

import pytest
import torch

from learner.training import logprobs
from learner.training.logprobs import selected_logprobs


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    all_logprobs = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return all_logprobs.gather(1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [1, 7, 20])
def test_float32_equals_autograd(monkeypatch: pytest.MonkeyPatch, temperature: float, rows: int) -> None:
    monkeypatch.setattr(logprobs, "ROWS_PER_CHUNK", 8)
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)
    expected, expected_entropy = plain(hidden, weight, targets, temperature)
    wanted = torch.autograd.grad((expected * upstream).sum(), [hidden, weight])
    actual, entropy = selected_logprobs(hidden, weight, targets, temperature)
    got = torch.autograd.grad((actual * upstream).sum(), [hidden, weight])
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    assert not entropy.requires_grad
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_forward_is_as_good_as_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16()
    weight = (3 * torch.randn(500, 32, generator=generator)).bfloat16()
    targets = torch.randint(0, 500, (64,), generator=generator)
    expected, _ = plain(hidden.double(), weight.double(), targets, 1.0)
    actual, _ = selected_logprobs(hidden, weight, targets)
    assert (actual.double() - expected).abs().max() < 1e-4
    rounded = torch.log_softmax((hidden @ weight.t()).float(), -1).gather(1, targets[:, None])[:, 0]
    assert (rounded.double() - expected).abs().max() > 1e-2  # what the float32 head is for


def test_a_nearly_certain_token_keeps_its_small_gradient() -> None:
    hidden = torch.ones(1, 8).bfloat16().requires_grad_()
    weight = torch.zeros(4, 8).bfloat16()
    weight[2] = 1.0  # logit 8 against 0: p = 0.999
    weight.requires_grad_()
    logprob, _ = selected_logprobs(hidden, weight, torch.tensor([2]))
    logprob.sum().backward()
    assert weight.grad is not None
    missing = 1 - float(logprob.detach().exp())
    assert float(weight.grad[2, 0]) == pytest.approx(missing, rel=0.01)
