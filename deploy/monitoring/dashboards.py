"""Makes Grafana's dashboards (dashboards/*.json) of panels.yml. Owns their layout and variables; knows no metric.

`python -m deploy.monitoring.dashboards` rewrites the files; a test compares them. The panels are the plainest that
every Grafana from 9 on reads: time series and single numbers, all of one Prometheus data source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field

HERE: Final = Path(__file__).parent
PANELS: Final = HERE / "panels.yml"
DIRECTORY: Final = HERE / "dashboards"

_ALL: Final = 'namespace=~"$namespace",run="$run"'
_SELECTORS: Final = {"all": _ALL} | {
    job: f'{_ALL},job="ergon-{job}"' for job in ("broker", "learner", "actor", "relay")
}
_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS: Final = 24  # of Grafana's grid
_SIZES: Final = {"timeseries": (8, 8), "stat": (4, 4)}  # width and height in its cells


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Panel(_Section):
    """One picture. queries: (expression, legend) or (expression,). quantiles: (histogram with its selector, label)."""

    title: str
    description: str = ""
    unit: str = "short"
    kind: str = Field(default="timeseries", pattern="^(timeseries|stat)$")
    quiet: bool = False
    queries: tuple[tuple[str, ...], ...] = ()
    quantiles: tuple[str, ...] = ()

    def targets(self) -> Iterator[tuple[str, str]]:
        """(expression, legend) of every query, selectors spelt out."""
        if self.quantiles:
            by = ", ".join(("le", *self.quantiles[1:]))
            metric, _, selector = self.quantiles[0].partition("{")
            name = "".join(f" {{{{{label}}}}}" for label in self.quantiles[1:])
            rates = f"sum by ({by}) (rate({metric}_bucket{{{selector}[$__rate_interval]))"
            for share in (0.5, 0.95):
                yield _spelt_out(f"histogram_quantile({share}, {rates})"), f"p{share * 100:g}{name}"
        for expression, *legend in self.queries:
            yield _spelt_out(expression), legend[0] if legend else ""


class Row(_Section):
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


class Dashboard(_Section):
    """One page. `uid` is its file's name, too."""

    uid: str
    title: str
    rows: tuple[Row, ...]


def load() -> tuple[Dashboard, ...]:
    """What panels.yml says."""
    return tuple(Dashboard.model_validate(each) for each in yaml.safe_load(PANELS.read_text(encoding="utf-8")))


def as_json(dashboard: Dashboard) -> str:
    """A dashboard as Grafana's JSON, for its provisioning or import."""
    return json.dumps(_dashboard(dashboard), indent=1) + "\n"


def _spelt_out(expression: str) -> str:
    return re.sub(r"\$(all|broker|learner|actor|relay)\b", lambda match: _SELECTORS[match[1]], expression)


def _dashboard(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["ergon"],
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "schemaVersion": 38,
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "links": [{"title": "Ergon", "type": "dashboards", "tags": ["ergon"], "keepTime": True, "includeVars": True}],
        "templating": {"list": _variables()},
        "panels": list(_panels(dashboard.rows)),
    }


def _variables() -> list[Mapping[str, Any]]:
    def variable(name: str, query: str, **more: Any) -> Mapping[str, Any]:
        found = {"query": query, "refId": name}
        return {"name": name, "type": "query", "datasource": _SOURCE, "query": found, "refresh": 2, "sort": 1, **more}

    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        # Outside Kubernetes no series has a namespace, which `.*` fits.
        variable(
            "namespace",
            "label_values(ergon_broker_issued_total, namespace)",
            includeAll=True,
            allValue=".*",
            multi=True,
        ),
        variable("run", 'label_values(ergon_broker_issued_total{namespace=~"$namespace"}, run)'),
    ]


def _panels(rows: Sequence[Row]) -> Iterator[Mapping[str, Any]]:
    y, number = 0, 0
    for row in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1},
            "panels": [],
        }
        x, y, height = 0, y + 1, 0
        for panel in row.panels:
            width, panel_height = _SIZES[panel.kind]
            if x + width > _COLUMNS:
                x, y, height = 0, y + height, 0
            number += 1
            yield _panel(panel, number, {"x": x, "y": y, "w": width, "h": panel_height})
            x, height = x + width, max(height, panel_height)
        y += height


def _panel(panel: Panel, number: int, place: Mapping[str, int]) -> Mapping[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": expression, "legendFormat": legend or panel.title}
        for i, (expression, legend) in enumerate(panel.targets())
    ]
    options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none"}
    if panel.kind == "timeseries":
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": {}}, "overrides": []},
        "options": options,
        "targets": targets,
    }


def main() -> None:
    """Rewrite the files."""
    DIRECTORY.mkdir(exist_ok=True)
    known = {f"{dashboard.uid}.json": as_json(dashboard) for dashboard in load()}
    for path in DIRECTORY.glob("*.json"):
        if path.name not in known:
            path.unlink()
    for name, text in known.items():
        (DIRECTORY / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
