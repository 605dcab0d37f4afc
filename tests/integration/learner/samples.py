"""Sequences and settings for tests of the training engine, in one process or in several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from broker.process.settings import Settings
from learner.engine import TrainSequence
from tests.ports import free_port

PROMPT = list(range(20, 32))


MASTER_PORT = free_port()  # one process group for all tests of a process


def engine_settings(model_path: Path, **learner: Any) -> Settings:
    """Settings of an engine with small micro-batches, so that there are several."""
    values = {"micro_batch_tokens": 64, "master_port": MASTER_PORT, **learner}
    return Settings.model_validate({"model": {"path": str(model_path)}, "learner": values})


def make_sequence(
    tokens: list[int], num_prompt: int, advantage: float = 1.0, logprobs: list[float] | None = None
) -> TrainSequence:
    """A trace whose tokens after the prompt are trained on."""
    mask = np.asarray([t >= num_prompt for t in range(len(tokens))])
    behaviour = np.zeros(len(tokens), dtype=np.float32)
    if logprobs is not None:
        behaviour[num_prompt:] = logprobs
    ids = np.asarray(tokens, dtype=np.int32)
    return TrainSequence(ids, mask, behaviour, advantage, np.zeros(len(tokens), dtype=np.int32))


def random_sequences(count: int, seed: int = 0, *, siblings: bool = True) -> list[TrainSequence]:
    """Traces of one prompt that share the beginning of their answers, or of prompts of their own."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        prompt = PROMPT if siblings else rng.integers(3, 400, rng.integers(3, 20)).tolist()
        answer = [41, 42, 43, *rng.integers(3, 400, rng.integers(1, 15)).tolist()]
        sequences.append(make_sequence(prompt + answer, len(prompt), float(rng.normal())))
    return sequences


def mixed_sequences() -> list[TrainSequence]:
    """A batch of both kinds, which makes prefix trees and chains."""
    return random_sequences(8, seed=3, siblings=False) + random_sequences(6, seed=4)
