"""Pictures of a report, as SVG: lines with intervals, and bars. Draws; knows nothing of runs.

Colours, dashes and the size of letters are classes of `style.css`, so that a picture follows the page into the dark.
Every picture has a title for those who do not see it; what it says is also in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

import svg

NUM_STYLES: Final = 8  # colours and dashes in style.css; the ninth line looks like the first
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 250, 64, 12, 10, 40
_ROW_H, _NAMES_W = 26, 150
_LETTER_W = 6.2
_ASIDE = 3.0
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Line:
    """A line: its points, and where they are known intervals (x, low, high)."""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis is of; `bounds` that it has at least, and names of places on it instead of numbers."""

    name: str
    bounds: tuple[float, float] | None = None
    names: Mapping[float, str] | None = None


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover low to high, `most` steps or fewer."""
    span = high - low if high > low else abs(high) or 1.0
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(each * power for each in _STEPS if each * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A number of an axis or a table, as short as three or four digits allow."""
    if value != value or math.isinf(value):
        return "–"
    size = abs(value)
    if size < 1e12 and value == int(value):
        return f"{value:,.0f}"
    if size >= 100_000 or size < 0.001:
        return f"{value:.2e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def lines(title: str, drawn: Sequence[Line], across: Axis, up: Axis) -> str:
    """Lines over a common axis. Points that are no number are left out."""
    drawn = [Line(each.name, _finite(each.points), each.intervals) for each in drawn]
    xs = [x for each in drawn for x, _ in each.points] or [0.0]
    ys = [y for each in drawn for _, y in each.points] + [y for e in drawn for _, *ends in e.intervals for y in ends]
    low, high = min([*ys, *(up.bounds or ())], default=0.0), max([*ys, *(up.bounds or ())], default=1.0)
    rows = ticks(low, high)
    frame = _Frame((min(xs), max(xs)), (rows[0], rows[-1]))
    elements = frame.rows(rows, up.name) + frame.columns(across, xs)
    dodges = any(each.intervals for each in drawn)  # or intervals of two lines would lie on each other
    for place, each in enumerate(drawn):
        style, aside = f"s{place % NUM_STYLES}", (place - (len(drawn) - 1) / 2) * _ASIDE if dodges else 0.0
        elements += [frame.whisker(*interval, style, aside) for interval in each.intervals]
        points = [(round(x + aside, 1), y) for x, y in (frame.at(*point) for point in each.points)]
        elements.append(svg.Polyline(points=[svg.Point(*point) for point in points], class_=["line", style]))
        if len(points) <= 40:
            elements += [svg.Circle(cx=x, cy=y, r=2.6, class_=["dot", style]) for x, y in points]
    return _picture(title, _WIDTH, _HEIGHT, elements)


def bars(title: str, rows: Sequence[tuple[str, Sequence[float]]], unit: str) -> str:
    """A bar for each row, its parts one after the other; numbers at its end."""
    longest = max((sum(parts) for _, parts in rows), default=0.0) or 1.0
    room = _WIDTH - _NAMES_W - 76
    elements: list[svg.Element] = []
    for place, (name, parts) in enumerate(rows):
        y, x = place * _ROW_H + 4, float(_NAMES_W)
        shown = name if len(name) * _LETTER_W < _NAMES_W else name[: int(_NAMES_W / _LETTER_W) - 1] + "…"
        elements.append(svg.Text(x=_NAMES_W - 6, y=y + 14, text=escape(shown), text_anchor="end"))
        for part, value in enumerate(parts):
            width = round(room * value / longest, 1)
            elements.append(
                svg.Rect(x=round(x, 1), y=y, width=width, height=18, class_=["bar", f"s{part % NUM_STYLES}"])
            )
            x += width
        elements.append(svg.Text(x=round(x, 1) + 5, y=y + 14, text=escape(f"{number(sum(parts))}{unit}")))
    return _picture(title, _WIDTH, len(rows) * _ROW_H + 8, elements)


class _Frame:
    """The plane that lines are drawn in."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self._x0, self._x1 = xs if xs[1] > xs[0] else (xs[0] - 1, xs[0] + 1)
        self._y0, self._y1 = ys

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is in the picture."""
        across = (x - self._x0) / (self._x1 - self._x0)
        up = (y - self._y0) / (self._y1 - self._y0)
        room = _WIDTH - _LEFT - _RIGHT - 12
        return round(_LEFT + 6 + across * room, 1), round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1)

    def rows(self, values: Sequence[float], name: str) -> list[svg.Element]:
        """Horizontal grid with its numbers, and what they are of."""
        elements: list[svg.Element] = []
        for value in values:
            _, y = self.at(self._x0, value)
            elements.append(svg.Line(x1=_LEFT, y1=y, x2=_WIDTH - _RIGHT, y2=y, class_=["grid"]))
            elements.append(svg.Text(x=_LEFT - 5, y=y + 4, text=number(value), text_anchor="end"))
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        turned: list[svg.Transform] = [svg.Rotate(-90, 11, middle)]
        elements.append(svg.Text(x=11, y=middle, text=escape(name), text_anchor="middle", transform=turned))
        return elements

    def columns(self, axis: Axis, xs: Sequence[float]) -> list[svg.Element]:
        """Places along the horizontal axis with their numbers or names, and what they are of."""
        y = _HEIGHT - _BOTTOM
        names = axis.names or {x: number(x) for x in ticks(min(xs), max(xs)) if self._x0 <= x <= self._x1}
        elements: list[svg.Element] = [svg.Line(x1=_LEFT, y1=y, x2=_WIDTH - _RIGHT, y2=y, class_=["axis"])]
        taken = -math.inf
        for value, name in sorted(names.items()):
            x, half = self.at(value, self._y0)[0], len(name) * _LETTER_W / 2
            if x - half > taken:  # names that would lie on each other are left out
                elements.append(svg.Text(x=x, y=y + 15, text=escape(name), text_anchor="middle"))
                taken = x + half
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        elements.append(svg.Text(x=middle, y=_HEIGHT - 6, text=escape(axis.name), text_anchor="middle"))
        return elements

    def whisker(self, x: float, low: float, high: float, style: str, aside: float) -> svg.Element:
        """An interval, a little aside."""
        (at, bottom), (_, top) = self.at(x, low), self.at(x, high)
        at = round(at + aside, 1)
        return svg.Line(x1=at, y1=bottom, x2=at, y2=top, class_=["interval", style])


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _picture(title: str, width: int, height: int, elements: list[svg.Element]) -> str:
    said: list[svg.Element] = [svg.Title(elements=[], text=escape(title)), *elements]
    box, label = svg.ViewBoxSpec(0, 0, width, height), escape(title, {'"': "&quot;"})
    return svg.SVG(viewBox=box, class_=["chart"], extra={"role": "img", "aria-label": label}, elements=said).as_str()
