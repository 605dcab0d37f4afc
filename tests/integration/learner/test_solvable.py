"""The learner's own losses on a problem with a known optimum: stale data with the corrections, and without."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from broker.process.loss_settings import LossSection
from tests.integration.learner.solvable import Problem, train

PROBLEM = Problem(np.asarray([[2, 1, 1], [1, 3, 0], [2, 2, 0]]))
UNCORRECTED = LossSection(kind="reinforce", drift_penalty=0.0)
NUM_STEPS, LEARNING_RATE = 160, 8.0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shares_of_optimum(loss: LossSection, staleness: int, seed: int) -> npt.NDArray[np.float64]:
    """Each task's exact value in the last quarter of a run, as a share of the best one."""
    history = train(PROBLEM, loss, staleness=staleness, seed=seed, num_steps=NUM_STEPS, learning_rate=LEARNING_RATE)
    values = np.stack([PROBLEM.values_K(policy_KV) for policy_KV in history[-NUM_STEPS // 4 :]])
    return (values / PROBLEM.values_K(PROBLEM.best_KV)).mean(axis=0)


@pytest.mark.parametrize("staleness", [0, 4, 8])
def test_the_default_recipe_finds_the_optimum_at_any_staleness(staleness: int) -> None:
    for seed in (0, 1):
        shares_K = shares_of_optimum(LossSection(), staleness, seed)
        assert shares_K.min() > 0.92, f"staleness {staleness}, seed {seed}: {shares_K}"


def test_without_corrections_stale_data_stays_away_from_the_optimum() -> None:
    for seed in (0, 1):
        fresh_K = shares_of_optimum(UNCORRECTED, 0, seed)
        stale_K = shares_of_optimum(UNCORRECTED, 8, seed)
        corrected_K = shares_of_optimum(LossSection(), 8, seed)
        assert fresh_K.min() > 0.92  # the problem is not what is too hard
        assert stale_K.min() < 0.8
        assert corrected_K.mean() > stale_K.mean() + 0.1
