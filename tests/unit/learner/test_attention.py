"""Packed attention: every tree alone, whichever way it is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from learner.training import attention
from learner.training.attention import TreeSpan, packed_attention

LENGTHS = [5, 3, 1, 4, 7, 2]
MASKED = {1, 4}  # which of them are trees with a mask of their own


def make_spans() -> list[TreeSpan]:
    spans, start = [], 0
    for i, length in enumerate(LENGTHS):
        mask = None
        if i in MASKED:
            mask = torch.eye(length, dtype=torch.bool) | torch.ones(length, length).tril(-2).bool()
            mask = mask[None, None]
        spans.append(TreeSpan(start, length, mask))
        start += length
    return spans


def make_qkv(num_heads: int, num_key_heads: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    return [torch.randn(1, heads, total, 8, requires_grad=True) for heads in (num_heads, num_key_heads, num_key_heads)]


def slow(qkv: list[torch.Tensor]) -> torch.Tensor:
    """One matrix of all tokens, in which a token sees the ancestors in its tree and nothing else."""
    total = sum(LENGTHS)
    allowed = torch.zeros(total, total, dtype=torch.bool)
    for start, length, mask in make_spans():
        own = torch.ones(length, length).tril().bool() if mask is None else mask[0, 0]
        allowed[start : start + length, start : start + length] = own
    query, key, value = qkv
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3)) * 0.3
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, *_rest: Any, **options: Any
) -> torch.Tensor:
    """What the GPU's kernel promises, in its layout (tokens, heads, width), on a CPU."""
    assert options["window_size"] == (-1, 0)
    assert all(part.is_contiguous() for part in (query, key, value))
    outputs = []
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        parts = [part[low:high].transpose(0, 1)[None] for part in (query, key, value)]
        attended = scaled_dot_product_attention(
            *parts, is_causal=True, scale=options["scale"], enable_gqa=options["enable_gqa"]
        )
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("num_key_heads", [4, 2])
@pytest.mark.parametrize("kernel", ["torch", "flash"])
def test_every_tree_is_attended_to_alone(monkeypatch: pytest.MonkeyPatch, kernel: str, num_key_heads: int) -> None:
    calls = []
    if kernel == "flash":
        monkeypatch.setattr(attention, "_flash_can", lambda _query: True)
        monkeypatch.setattr(attention, "varlen_attn", lambda *a, **k: calls.append(a[3].tolist()) or flash(*a, **k))
    qkv = make_qkv(4, num_key_heads)
    output, _ = packed_attention(torch.nn.Module(), *qkv, None, scaling=0.3, packed_trees=make_spans())
    expected = slow(qkv)
    assert torch.allclose(output, expected, atol=1e-5)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((output * weights).sum(), qkv)
    for mine, theirs in zip(found, torch.autograd.grad((expected * weights).sum(), qkv), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    assert calls == ([[0, 5], [0, 1, 5], [0, 2]] if kernel == "flash" else [])  # neighbours in one call


def test_a_tree_beyond_the_sliding_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence of 7 tokens exceeds .* window of 6"):
        packed_attention(torch.nn.Module(), *make_qkv(4, 4), None, packed_trees=make_spans(), sliding_window=6)


def test_a_layout_that_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="packed attention takes one packed row"):
        packed_attention(torch.nn.Module(), *make_qkv(4, 4), None)
