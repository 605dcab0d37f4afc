"""Attention over a packed layout, as an attention function of the `transformers` library. Owns no parameters.

Registered once as `ergon_packed`; a model loaded with `attn_implementation="ergon_packed"` gets its layout through the
forward pass's keyword `packed_trees`. Every tree is attended to alone, so packed sequences never see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "ergon_packed"


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
    grouped = query_BHPD.shape[1] != key_BKPD.shape[1]
    outputs = []
    for start, num_tokens, mask_11NN in packed_trees:
        if sliding_window is not None and num_tokens > sliding_window:
            raise ValueError(
                f"a sequence of {num_tokens} tokens exceeds the model's sliding window of {sliding_window}"
            )
        outputs.append(
            scaled_dot_product_attention(
                query_BHPD.narrow(2, start, num_tokens),
                key_BKPD.narrow(2, start, num_tokens),
                value_BKPD.narrow(2, start, num_tokens),
                attn_mask=mask_11NN,
                dropout_p=dropout,
                is_causal=mask_11NN is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
