"""Attention over a packed layout, as an attention function of the `transformers` library. Owns no parameters.

Registered once as `ergon_packed`; a model loaded with `attn_implementation="ergon_packed"` gets its layout through the
forward pass's keyword `packed_trees`. Every tree is attended to alone, so packed sequences never see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "ergon_packed"
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_CAPABILITY = (8, 0)  # of the GPU: Ampere and newer


class TreeSpan(NamedTuple):
    """Where a tree lies in the packed layout and, unless it is a causal chain, its ancestor mask (1, 1, n, n)."""

    start: int
    num_tokens: int
    mask_11NN: torch.Tensor | None


def packed_attention(
    module: torch.nn.Module,
    query_BHPD: torch.Tensor,
    key_BKPD: torch.Tensor,
    value_BKPD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_trees: Sequence[TreeSpan] | None = None,
    sliding_window: int | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """Attention output (B, P, H, D) for one packed row (B = 1). H query heads share K key heads."""
    if packed_trees is None or attention_mask is not None or query_BHPD.shape[0] != 1:
        raise ValueError("packed attention takes one packed row, its trees and no mask")
    longest = max(span.num_tokens for span in packed_trees)
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(f"a sequence of {longest} tokens exceeds the model's sliding window of {sliding_window}")
    qkv = query_BHPD, key_BKPD, value_BKPD
    outputs: list[torch.Tensor] = []
    for chains, spans in groupby(packed_trees, lambda span: span.mask_11NN is None):
        if chains and dropout == 0.0 and _flash_can(query_BHPD):
            outputs.append(_chains_at_once(qkv, list(spans), scaling))
        else:
            outputs.extend(_one_tree(qkv, span, scaling, dropout) for span in spans)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _one_tree(qkv: Qkv, span: TreeSpan, scaling: float | None, dropout: float) -> torch.Tensor:
    """(1, H, n, D): the attention of one tree, by whatever kernel torch has for it."""
    query, key, value = (part.narrow(2, span.start, span.num_tokens) for part in qkv)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=span.mask_11NN,
        dropout_p=dropout,
        is_causal=span.mask_11NN is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _flash_can(query: torch.Tensor) -> bool:
    """Whether this GPU and this number format have flash attention for sequences of different lengths."""
    return (
        query.is_cuda
        and query.dtype in _FLASH_DTYPES
        and torch.cuda.get_device_capability(query.device) >= _FLASH_CAPABILITY
    )


def _chains_at_once(qkv: Qkv, spans: Sequence[TreeSpan], scaling: float | None) -> torch.Tensor:
    """(1, H, n, D): neighbouring causal chains in one call of flash attention (arXiv 2307.08691)."""
    lengths = [span.num_tokens for span in spans]
    query, key, value = (part[0].narrow(1, spans[0].start, sum(lengths)).transpose(0, 1).contiguous() for part in qkv)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)
    output_NHD = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        max(lengths),
        max(lengths),
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output_NHD, torch.Tensor)  # a tuple only where more was asked for
    return output_NHD.transpose(0, 1)[None]


AttentionInterface.register(NAME, packed_attention)
