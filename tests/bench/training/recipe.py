"""What all trainers of the benchmark have in common: optimiser, loss, and what a step is told to be and tells.

The loss is PPO's clip on policy, averaged over the tokens that the policy sampled: the old log-probs are those of the
forward pass itself, as TRL takes them where every batch is trained on once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tests.bench.training.workload import Lengths, Sample, Shape, draw

if TYPE_CHECKING:
    import torch

    from learner.engine import Objective, TokenBatch

LEARNING_RATE = 1e-6  # so small that the policy of the last step is that of the first, as far as the work goes
BETAS = (0.9, 0.95)
MAX_NORM = 1.0
CLIP_LOW, CLIP_HIGH = 0.2, 0.28

_FEW = Lengths(16, 0.1, 8, 24)
SHORT = Shape(prompt=_FEW, turn=_FEW, observation=_FEW, more_turns=0.0)

# Of these the gradients are compared: the first and the last layers, an attention and an MLP, and a norm.
WATCHED = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.{last}.self_attn.v_proj.weight",
    "model.layers.{last}.mlp.gate_proj.weight",
    "model.norm.weight",
)

Gradient = dict[str, npt.NDArray[np.float32]]


class Order(NamedTuple):
    """One step to take: on which batch. short: one of a few tokens, to warm up."""

    seed: int
    num_groups: int
    group_size: int
    short: bool = False

    def samples(self) -> list[Sample]:
        """The batch."""
        return draw(self.seed, self.num_groups, self.group_size, SHORT if self.short else None)


class Setup(NamedTuple):
    """How a trainer is made. rows: episodes in a padded micro-batch; tokens: tokens in a packed one."""

    model: str
    dtype: str
    threads: int
    rows: int
    tokens: int


class Told(NamedTuple):
    """What a trainer says of a step. num_processed: token positions that went through the model, padding included."""

    loss: float
    grad_norm: float
    num_processed: int
    num_micro_batches: int


class Trainer(Protocol):
    """One way to train."""

    def step(self, samples: list[Sample]) -> Told:
        """One optimiser step on these episodes."""
        ...

    def gradient(self) -> Gradient:
        """The clipped gradient of the first step, of the watched parameters: Adam's first moment tells it."""
        ...


def watched(num_layers: int) -> list[str]:
    """The names of the watched parameters in a model of so many layers."""
    return [name.format(last=num_layers - 1) for name in WATCHED]


def first_gradient(moment: torch.Tensor) -> npt.NDArray[np.float32]:
    """The gradient that the first step of Adam saw, from the moment that it left."""
    gradient: npt.NDArray[np.float32] = (moment.detach().float() / (1 - BETAS[0])).cpu().numpy()
    return gradient


class OnPolicy:
    """An objective of ours whose behaviour log-probs are those of the forward pass."""

    needs_proximal = False
    needs_reference = False

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.aggregation = objective.aggregation

    def __call__(self, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """As the objective."""
        return self._objective(replace(batch, behaviour_logprobs_N=batch.logprobs_N.detach()))


def disagreement(one: Gradient, other: Gradient) -> float:
    """The largest relative difference (of the norms) over the parameters of two gradients."""
    return max(float(np.linalg.norm(one[name] - other[name]) / np.linalg.norm(one[name])) for name in one)
