"""The TrainEngine protocol: what the trainer's loop asks of a training engine, and the batch it feeds.

`training/deepspeed_engine.py` is the real one. With several ranks every method is collective: all ranks call it in
the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # so that what only handles sequences (batching) needs no torch
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class TrainSequence:
    """One token trace of T tokens as the loss sees it.

    token_ids_T int32; loss_mask_T bool (True = contributes to the gradient); logprobs_T float32 behaviour log-probs;
    advantage, one number for the whole trace; staleness_T int32, learner version minus sampling version (0 where
    unsampled).
    """

    token_ids_T: npt.NDArray[np.int32]
    loss_mask_T: npt.NDArray[np.bool_]
    logprobs_T: npt.NDArray[np.float32]
    advantage: float
    staleness_T: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """What a loss function gets: the N masked tokens of one micro-batch, flattened. All tensors share the device."""

    logprobs_N: torch.Tensor  # float32, requires grad: target policy
    behaviour_logprobs_N: torch.Tensor  # float32
    advantages_N: torch.Tensor  # float32
    entropy_N: torch.Tensor  # float32, detached
    sequence_ids_N: torch.Tensor  # int64: which sequence of the micro-batch a token belongs to


LossFn: TypeAlias = "Callable[[TokenBatch], tuple[torch.Tensor, dict[str, float]]]"
"""Returns the SUM over tokens of the loss and sums of statistics; the engine divides by the global token count."""


class TrainEngine(Protocol):
    """A model being trained."""

    @property
    def policy_version(self) -> int:
        """Optimiser steps taken so far."""
        ...

    def step(self, sequences: Sequence[TrainSequence], loss: LossFn, learning_rate: float) -> Mapping[str, float]:
        """One optimiser step over these sequences, in micro-batches; returns means of the statistics and grad_norm.

        Raises TrainingError, with the weights untouched, where loss or gradient norm is not finite.
        """
        ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The state dict's tensors (tied ones once) as the engine serves them, by name; valid until the next step."""
        ...

    def reset_optimizer(self) -> None:
        """Forget the optimiser's moments (not the weights): another objective begins."""
        ...

    def save(self, directory: Path) -> None:
        """Write model, optimiser and counters into an existing empty directory; the caller makes it visible."""
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, bit for bit."""
        ...

    def close(self) -> None:
        """Release the process group."""
        ...


class TrainingError(Exception):
    """A step that must not happen: non-finite loss or gradient."""
