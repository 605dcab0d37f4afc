"""What a micro-batch is to an objective, and what its numbers become: pure functions beside the worker.

Owns the padding micro-batch, the way onto the device and how statistics of micro-batches, ranks and optimiser steps are
put together. Knows no engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from learner.engine import TokenBatch, TrainSequence
from learner.training.packing import MicroBatch, pack


def padding() -> MicroBatch:
    """A micro-batch of one token that is trained on with no weight."""
    sequence = TrainSequence(
        token_ids_T=np.zeros(2, dtype=np.int32),
        loss_mask_T=np.asarray([False, True]),
        logprobs_T=np.zeros(2, dtype=np.float32),
        advantage=0.0,
        staleness_T=np.zeros(2, dtype=np.int32),
    )
    (micro,) = pack([sequence], 2, [np.zeros(2, dtype=np.float32)])
    return micro


def token_batch(
    micro: MicroBatch, logprobs_N: torch.Tensor, entropy_N: torch.Tensor, device: torch.device
) -> TokenBatch:
    """What the objective gets of a micro-batch and of its forward pass."""

    def moved(array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    proximal_N, reference_N = micro.proximal_logprobs_N, micro.reference_logprobs_N
    return TokenBatch(
        logprobs_N=logprobs_N,
        behaviour_logprobs_N=moved(micro.behaviour_logprobs_N),
        advantages_N=moved(micro.advantages_N),
        weights_N=moved(micro.weights_N),
        entropy_N=entropy_N,
        sequence_ids_N=moved(micro.sequence_ids_N),
        # Before the first step of a batch the proximal policy is the one being trained.
        proximal_logprobs_N=logprobs_N.detach() if proximal_N is None else moved(proximal_N),
        reference_logprobs_N=None if reference_N is None else moved(reference_N),
    )


def means_over_ranks(
    sums_of_ranks: Sequence[Mapping[str, float]], num_packed: Sequence[int], num_tokens: int, num_micros: int
) -> dict[str, float]:
    """The loss, token means of the other statistics, and counts, of one optimiser step of all ranks."""
    total: Counter[str] = Counter()
    for sums in sums_of_ranks:
        total.update(sums)
    loss = total.pop("loss", 0)
    return {
        "loss": loss,
        **{name: value / num_tokens for name, value in total.items()},
        "num_trained_tokens": num_tokens,
        "num_packed_tokens": sum(num_packed),
        "num_micro_batches": num_micros,
    }


def means_over_steps(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Statistics of several optimiser steps: sums of the counts, means of the rest weighted by trained tokens."""
    num_tokens = [result["num_trained_tokens"] for result in results]
    joined: dict[str, float] = {}
    for name in results[0]:
        values = [result[name] for result in results]
        if name.startswith("num_"):
            joined[name] = sum(values)
        else:
            joined[name] = float(np.average(values, weights=num_tokens)) if len(values) > 1 else values[0]
    return joined
