"""What the sinks have written, read by the libraries' own readers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from learner.sinks.weights_and_biases import ID_FILE


def tensorboard_curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """By the name of each curve: its steps and values, in the order in which TensorBoard has them."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def tensorboard_text(directory: Path) -> str:
    """The settings that were written."""
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0})
    events.Reload()
    (tensor,) = {event.tensor_proto.string_val[0] for event in events.Tensors("config/text_summary")}
    return tensor.decode()


@dataclass(slots=True)
class WandbRun:
    """One `.wandb` file: the run's id, its settings, and its lines."""

    run_id: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[Mapping[str, Any]] = field(default_factory=list)


def wandb_runs(run_dir: Path) -> list[WandbRun]:
    """Those of every start of the learner, in their order, as `wandb leet inspect` shows them. A killed one's file may
    end in the middle of a record."""
    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", path]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        made = WandbRun()
        for record in map(json.loads, shown.stdout.splitlines()):
            if record["type"] == "run":
                made.run_id = record["run"]["run_id"]
                made.config |= record["run"]["config"]["update"]
            elif record["type"] == "history":
                made.history.append(record["history"]["item"])
        found.append(made)
    return found


def kept_id(run_dir: Path) -> str:
    """The id in the run's folder."""
    return (run_dir / ID_FILE).read_text()
