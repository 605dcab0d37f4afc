"""Held-out reward against thinking budget: `budgets.json` and its picture, `budgets.svg`. Draws; measures nothing.

Both are written anew, whole, whenever an evaluation is complete. The data has every evaluation, the picture the first
and the last ones: before, after the warm start, the newest one during training, after.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import svg

from learner.evaluation import STYLES, Evaluation

DATA, PICTURE = "budgets.json", "budgets.svg"
Point = Mapping[str, Any]
Curve = Sequence[Point]

_COLOURS = {"before": "#8a8a8a", "after-warm-start": "#3b82c4", "during": "#c98a1b", "after": "#2e8b57"}
_WIDTH, _HEIGHT, _TOP, _BOTTOM, _LEFT, _PLOT_W, _GAP = 780, 330, 62, 56, 52, 310, 74
_STYLE = "text{font:12px sans-serif;fill:#333}.title{font-weight:bold}.axis{stroke:#999}.grid{stroke:#e4e4e4}"
_TICKS = 4


def write_curves(directory: Path, evaluations: Mapping[str, Evaluation], per: str) -> None:
    """Write both files into the run's folder. `per`: what a budget is for, a turn or an episode."""
    complete = {phase: e for phase, e in evaluations.items() if e.complete and e.has_budgets}
    curves = {phase: {style: e.curve(style) for style in STYLES} for phase, e in complete.items()}
    _replace(directory / DATA, json.dumps({"per": per, "evaluations": curves}, indent=1) + "\n")
    _replace(directory / PICTURE, draw({phase: by_style["sampled"] for phase, by_style in curves.items()}, per))


def draw(curves: Mapping[str, Curve], per: str) -> str:
    """The picture, as SVG: reward and adherence by budget, a line for each evaluation. Budgets stand side by side in
    their order, which is about a logarithmic scale with room for 0 and unlimited."""
    shown = _shown(curves)
    budgets = list(dict.fromkeys(point["budget"] for curve in shown.values() for point in curve))
    lowest = min((point["reward"] for curve in shown.values() for point in curve), default=0.0)
    highest = max((point["reward"] for curve in shown.values() for point in curve), default=1.0)
    elements: list[svg.Element] = [
        svg.Style(text=_STYLE),
        svg.Rect(width=_WIDTH, height=_HEIGHT, fill="#fff"),
        *_legend(list(shown)),
    ]
    panels = (
        ("held-out reward", "reward", (min(0.0, lowest), max(1.0, highest))),
        ("share that ended thinking by itself", "adherence", (0, 1)),
    )
    for number, (title, key, bounds) in enumerate(panels):
        panel = _Panel(_LEFT + number * (_PLOT_W + _GAP), bounds, budgets)
        elements += panel.frame(title, f"thinking budget, tokens per {per}")
        for phase, curve in shown.items():
            elements += panel.line(curve, key, _colour(phase))
    return svg.SVG(
        width=_WIDTH, height=_HEIGHT, viewBox=svg.ViewBoxSpec(0, 0, _WIDTH, _HEIGHT), elements=elements
    ).as_str()


class _Panel:
    """One pair of axes; its left edge is at x."""

    def __init__(self, x: float, bounds: tuple[float, float], budgets: Sequence[Any]) -> None:
        self._x = x
        self._low, self._high = bounds
        self._budgets = budgets

    def _at(self, budget: Any) -> float:
        return self._x + _PLOT_W * (self._budgets.index(budget) + 0.5) / len(self._budgets)

    def _up(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def frame(self, title: str, across: str) -> list[svg.Element]:
        """Title, grid and labels."""
        right, bottom = self._x + _PLOT_W, self._up(self._low)
        elements: list[svg.Element] = [
            svg.Text(x=self._x, y=_TOP - 14, text=escape(title), class_=["title"]),
            svg.Text(x=(self._x + right) / 2, y=bottom + 40, text=escape(across), text_anchor="middle"),
            svg.Line(x1=self._x, y1=bottom, x2=right, y2=bottom, class_=["axis"]),
        ]
        for tick in range(_TICKS + 1):
            value = self._low + (self._high - self._low) * tick / _TICKS
            y = round(self._up(value), 1)
            elements.append(svg.Line(x1=self._x, y1=y, x2=right, y2=y, class_=["grid"]))
            elements.append(svg.Text(x=self._x - 6, y=y + 4, text=f"{value:.2f}", text_anchor="end"))
        for budget in self._budgets:
            x = round(self._at(budget), 1)
            elements.append(svg.Text(x=x, y=bottom + 18, text=escape(str(budget)), text_anchor="middle"))
        return elements

    def line(self, curve: Curve, key: str, colour: str) -> list[svg.Element]:
        """One evaluation; rewards with their 95 % intervals."""
        places = [(round(self._at(p["budget"]), 1), round(self._up(p[key]), 1), p) for p in curve]
        points = [svg.Point(x, y) for x, y, _ in places]
        elements: list[svg.Element] = [svg.Polyline(points=points, fill="none", stroke=colour, stroke_width=2)]
        for x, y, point in places:
            elements.append(svg.Circle(cx=x, cy=y, r=3.5, fill=colour))
            if key == "reward":
                low, high = (point[key] + sign * point["reward_ci95"] for sign in (-1, 1))
                y1, y2 = (round(self._up(end), 1) for end in (max(low, self._low), min(high, self._high)))
                elements.append(svg.Line(x1=x, y1=y1, x2=x, y2=y2, stroke=colour, stroke_opacity=0.5))
        return elements


def _legend(phases: Sequence[str]) -> list[svg.Element]:
    elements: list[svg.Element] = []
    for number, phase in enumerate(phases):
        x = _LEFT + number * 150
        elements.append(svg.Circle(cx=x, cy=20, r=5, fill=_colour(phase)))
        elements.append(svg.Text(x=x + 10, y=24, text=escape(phase.replace("-", " "))))
    return elements


def _shown(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    during = [phase for phase in curves if phase not in _COLOURS]
    order = ["before", "after-warm-start", *during[-1:], "after"]
    return {phase: curves[phase] for phase in order if curves.get(phase)}


def _colour(phase: str) -> str:
    return _COLOURS.get(phase, _COLOURS["during"])


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
