"""Which rank trains on what: sequences -> optimiser steps -> ranks, with the weight of every token in the whole step.

Pure numpy, run on rank 0. Weights are settled before anything is divided, so how a batch is spread over micro-batches
and ranks changes nothing of its loss. Knows nothing of how shares travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from learner.engine import Aggregation, Guard, Objective, TrainSequence
from learner.losses.aggregation import token_weights
from learner.training.balance import balanced
from learner.training.packing import num_trained_tokens, sharing_units


@dataclass(frozen=True, slots=True, eq=False)
class Minibatch:
    """One rank's sequences of one optimiser step; `weights` has one float32 array of T for each of them.

    num_tokens: trained tokens of all ranks.
    """

    sequences: tuple[TrainSequence, ...]
    weights: tuple[npt.NDArray[np.float32], ...]
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one rank does in a call of `step`."""

    minibatches: tuple[Minibatch, ...]
    objective: Objective
    learning_rate: float
    guard: Guard | None = None


def divided(
    sequences: Sequence[TrainSequence],
    aggregation: Aggregation,
    num_minibatches: int,
    num_ranks: int,
    max_tree_tokens: int,
) -> list[tuple[Minibatch, ...]]:
    """Each rank's minibatches. Optimiser steps and ranks are balanced by packed tokens; what shares a prefix tree stays
    together. Steps that would have no trained token are left out.
    """
    trained = [sequence for sequence in sequences if sequence.loss_mask_T[1:].any()]
    per_rank: list[list[Minibatch]] = [[] for _ in range(num_ranks)]
    for chosen in _spread(trained, num_minibatches, max_tree_tokens):
        if not chosen:
            continue
        step = [trained[i] for i in chosen]
        weights = token_weights(step, aggregation)
        num_tokens = num_trained_tokens(step)
        for rank, part in enumerate(_spread(step, num_ranks, max_tree_tokens)):
            members, their_weights = tuple(step[i] for i in part), tuple(weights[i] for i in part)
            per_rank[rank].append(Minibatch(members, their_weights, num_tokens))
    return [tuple(minibatches) for minibatches in per_rank]


def _spread(sequences: Sequence[TrainSequence], num_parts: int, max_tree_tokens: int) -> list[list[int]]:
    """Parts of equal work, as indices in the order given."""
    if num_parts == 1:
        return [list(range(len(sequences)))]
    units = sharing_units(sequences, max_tree_tokens)
    parts = balanced([num_tokens for _, num_tokens in units], num_parts)
    return [sorted(i for unit in part for i in units[unit][0]) for part in parts]
