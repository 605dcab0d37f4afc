"""The batch that every trainer of the benchmark trains on, and the layouts it is put into: pure numpy.

Groups of siblings that share a prompt, several turns each, the policy's tokens alternating with what tools answered;
lengths are log-normal, so that a few episodes are many times as long as most (as agents' are). Tokens are random:
siblings share their prompt and nothing else, less than real ones do. Owns no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from learner.engine import TrainSequence

Ids = npt.NDArray[np.int32]
FIRST_ID, LAST_ID = 1000, 40_000  # ordinary words of the vocabulary, far from its special tokens


@dataclass(frozen=True, slots=True)
class Lengths:
    """Median and shape of a log-normal number of tokens, and its bounds."""

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        """One length."""
        return int(np.clip(round(self.median * np.exp(self.sigma * rng.standard_normal())), self.low, self.high))


@dataclass(frozen=True, slots=True)
class Shape:
    """What episodes look like. more_turns: the chance that another turn follows; max_completion cuts longer ones."""

    prompt: Lengths = Lengths(64, 0.6, 16, 256)
    turn: Lengths = Lengths(20, 0.9, 3, 200)
    observation: Lengths = Lengths(12, 1.1, 3, 160)
    more_turns: float = 0.5
    max_turns: int = 8
    max_completion: int = 512


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One episode. sampled_C: whether the policy chose the completion's token, or a tool's answer brought it."""

    group: int
    prompt_P: Ids
    completion_C: Ids
    sampled_C: npt.NDArray[np.bool_]
    reward: float

    @property
    def num_tokens(self) -> int:
        """Of prompt and completion."""
        return len(self.prompt_P) + len(self.completion_C)


@dataclass(frozen=True, slots=True, eq=False)
class Padded:
    """B episodes as a rectangle: prompts padded on the left to the longest, completions on the right to theirs."""

    input_ids_BT: npt.NDArray[np.int64]
    attention_BT: npt.NDArray[np.int64]
    loss_mask_BC: npt.NDArray[np.bool_]
    advantages_B: npt.NDArray[np.float32]

    @property
    def num_completion(self) -> int:
        """Columns of the completions, the last ones."""
        return int(self.loss_mask_BC.shape[1])

    def rows(self, low: int, high: int) -> Padded:
        """Some of the episodes, padded as all of them are."""
        chosen = slice(low, high)
        return Padded(
            self.input_ids_BT[chosen], self.attention_BT[chosen], self.loss_mask_BC[chosen], self.advantages_B[chosen]
        )


def draw(seed: int, num_groups: int, group_size: int, shape: Shape | None = None) -> list[Sample]:
    """`num_groups` groups, in order; every group has rewards of both kinds, and so a gradient."""
    shape = shape or Shape()
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    for group in range(num_groups):
        prompt_P = _ids(rng, shape.prompt.draw(rng))
        rewards_G = (rng.permutation(group_size) < rng.integers(1, group_size)).astype(np.float64)
        samples += [_sample(rng, shape, group, prompt_P, float(reward)) for reward in rewards_G]
    return samples


def _ids(rng: np.random.Generator, num: int) -> Ids:
    return rng.integers(FIRST_ID, LAST_ID, num).astype(np.int32)


def _sample(rng: np.random.Generator, shape: Shape, group: int, prompt_P: Ids, reward: float) -> Sample:
    """Turn, observation, turn, ..., turn."""
    pieces = [True] * shape.turn.draw(rng)
    for _ in range(shape.max_turns - 1):
        if rng.random() >= shape.more_turns:
            break
        pieces += [False] * shape.observation.draw(rng) + [True] * shape.turn.draw(rng)
    sampled_C = np.asarray(pieces[: shape.max_completion], dtype=np.bool_)
    return Sample(group, prompt_P, _ids(rng, len(sampled_C)), sampled_C, reward)


def advantages(samples: Sequence[Sample]) -> npt.NDArray[np.float32]:
    """Each episode's reward minus the mean of its group."""
    rewards_B = np.asarray([sample.reward for sample in samples])
    groups_B = np.asarray([sample.group for sample in samples])
    means = {int(group): float(rewards_B[groups_B == group].mean()) for group in np.unique(groups_B)}
    return np.asarray([s.reward - means[s.group] for s in samples], dtype=np.float32)


def train_sequences(samples: Sequence[Sample]) -> list[TrainSequence]:
    """The episodes as the learner's batcher hands them over, sampled by the newest version."""
    made = []
    for sample, advantage in zip(samples, advantages(samples), strict=True):
        ids_T = np.concatenate([sample.prompt_P, sample.completion_C])
        mask_T = np.concatenate([np.zeros(len(sample.prompt_P), np.bool_), sample.sampled_C])
        zeros_T = np.zeros(len(ids_T), np.float32)
        made.append(TrainSequence(ids_T, mask_T, zeros_T, float(advantage), np.zeros(len(ids_T), np.int32)))
    return made


def pad(samples: Sequence[Sample], pad_id: int) -> Padded:
    """The rectangle of all episodes."""
    num_prompt = max(len(sample.prompt_P) for sample in samples)
    num_completion = max(len(sample.completion_C) for sample in samples)
    input_ids_BT = np.full((len(samples), num_prompt + num_completion), pad_id, np.int64)
    attention_BT = np.zeros_like(input_ids_BT)
    loss_mask_BC = np.zeros((len(samples), num_completion), np.bool_)
    for row, sample in enumerate(samples):
        first, end = num_prompt - len(sample.prompt_P), num_prompt + len(sample.completion_C)
        input_ids_BT[row, first:end] = np.concatenate([sample.prompt_P, sample.completion_C])
        attention_BT[row, first:end] = 1
        loss_mask_BC[row, : len(sample.completion_C)] = sample.sampled_C
    return Padded(input_ids_BT, attention_BT, loss_mask_BC, advantages(samples))


def facts(samples: Sequence[Sample]) -> dict[str, Any]:
    """Numbers that describe the batch; `tokens` of all episodes, one by one, `trained` those with a loss."""
    lengths_B = np.asarray([sample.num_tokens for sample in samples])
    trained = sum(int(np.count_nonzero(sample.sampled_C)) for sample in samples)
    return {
        "episodes": len(samples),
        "tokens": int(lengths_B.sum()),
        "trained": trained,
        "median": float(np.median(lengths_B)),
        "longest": int(lengths_B.max()),
        "padded": pad(samples, 0).input_ids_BT.size,
    }
