"""What a batch was refused for: its trajectories in a file, and a way to try them again. Owns the folder `quarantine`.

A refused batch (a loss or gradient that is not finite, or one that a guard calls collapsed) changes no weights and is
published never. Its trajectories are on disk here before their tickets are acknowledged. To look at one:

    python -m learner.quarantine --config runs/NAME/config.toml runs/NAME/quarantine/step-7.msgpack

makes the batch anew, takes the step on the newest checkpoint's weights and says what came of it; nothing is kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from broker.process.config import load_settings
from broker.process.learner_settings import LearnerSection
from broker.process.lifecycle import ErgonError, run_main
from broker.protocol.trajectory import Trajectory
from learner.batching import Batch, Batcher
from learner.health import Guard
from learner.recording import SUFFIX, read_trajectories, write_trajectories


class Quarantine:
    """Writes refused batches, each into a file of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, batch: Batch, step: int, version: int, error: str) -> Path:
        """Write a batch's trajectories, and beside them why; durable when this returns."""
        self._directory.mkdir(parents=True, exist_ok=True)
        name, number = f"step-{step}", 1
        while (path := self._directory / f"{name}{SUFFIX}").exists():
            number += 1
            name = f"step-{step}-{number}"
        trajectories = [item.trajectory for item in batch.consumed if item.trained]
        ids = [trajectory.ticket.ticket_id for trajectory in trajectories]
        reason = {"error": error, "step": step, "version": version, "ticket_ids": ids}
        reason["overrun_price"] = batch.overrun_price
        path.with_suffix(".json").write_text(json.dumps(reason, indent=1))
        write_trajectories(path, trajectories)
        return path


def rebuilt(
    trajectories: Sequence[Trajectory], settings: LearnerSection, version: int, overrun_price: float = 0.0
) -> Batch:
    """The batch of these trajectories, as a learner at this version, with this price, would make it."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.ticket.group_id, []).append(trajectory)
    batcher = make_batcher(settings, num_groups=len(groups))
    batcher.overrun_price = overrun_price
    for group_id, members in groups.items():
        size = members[0].ticket.group_size
        for trajectory in members:
            batcher.add(trajectory)
        for i in range(size - len(members)):  # the rest of the group did not count
            batcher.add_dead(_Missing(f"{group_id}/missing-{i}", group_id))
    batch = batcher.next(version)
    if batch is None:
        raise ErgonError("the file has no trajectories of which a batch could be made")
    return batch


def make_batcher(settings: LearnerSection, num_groups: int | None = None) -> Batcher:
    """The batcher that a run's settings ask for; `num_groups`: of one batch, where it is not the settings' number."""
    return Batcher(
        groups_per_step=num_groups or settings.groups_per_step,
        max_groups_per_step=num_groups or settings.max_groups_per_step,
        group_size=settings.group_size,
        max_staleness=settings.max_staleness,
        loss=settings.loss,
    )


def _price(file: Path) -> float:
    """What thinking beyond a soft budget cost in the batch of this file, from what was written beside it."""
    reason = file.with_suffix(".json")
    try:
        return float(json.loads(reason.read_text()).get("overrun_price", 0.0))
    except (OSError, ValueError) as error:
        raise ErgonError(f"{reason}, which belongs to {file.name}, cannot be read: {error}") from error


class _Missing:
    def __init__(self, ticket_id: str, group_id: str) -> None:
        self.ticket_id, self.group_id = ticket_id, group_id


def main() -> None:
    """Try a refused batch again on the newest checkpoint of its run, and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m learner.quarantine", description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("file", type=Path, help="a file of the run's quarantine")
    arguments = parser.parse_args()
    settings = load_settings(arguments.config, arguments.overrides)
    trajectories = list(read_trajectories(arguments.file, checked=False))

    from learner.checkpoint import CheckpointStore
    from learner.engine import TrainingError
    from learner.losses.policy import policy_loss
    from learner.training.deepspeed_engine import DeepSpeedEngine

    engine = DeepSpeedEngine(settings)
    checkpoint = CheckpointStore(settings.run_dir / "checkpoints", settings.learner.keep_checkpoints).newest()
    if checkpoint is not None and checkpoint.engine_directory is not None:
        engine.load(checkpoint.engine_directory)
    batch = rebuilt(trajectories, settings.learner, engine.policy_version, _price(arguments.file))
    result: dict[str, object] = {"trajectories": len(trajectories), "version": engine.policy_version}
    try:
        alarms = settings.learner.alarms
        guard = Guard(alarms.collapse_sample_size, alarms.collapse_masked)
        result["stats"] = dict(engine.step(batch.sequences, policy_loss(settings.learner.loss), 0.0, guard))
    except TrainingError as error:
        result["error"] = str(error)
    print(json.dumps(result, indent=1))  # noqa: T201  this is the command's result
    engine.close()


if __name__ == "__main__":
    run_main("quarantine", main)
