"""What a page is made of, before it is HTML: sections of sentences, figures with their tables, facts. Data only.

Nothing in here is escaped; the templates do that to everything but the SVG of `charts.py`, which has done so itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.report.charts import Axis, Line, bars, lines, number

Cell = str | float | int | None


@dataclass(frozen=True, slots=True)
class Table:
    """A table; numbers stand to the right."""

    header: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    caption: str = ""

    def shown(self, cell: Cell) -> str:
        """A cell's text."""
        if cell is None:
            return "–"
        return cell if isinstance(cell, str) else number(cell)

    @staticmethod
    def is_number(cell: Cell) -> bool:
        """Whether it stands to the right."""
        return not isinstance(cell, str)


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture, the names of its lines in the order of their colours, and what it shows as a table."""

    title: str
    svg: str
    table: Table
    legend: tuple[str, ...] = ()
    note: str = ""


@dataclass(slots=True)
class Section:
    """One section. Without anything to show it has a sentence that says so."""

    name: str
    title: str
    sentences: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def line_figure(title: str, drawn: Sequence[Line], across: Axis, up: Axis, note: str = "") -> Figure:
    """Lines and their table: a row for each place along the axis, with the interval behind the value."""
    shown = [line for line in drawn if line.points]
    places = sorted({x for line in shown for x, _ in line.points})
    values = [dict(line.points) for line in shown]
    intervals = [{x: (low, high) for x, low, high in line.intervals} for line in shown]
    names: Mapping[float, str] = across.names or {}
    rows = [
        (names.get(x, number(x)), *(_with_interval(v.get(x), i.get(x)) for v, i in zip(values, intervals, strict=True)))
        for x in places
    ]
    table = Table((across.name, *(line.name for line in shown)), rows)
    legend = tuple(line.name for line in shown) if len(shown) > 1 else ()
    return Figure(title, lines(title, shown, across, up), table, legend, note)


def bar_figure(
    title: str, rows: Sequence[tuple[str, Sequence[float]]], parts: tuple[str, ...], unit: str = "", note: str = ""
) -> Figure:
    """Bars and their table."""
    table = Table(("", *parts), [(name, *values) for name, values in rows])
    return Figure(title, bars(title, rows, unit), table, parts if len(parts) > 1 else (), note)


def of_steps(steps: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the steps that have a number under this key."""
    return [(step["step"], step[key]) for step in steps if isinstance(step.get(key), int | float)]


def seconds(value: float) -> str:
    """A duration."""
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: float) -> str:
    """A number of bytes, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.0f} TB"


def percent(share: float | None) -> str:
    """A share as per cent."""
    return "–" if share is None else f"{100 * share:.0f} %"


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> Cell:
    if value is None or interval is None:
        return value
    return f"{number(value)} ({number(interval[0])} to {number(interval[1])})"
