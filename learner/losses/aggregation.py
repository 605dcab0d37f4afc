"""Sequences -> the weight of every token in the loss of a whole optimiser step: pure functions on numpy.

The loss of a step is the sum over all its tokens of weight times per-token loss. Because the denominator is settled
here, over everything the step trains on, neither micro-batches nor ranks nor an objective can change what a token
counts. Only trained tokens count: those with the mask True, and not the first of their sequence, which nothing
predicts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from learner.engine import Aggregation, TrainSequence


def token_weights(sequences: Sequence[TrainSequence], aggregation: Aggregation) -> list[npt.NDArray[np.float32]]:
    """For each sequence, T weights (0 where a token is not trained), with n_s the trained tokens of sequence s and w_s
    its `weight`, its share of its episode:

    `token`: 1 / sum of n_s. Every token counts alike, whatever its sequence's length (DAPO, arXiv 2503.14476).
    `sequence`: w_s / (n_s * sum of w). Every episode counts alike, the tokens of a long one less (GRPO, arXiv
    2402.03300; GSPO, arXiv 2507.18071). `constant`: 1 / sum of w, which the objective divides by a constant number of
    tokens. An episode's gradient is the sum over its tokens, as the policy gradient theorem has it, without a length's
    bias (Dr. GRPO, arXiv 2503.20783).

    Sequences without a trained token enter no sum. The shares of an episode's segments add up to 1 and are as their
    trained tokens, so by all three a token weighs the same into however many segments its episode was cut. What is
    taken over a whole sequence (gspo's ratio, the guard) is taken over a segment: the tokens that one context led to.
    """
    counts_S = np.asarray([np.count_nonzero(s.loss_mask_T[1:]) for s in sequences], dtype=np.float64)
    shares_S = np.where(counts_S > 0, [s.weight for s in sequences], 0.0)
    match aggregation:
        case "token":
            weights_S = np.full(len(sequences), 1.0 / max(counts_S.sum(), 1.0))
        case "sequence":
            weights_S = shares_S / np.maximum(counts_S, 1.0) / _or_one(shares_S.sum())
        case "constant":
            weights_S = (counts_S > 0) / _or_one(shares_S.sum())
    return [_spread(sequence, weight) for sequence, weight in zip(sequences, weights_S, strict=True)]


def _or_one(total: float) -> float:
    return total if total > 0 else 1.0


def _spread(sequence: TrainSequence, weight: float) -> npt.NDArray[np.float32]:
    weights_T = np.where(sequence.loss_mask_T, np.float32(weight), np.float32(0))
    weights_T[:1] = 0
    return weights_T
