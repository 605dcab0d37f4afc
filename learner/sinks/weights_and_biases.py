"""Weights & Biases, by its own library. One run there for a run here, however often the learner is started again."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Final, Literal

import wandb

from learner.sinks.points import Points

ID_FILE: Final = "wandb-id"


def run_id(directory: Path) -> str:
    """The run's id there, made and kept when it is asked for first."""
    path = directory / ID_FILE
    if not path.exists():
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(secrets.token_hex(6))
        draft.replace(path)
    return path.read_text().strip()


class WandbSink:
    """Axes are metrics of their own, because a resumed run repeats steps, which its own counter does not take."""

    name = "wandb"

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        mode: Literal["offline", "online"],
        project: str,
        entity: str,
        name: str,
    ) -> None:
        self._directory = directory
        self._config = config
        self._place: dict[str, Any] = {"mode": mode, "project": project, "entity": entity or None, "name": name}
        self._run: Any = None

    def open(self) -> None:
        """Begin the run, or go on with it."""
        self._run = wandb.init(
            id=run_id(self._directory),
            resume="allow",
            dir=str(self._directory),
            config=self._config,
            settings=wandb.Settings(console="off", silent=True),
            **self._place,
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("warm_start/step", hidden=True)
        self._run.define_metric("warm_start/*", step_metric="warm_start/step")
        for group in ("train", "skipped", "eval", "alarm"):
            self._run.define_metric(f"{group}/*", step_metric="step")

    def write(self, points: Points) -> None:
        """Write."""
        axis = "step" if points.axis == "step" else f"{points.axis}/step"
        self._run.log({axis: points.at, "_timestamp": points.time, **points.values})

    def close(self) -> None:
        """End it, so that all of it is written or sent."""
        self._run.finish()
