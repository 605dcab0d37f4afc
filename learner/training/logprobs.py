"""Hidden states -> float32 log-probs of chosen tokens, without keeping float32 logits. Owns the LM head's arithmetic.

The head is computed in float32 from the weights as they are (bf16 logits would carry errors of several hundredths,
which the importance ratios would inherit). For the backward pass only probabilities are kept, in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ROWS_PER_CHUNK = 256


@contextmanager
def _exact_fast_products(weight_VH: torch.Tensor) -> Iterator[None]:
    """On a CPU, let oneDNN multiply float32 copies of bf16 numbers on its bf16 units.

    The products of bf16 numbers are exact in float32 and so is the accumulation's format: nothing is rounded to bf16.
    """
    if weight_VH.dtype != torch.bfloat16 or weight_VH.device.type != "cpu":
        yield
        return
    backend: Any = torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


class _SelectedLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature)[target], and the entropy, row by row."""

    @staticmethod
    def forward(
        ctx: Any, hidden_UH: torch.Tensor, weight_VH: torch.Tensor, targets_U: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, vocabulary = hidden_UH.shape[0], weight_VH.shape[0]
        logprobs_U = torch.empty(num_rows, dtype=torch.float32, device=hidden_UH.device)
        entropy_U = torch.empty_like(logprobs_U)
        slopes_UV = torch.empty(num_rows, vocabulary, dtype=weight_VH.dtype, device=hidden_UH.device)
        with _exact_fast_products(weight_VH):
            weight_HV = weight_VH.float().t()
            for low in range(0, num_rows, ROWS_PER_CHUNK):
                high = min(low + ROWS_PER_CHUNK, num_rows)
                logits_RV = hidden_UH[low:high].float() @ weight_HV
                if temperature != 1.0:
                    logits_RV /= temperature
                all_RV = torch.log_softmax(logits_RV, dim=-1)
                logprobs_U[low:high] = all_RV.gather(1, targets_U[low:high, None])[:, 0]
                exp_RV = torch.exp(all_RV, out=logits_RV)
                entropy_U[low:high] = -torch.linalg.vecdot(exp_RV, all_RV)
                # p - onehot(target) is what the backward pass needs. The target's entry by expm1: of a token with
                # p = 0.999, a rounded p would leave no gradient at all.
                exp_RV.scatter_(1, targets_U[low:high, None], torch.expm1(logprobs_U[low:high, None]))
                slopes_UV[low:high] = exp_RV
        ctx.save_for_backward(hidden_UH, weight_VH, slopes_UV)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_U)
        return logprobs_U, entropy_U

    @staticmethod
    def backward(ctx: Any, grad_U: torch.Tensor, _grad_entropy_U: torch.Tensor) -> tuple[Any, ...]:
        hidden_UH, weight_VH, slopes_UV = ctx.saved_tensors
        scale_U1 = (grad_U / -ctx.temperature)[:, None].to(weight_VH.dtype)
        grad_logits_UV = slopes_UV.mul_(scale_U1)  # the graph is walked once, so the saved buffer may be overwritten
        return grad_logits_UV @ weight_VH, grad_logits_UV.t() @ hidden_UH, None, None


def selected_logprobs(
    hidden_UH: torch.Tensor, weight_VH: torch.Tensor, targets_U: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 log-probs of `targets_U` (differentiable) and entropies (not), U rows of hidden states, V tokens.

    The policy is softmax(logits / temperature), the one that the engine samples from.
    """
    logprobs_U, entropy_U = _SelectedLogprobs.apply(hidden_UH, weight_VH, targets_U, temperature)  # type: ignore[no-untyped-call]
    return logprobs_U, entropy_U
