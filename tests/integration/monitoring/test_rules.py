"""Recording rules and alerts, by the real promtool: each alert fires in one run and not in another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.monitoring.scenes import RUN, SCALING, SCENES, Series, fleet

RULES = Path("deploy/monitoring/rules").resolve()
PROMTOOL = Path(sys.prefix) / "bin" / "promtool"


def promtool(*arguments: str) -> str:
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def check(directory: Path, tests: list[dict[str, Any]]) -> None:
    """Let promtool evaluate the rules on these runs."""
    path = directory / "tests.json"  # JSON is YAML
    rules = [str(RULES / name) for name in ("recording.yml", "alerts.yml")]
    path.write_text(json.dumps({"rule_files": rules, "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", str(path))


def at(series: Series, minutes: int, expr: str, expected: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": expr, "eval_time": f"{minutes}m", "exp_samples": expected}],
    }


def test_the_rules_are_well_formed() -> None:
    promtool("check", "rules", str(RULES / "recording.yml"), str(RULES / "alerts.yml"))


def test_every_alert_has_a_scene() -> None:
    assert {alert["alert"] for alert in alerts()} == set(SCENES)


def test_every_alert_fires_in_one_run_and_not_in_another(tmp_path: Path) -> None:
    """All in one call of promtool, which names the expressions that differ."""
    tests = []
    for name, scene in SCENES.items():
        expr = "count by (alertname, run) (ALERTS{alertstate='firing'})"
        firing = [{"labels": f'{{alertname="{name}",run="a"}}', "value": 1}]
        quiet = f"count by (alertname) (ALERTS{{alertstate='firing',alertname='{name}'}})"
        tests.append(at(scene.fires, scene.minutes, expr, firing))
        tests.append(at(scene.quiet, scene.minutes, quiet, []))
    check(tmp_path, tests)


def test_an_alert_of_a_time_waits_for_it(tmp_path: Path) -> None:
    """What lasts two minutes wakes nobody."""
    waiting = [alert["alert"] for alert in alerts() if "for" in alert]
    expr = "count(ALERTS{{alertstate='firing',alertname='{}'}})"
    assert waiting
    check(tmp_path, [at(SCENES[name].fires, 1, expr.format(name), []) for name in waiting])


def test_a_scene_that_is_wrong_is_found(tmp_path: Path) -> None:
    """promtool's word is worth something."""
    scene = SCENES["ErgonStoreFull"]
    with pytest.raises(AssertionError, match="ErgonStoreFull"):
        check(tmp_path, [at(scene.fires, 5, "count(ALERTS{alertname='ErgonStoreFull'})", [])])


def test_the_number_of_actors_follows_learner_actors_and_staleness(tmp_path: Path) -> None:
    tests = []
    for state in SCALING:
        labels = f"run:ergon_actors_wanted:count{{{RUN}}}"
        expected = [] if state.wanted is None else [{"labels": labels, "value": state.wanted}]
        tests.append(at(fleet(state), 60, "run:ergon_actors_wanted:count", expected))
    check(tmp_path, tests)
