"""What a run's folder says of the run: settings, the learner's records, the audit, counts of the processes. Only reads.

Works on a finished run, on one that is being written and on a copy of its folder elsewhere. A record that a resumed
learner wrote again replaces the one of the lost history.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from broker.process.config import load_settings
from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from deploy.run import CONFIG, SUMMARY
from deploy.scrape import JsonLines
from deploy.tally import FILE, Key, read_tally

METRICS: Final = "metrics.jsonl"
AUDIT: Final = "trained.jsonl"

Record = Mapping[str, Any]


@dataclass(slots=True)
class Run:
    """A run's folder, read. `steps`: a record for each optimiser step, in order. `others`: skipped, refused and alarm.

    `began`: of each learner process, the newest last. `evaluations`: by name, in the order in which they were complete.
    `audit`: lines of trained.jsonl by fate and reason; `num_repeated`: those of a ticket that stood there already.
    """

    config: Path
    directory: Path
    settings: Settings
    steps: list[Record] = field(default_factory=list)
    others: list[Record] = field(default_factory=list)
    warm_start: list[Record] = field(default_factory=list)
    began: list[Record] = field(default_factory=list)
    evaluations: dict[str, Record] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    first_at: float | None = None
    last: Mapping[str, Any] = field(default_factory=dict)
    audit: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_repeated: int = 0
    totals: Mapping[Key, float] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float | None:
        """Sum of what all processes counted under a metric and these labels; None where nobody counted it."""
        wanted = set(labels.items())
        values = [value for (_, metric, of), value in self.totals.items() if metric == name and wanted <= of]
        return sum(values) if values else None

    def by_label(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """The same for each value of a label."""
        found: dict[str, float] = {}
        for (_, metric, of), value in self.totals.items():
            has = dict(of)
            if metric == name and label in has and set(labels.items()) <= of:
                found[has[label]] = found.get(has[label], 0.0) + value
        return dict(sorted(found.items()))

    def _take(self, record: Record) -> None:
        event, step = record["event"], record["step"]
        self.first_at = record["time"] if self.first_at is None else self.first_at
        self.last = record
        if event == "step":
            self.steps = [each for each in self.steps if each["step"] < step] + [record]
            self.others = [each for each in self.others if each["step"] <= step]
        elif event in ("skipped", "refused", "alarm"):
            self.others.append(record)
        elif event == "warm_start":
            self.warm_start = [each for each in self.warm_start if each["number"] < record["number"]] + [record]
        elif event == "began":
            self.began.append(record)
        elif event == "evaluation":
            self.evaluations.pop(record["evaluation"], None)
            self.evaluations[record["evaluation"]] = record


def find_run(place: Path, overrides: tuple[str, ...] = ()) -> tuple[Path, Path, Settings]:
    """(the TOML, the folder, the settings) of a run. place: its folder, wherever it was copied to, or a TOML, whose
    settings name the folder. Raises ErgonError where there is none."""
    if place.is_file():
        settings = load_settings(place, overrides)
        return place, settings.run_dir, settings
    if not place.is_dir():
        raise ErgonError(f"{place} does not exist; name a run's folder, as runs/NAME, or its TOML")
    config = place / CONFIG
    if not config.is_file():
        inside = sorted(path.parent.name for path in place.glob(f"*/{CONFIG}"))
        remedy = f"name one in it: {', '.join(inside[:8])}" if inside else "name one, as runs/NAME"
        raise ErgonError(f"{place} is no run's folder (there is no {CONFIG} in it); {remedy}")
    return config, place, load_settings(config, overrides, environ={})


def read_run(place: Path) -> Run:
    """Everything but the trajectories. Raises ErgonError where there is no run, or nothing was recorded yet."""
    config, directory, settings = find_run(place)
    records = _lines(directory / METRICS)
    if not records:
        raise ErgonError(
            f"{directory} holds nothing yet: its learner writes {METRICS} once it has begun; start the run with "
            f"`ergon run`, wait a minute, or look for the reason in {directory / 'logs'}"
        )
    run = Run(config, directory, settings)
    for record in records:
        run._take(record)
    _read_audit(run)
    summary = directory / SUMMARY
    run.summary = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    run.totals = dict(read_tally(directory / FILE))
    return run


def _read_audit(run: Run) -> None:
    ids: set[str] = set()
    for line in _lines(run.directory / AUDIT):
        run.audit[line["fate"], line["reason"]] += 1
        run.num_repeated += line["ticket_id"] in ids
        ids.add(line["ticket_id"])


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return JsonLines(path).read()
    except ValueError as error:
        raise ErgonError(f"{path} is damaged ({error}); mend or remove that line") from error


def changed_settings(settings: Settings) -> list[tuple[str, Any, Any]]:
    """(key, value, default) of each setting that is not the default, in the order of the reference."""
    return list(_changed(settings.model_dump(mode="json"), Settings().model_dump(mode="json"), ""))


def _changed(mine: Any, default: Any, at: str) -> list[tuple[str, Any, Any]]:
    if isinstance(mine, dict) and isinstance(default, dict):
        return [each for key in mine for each in _changed(mine[key], default.get(key), f"{at}.{key}" if at else key)]
    return [] if mine == default else [(at, mine, default)]
