"""TensorBoard's event files, by its own library and PyTorch's writer. Knows nothing of steps but their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w
from torch.utils.tensorboard import SummaryWriter

from learner.sinks.points import Points


class TensorboardSink:
    """A writer for each axis, since a resumed run takes back what an axis has beyond its checkpoint.

    purge: by axis, the first place that a resumed run writes again.
    """

    name = "tensorboard"

    def __init__(self, directory: Path, config: dict[str, Any], purge: dict[str, int]) -> None:
        self._directory = directory
        self._config = config
        self._purge = purge
        self._writers: dict[str, Any] = {}

    def open(self) -> None:
        """The run's settings, as a text."""
        writer = self._writer("step")
        writer.add_text("config", f"```toml\n{tomli_w.dumps(self._config)}\n```", 0)
        writer.flush()

    def write(self, points: Points) -> None:
        """Write and flush, so that a killed learner has lost nothing here."""
        writer = self._writer(points.axis)
        for name, value in points.values.items():
            writer.add_scalar(name, value, points.at, points.time)
        writer.flush()

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, axis: str) -> Any:
        if axis not in self._writers:
            place = self._directory if axis == "step" else self._directory / axis
            purge = self._purge[axis]
            make: Any = SummaryWriter  # which has no types
            self._writers[axis] = make(str(place), purge_step=purge if self._goes_on(place) else None)
        return self._writers[axis]

    def _goes_on(self, place: Path) -> bool:
        return any(place.glob("events.*"))
