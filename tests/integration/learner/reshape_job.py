"""What `test_reshape` runs under torchrun: two ranks go on from what one rank saved, and save it in turn.

python -m tests.integration.learner.reshape_job MODEL DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from learner.losses.policy import supervised_loss
from learner.training.deepspeed_engine import DeepSpeedEngine
from learner.training.ranks import Ranks
from learner.training.worker import leave_group
from tests.integration.learner.ranks_job import engine, weights_of
from tests.integration.learner.samples import mixed_sequences, random_sequences

STAGES = (1, 3)


def begun(made: DeepSpeedEngine, directory: Path) -> None:
    """Some steps, so that there are moments, and a checkpoint."""
    for _ in range(3):
        made.step(mixed_sequences(), supervised_loss, 1e-3)
    directory.mkdir(parents=True)
    made.save(directory)


def gone_on(made: DeepSpeedEngine) -> dict[str, Any]:
    """The weights as they are, two more steps, and the weights then."""
    result: dict[str, Any] = {"version": made.policy_version, "weights": weights_of(made)}
    result["further"] = [made.step(random_sequences(6, 9), supervised_loss, 1e-3) for _ in range(2)]
    return result | {"further_weights": weights_of(made)}


def saved_by_one(directory: Path, stage: int) -> Path:
    """Where one rank's checkpoint is."""
    return directory / f"one-{stage}" / "000001" / "engine"


def saved_by_two(directory: Path, stage: int) -> Path:
    """Where two ranks' checkpoint is."""
    return directory / f"two-{stage}" / "000001" / "engine"


def main() -> None:
    """Each stage in an engine of its own."""
    model, directory = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = Ranks(0, 60.0)
    results = {}
    for stage in STAGES:
        with engine(ranks, model, dtype="float32", zero_stage=stage) as made:
            if made is not None:
                made.load(saved_by_one(directory, stage))
                saved_by_two(directory, stage).mkdir(parents=True)
                made.save(saved_by_two(directory, stage))
                results[stage] = gone_on(made)
    if ranks.rank == 0:
        torch.save(results, directory / "results.pt")
    ranks.close(leave_group)


if __name__ == "__main__":
    main()
