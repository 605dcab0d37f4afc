"""The TrainEngine protocol: what the trainer's loop asks of a training engine, and the batch it feeds.

`training/deepspeed_engine.py` is the real one. With several ranks the trainer's loop runs on rank 0 alone, whose engine
has the others do their part of every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # so that what only handles sequences (batching) needs no torch
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class TrainSequence:
    """One token trace of T tokens as the loss sees it.

    token_ids_T int32; loss_mask_T bool (True = contributes to the gradient); logprobs_T float32, the behaviour policy's
    log-probs as the engine that sampled reported them; advantage, one number for the whole trace; staleness_T int32,
    learner version minus sampling version (0 where unsampled). weight: the trace's share of its episode, its trained
    tokens over those of all of the episode's. proximal_logprobs_T, reference_logprobs_T: float32 where known; the
    engine computes them where an objective needs them.
    """

    token_ids_T: npt.NDArray[np.int32]
    loss_mask_T: npt.NDArray[np.bool_]
    logprobs_T: npt.NDArray[np.float32]
    advantage: float
    staleness_T: npt.NDArray[np.int32]
    weight: float = 1.0
    proximal_logprobs_T: npt.NDArray[np.float32] | None = None
    reference_logprobs_T: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """What an objective gets: the N trained tokens of one micro-batch, flattened. All tensors share the device.

    A sequence is never split over micro-batches, so what is computed over a whole sequence can be computed here.
    """

    logprobs_N: torch.Tensor  # float32, requires grad: target policy
    behaviour_logprobs_N: torch.Tensor  # float32: the policy that sampled
    advantages_N: torch.Tensor  # float32
    weights_N: torch.Tensor  # float32: of each token in the loss of the whole step, over all micro-batches and ranks
    entropy_N: torch.Tensor  # float32, detached
    sequence_ids_N: torch.Tensor  # int64: which sequence of the micro-batch a token belongs to
    proximal_logprobs_N: torch.Tensor | None = None  # float32: the policy at the beginning of the batch's first step
    reference_logprobs_N: torch.Tensor | None = None  # float32: the frozen reference policy


Aggregation: TypeAlias = Literal["token", "sequence", "constant"]
"""How tokens' losses become one number; see `learner.losses.aggregation`."""


class Objective(Protocol):
    """What is minimised. Picklable, so that every rank can be handed one."""

    @property
    def aggregation(self) -> Aggregation:
        """Which weights the tokens shall come with."""
        ...

    @property
    def needs_proximal(self) -> bool:
        """Whether the proximal policy's log-probs are used."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether the reference policy's log-probs are used."""
        ...

    def __call__(self, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss, the sum of `weights_N` times each token's loss, and SUMS over tokens of its statistics.

        The engine adds both up over micro-batches and ranks, and divides the statistics by the step's token count.
        """
        ...


Guard: TypeAlias = Callable[[Mapping[str, float]], "str | None"]
"""Looks at the means of a step's statistics before the step is taken; a sentence refuses it. Picklable, and it decides
the same on every rank."""


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A tensor that the engine that samples serves: its Hugging Face name, its dtype as torch names it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class WeightChanges:
    """What changed in a tensor: positions_N int64, ascending, in C order; elements_N, the new bits as unsigned numbers
    of the element's size."""

    positions: npt.NDArray[np.int64]
    elements: npt.NDArray[Any]


class TrainEngine(Protocol):
    """A model being trained."""

    @property
    def policy_version(self) -> int:
        """Optimiser steps taken so far."""
        ...

    def step(
        self, sequences: Sequence[TrainSequence], objective: Objective, learning_rate: float, guard: Guard | None = None
    ) -> Mapping[str, float]:
        """One optimiser step over these sequences (`learner.minibatches` of them, where that is more than one), in
        micro-batches; returns means of the statistics and grad_norm.

        Raises TrainingError, with the weights untouched, where loss or gradient norm is not finite, or `guard` refuses.
        """
        ...

    def weight_layout(self) -> Sequence[WeightSpec]:
        """What is published: the state dict's tensors, tied ones once, adapters merged; in the order to read them."""
        ...

    def read_weight(self, name: str) -> torch.Tensor:
        """One of them as it is now; valid until the next one is read, or the next step."""
        ...

    def changed_weight(self, name: str) -> WeightChanges | None:
        """What changed in it since `mark_published`, which counts as published from now on; None where the engine does
        not know, and the whole must be read. Either all that it knows is asked for, or `mark_published` follows."""
        ...

    def mark_published(self) -> None:
        """The weights as they are now are what is published."""
        ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them, one after another; each is valid until the next one is asked for."""
        ...

    def reset_optimizer(self) -> None:
        """Forget the optimiser's moments (not the weights): another objective begins."""
        ...

    def save(self, directory: Path) -> None:
        """Write model, optimiser and counters into an existing empty directory; the caller makes it visible."""
        ...

    def snapshot(self, directory: Path) -> Callable[[], None]:
        """Copy now what `save` would write. The returned function writes it into `directory`, which exists and is
        empty, from any thread, while steps go on; it must have returned before the next snapshot or save.

        On ranks other than 0 the function is called by the engine itself; rank 0's returns when all ranks' files are
        written, and raises OSError where one could not be.
        """
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, bit for bit."""
        ...

    def close(self) -> None:
        """Release the process group."""
        ...


class TrainingError(Exception):
    """A step that must not happen: non-finite loss or gradient."""
