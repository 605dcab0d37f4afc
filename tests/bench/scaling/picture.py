"""The simulation's figures as a picture: delivered against offered, and what that took. Draws; measures nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

import svg

from tests.bench.scaling.report import PARTS, Cell, by_profile

_WIDTH, _HEIGHT, _TOP, _BOTTOM, _LEFT, _PLOT_W, _GAP = 900, 360, 86, 52, 62, 360, 84
_STYLE = "text{font:12px sans-serif;fill:#333}.title{font-weight:bold}.axis{stroke:#999}.grid{stroke:#e4e4e4}"
_COLOURS = {"measured": "#3b82c4", "gpu": "#c98a1b", "broker": "#2e8b57", "relay": "#b5484b", "learner": "#7a5fb0"}
_NAMES = {"measured": "small episodes, as measured", "gpu": "long episodes, by arithmetic"}
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def draw(cells: Sequence[Cell]) -> str:
    """The picture, as SVG. Left, on logarithmic axes: delivered trajectories a second of each profile, and dashed what
    was offered. Right: the busiest thread of each part with the profile that has most trajectories, of one core."""
    profiles = by_profile(cells)
    actors = sorted({cell.actors for cell in cells})
    rates = [rate for cell in cells for rate in (cell.offered, cell.delivered) if rate > 0]
    left = _Panel(_LEFT, actors, (_decade(min(rates), math.floor), _decade(max(rates), math.ceil)), logarithmic=True)
    right = _Panel(_LEFT + _PLOT_W + _GAP, actors, (0.0, 1.0), logarithmic=False)
    elements: list[svg.Element] = [svg.Style(text=_STYLE), svg.Rect(width=_WIDTH, height=_HEIGHT, fill="#fff")]
    elements += left.frame("trajectories a second: delivered, and (dashed) offered")
    elements += right.frame("share of one core, busiest thread")
    for number, (profile, some) in enumerate(profiles.items()):
        elements += left.line([(c.actors, c.offered) for c in some], _COLOURS[profile], dashed=True)
        elements += left.line([(c.actors, c.delivered) for c in some], _COLOURS[profile])
        elements += _legend(_LEFT + number * 190, _NAMES[profile], _COLOURS[profile])
    busy = max(profiles.values(), key=lambda some: max(cell.offered for cell in some))
    for number, part in enumerate(PARTS):
        points = [(cell.actors, min(1.0, cell.busiest[part])) for cell in busy]
        elements += right.line(points, _COLOURS[part])
        elements += _legend(_LEFT + _PLOT_W + _GAP + number * 90, part, _COLOURS[part])
    box = svg.ViewBoxSpec(0, 0, _WIDTH, _HEIGHT)
    return svg.SVG(width=_WIDTH, height=_HEIGHT, viewBox=box, elements=elements).as_str()


class _Panel:
    """One pair of axes; its left edge is at x. Numbers of actors are on a logarithmic scale."""

    def __init__(self, x: float, actors: Sequence[int], bounds: tuple[float, float], *, logarithmic: bool) -> None:
        self._x, self._actors, self._logarithmic = x, actors, logarithmic
        self._low, self._high = bounds

    def _at(self, actors: float) -> float:
        low, high = math.log(self._actors[0]), math.log(max(self._actors[-1], self._actors[0] * 2))
        return round(self._x + _PLOT_W * (0.04 + 0.92 * (math.log(actors) - low) / (high - low)), 1)

    def _up(self, value: float) -> float:
        scale: Callable[[float], float] = math.log if self._logarithmic else float
        share = (scale(value) - scale(self._low)) / (scale(self._high) - scale(self._low))
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP), 1)

    def frame(self, title: str) -> list[svg.Element]:
        """Title, grid and labels."""
        right, bottom = self._x + _PLOT_W, _HEIGHT - _BOTTOM
        elements: list[svg.Element] = [
            svg.Text(x=self._x, y=_TOP - 38, text=escape(title), class_=["title"]),
            svg.Text(x=(self._x + right) / 2, y=bottom + 40, text="actors", text_anchor="middle"),
            svg.Line(x1=self._x, y1=bottom, x2=right, y2=bottom, class_=["axis"]),
        ]
        for value in self._ticks():
            y = self._up(value)
            elements.append(svg.Line(x1=self._x, y1=y, x2=right, y2=y, class_=["grid"]))
            elements.append(svg.Text(x=self._x - 6, y=y + 4, text=f"{value:,g}", text_anchor="end"))
        for actors in self._actors:
            elements.append(svg.Text(x=self._at(actors), y=bottom + 18, text=f"{actors:,}", text_anchor="middle"))
        return elements

    def line(self, points: Sequence[tuple[int, float]], colour: str, *, dashed: bool = False) -> list[svg.Element]:
        """These points, joined; what cannot be on a logarithmic axis is left out."""
        places = [(self._at(n), self._up(value)) for n, value in points if value > 0 or not self._logarithmic]
        line = svg.Polyline(points=[svg.Point(*place) for place in places], fill="none", stroke=colour, stroke_width=2)
        if dashed:
            line.stroke_dasharray = [5, 4]
            return [line]
        return [line, *(svg.Circle(cx=x, cy=y, r=3.5, fill=colour) for x, y in places)]

    def _ticks(self) -> Sequence[float]:
        if not self._logarithmic:
            return _TICKS
        first, last = round(math.log10(self._low)), round(math.log10(self._high))
        return [10.0**power for power in range(first, last + 1)]


def _decade(value: float, rounded: Callable[[float], int]) -> float:
    return 10.0 ** rounded(math.log10(value))


def _legend(x: float, text: str, colour: str) -> list[svg.Element]:
    y = _TOP - 18
    return [svg.Circle(cx=x + 5, cy=y - 4, r=5, fill=colour), svg.Text(x=x + 15, y=y, text=escape(text))]
