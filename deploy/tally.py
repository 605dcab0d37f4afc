"""What the processes of a run on this machine counted, over their restarts: `processes.json` in the run's folder.

Counters begin at 0 with each process; here they go on. The supervisor's view feeds it with what it scrapes, so that the
report of a finished run knows what only /metrics said: weights sent, pauses, infrastructure failures. What a process
counted between its last scrape and its end is not in it. On Kubernetes there is no such file, and Prometheus knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from deploy.scrape import Samples

FILE: Final = "processes.json"
_GROWING: Final = ("_total", "_sum", "_count", "_bucket")
_ABOUT: Final = ("ergon_actor_", "ergon_broker_", "ergon_relay_", "ergon_weights_")  # the learner has files of its own

Key = tuple[str, str, frozenset[tuple[str, str]]]


class Tally:
    """Totals by process, metric and labels. Goes on with what the file has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._totals: dict[Key, float] = dict(read_tally(path))
        self._last: dict[Key, float] = {}

    def add(self, process: str, samples: Samples) -> None:
        """Take a scrape of a process."""
        for (name, labels), value in samples.items():
            if not (name.startswith(_ABOUT) and name.endswith(_GROWING)):
                continue
            key = process, name, labels
            before = self._last.get(key, 0.0)
            self._totals[key] = self._totals.get(key, 0.0) + (value - before if value >= before else value)
            self._last[key] = value

    def write(self) -> None:
        """Write the file, whole or not at all."""
        rows = [[process, name, dict(labels), value] for (process, name, labels), value in self._totals.items()]
        draft = self._path.with_name(self._path.name + ".tmp")
        draft.write_text(json.dumps(rows), encoding="utf-8")
        draft.replace(self._path)


def read_tally(path: Path) -> Iterator[tuple[Key, float]]:
    """What a file has; nothing where there is none."""
    rows: list[tuple[str, str, Mapping[str, str], Any]] = json.loads(path.read_bytes()) if path.exists() else []
    for process, name, labels, value in rows:
        yield (process, name, frozenset(labels.items())), float(value)
