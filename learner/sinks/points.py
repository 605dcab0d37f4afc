"""From a line of metrics.jsonl to points of curves: names, numbers and the place on the axis. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PLACE = frozenset(("event", "time", "phase", "step", "version", "lineage"))
OWN_CURVES = frozenset(("before", "after-warm-start"))
"""Evaluations that belong to no step of reinforcement learning; all others are one curve over the steps."""


@dataclass(frozen=True, slots=True)
class Points:
    """Numbers by the names of their curves, all at one place of the axis.

    axis: `step` (of reinforcement learning) or `warm_start` (supervised steps). time: Unix.
    """

    axis: str
    at: int
    time: float
    values: Mapping[str, float]


def points_of(record: Mapping[str, Any]) -> Points | None:
    """What a line says in numbers; None where it says nothing."""
    event = record["event"]
    axis, at = "step", int(record["step"])
    fields = {key: value for key, value in record.items() if key not in PLACE}
    if event in ("step", "skipped"):
        values = dict(_flat("train" if event == "step" else "skipped", fields))
        values["train/version"] = float(record["version"])
    elif event == "warm_start":
        axis, at = "warm_start", int(fields.pop("number"))
        fields.pop("of", None)
        values = dict(_flat("warm_start", fields))
    elif event == "evaluation":
        phase = fields.pop("evaluation")
        if phase.startswith("step-"):  # steps went on while it was made
            at = int(phase.removeprefix("step-"))
        values = dict(_flat(f"eval/{phase}" if phase in OWN_CURVES else "eval", fields))
    elif event == "alarm":
        values = {f"alarm/{fields['kind']}": float(fields["raised"])}
    elif event == "refused":
        values = {"train/refused": 1.0}
    else:
        return None
    return Points(axis, at, float(record["time"]), values)


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}/{key}", inner)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for point in value:  # of a curve over thinking budgets
            if isinstance(point, Mapping) and "budget" in point:
                rest = {key: inner for key, inner in point.items() if key != "budget"}
                yield from _flat(f"{name}/{point['budget']}", rest)
