"""Recording rules and alerts, by the real promtool: each alert fires in one run and not in another."""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.monitoring.scenes import RUN, SCALING, SCENES, Series, fleet, joined, starved

RULES = Path("deploy/monitoring/rules").resolve()
PROMTOOL = Path(sys.prefix) / "bin" / "promtool"
INTERVALS_S = (5, 10)  # between scrapes: the chart's own, and the longest that it takes where actors are scaled


def promtool(*arguments: str) -> str:
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def check(directory: Path, tests: list[dict[str, Any]], every: str = "1m") -> None:
    """Let promtool evaluate the rules on these runs; so often, since it does not go by what a group says."""
    path = directory / "tests.json"  # JSON is YAML
    rules = [str(RULES / name) for name in ("recording.yml", "alerts.yml")]
    path.write_text(json.dumps({"rule_files": rules, "evaluation_interval": every, "tests": tests}))
    promtool("test", "rules", str(path))


def at(
    series: Series, time: int, expr: str, expected: list[dict[str, Any]], *, unit: str = "m", interval: str = "1m"
) -> dict[str, Any]:
    return {
        "interval": interval,
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": expr, "eval_time": f"{time}{unit}", "exp_samples": expected}],
    }


def scaling() -> dict[str, Any]:
    (found,) = (
        group
        for group in yaml.safe_load((RULES / "recording.yml").read_text())["groups"]
        if any(rule["record"] == "run:ergon_actors_wanted:count" for rule in group["rules"])
    )
    return dict(found)


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
        for interval_s in INTERVALS_S:
            series = fleet(state, interval_s)
            wanted = "run:ergon_actors_wanted:count"
            tests.append(at(series, 280, wanted, expected, unit="s", interval=f"{interval_s}s"))
    check(tmp_path, tests, scaling()["interval"])


def test_what_has_become_too_few_is_more_in_time(tmp_path: Path) -> None:
    """20 s after the learner began to wait, at any interval of scrapes that the chart lets through, with one of them
    missed, and however idle the actors were. It is a tenth more at least, which is what an autoscaler acts on."""
    tests = []
    for interval_s, busy, missed in itertools.product(INTERVALS_S, (0.5, 0.9), (None, 0)):
        series = starved(4, busy, interval_s, missed)
        ask = functools.partial(at, series, unit="s", interval=f"{interval_s}s")
        one = [{"labels": "{}", "value": 1}]
        tests.append(ask(260, "count(run:ergon_actors_wanted:count > 4 * 1.1)", one))
        tests.append(ask(240, "count(run:ergon_actors_wanted:count > 4)", []))
    check(tmp_path, tests, scaling()["interval"])


def test_those_that_have_come_are_no_reason_for_yet_more(tmp_path: Path) -> None:
    """The learner's waiting is seen for half a minute after its end, and does not multiply those who ended it."""
    tests = []
    for interval_s in INTERVALS_S:
        ask = functools.partial(at, joined(4, interval_s), unit="s", interval=f"{interval_s}s")
        eight = [{"labels": f"{{{RUN}}}", "value": 8}]
        tests.append(ask(295, "round(max_over_time(run:ergon_actors_wanted:count[1m]))", eight))
        tests.append(ask(295, "ceil(run:ergon_actors_wanted:count)", eight))
    check(tmp_path, tests, scaling()["interval"])


def test_the_chart_s_scrapes_fit_the_window_of_the_rules() -> None:
    """Six samples in it by default, and three with the longest interval that the chart lets through."""
    windows = {int(found) for rule in scaling()["rules"] for found in re.findall(r"\[(\d+)s\]", rule["expr"])}
    values = yaml.safe_load((RULES.parents[1] / "chart" / "values.yaml").read_text())
    assert windows == {30}
    assert values["monitoring"]["interval"] == scaling()["interval"] == f"{INTERVALS_S[0]}s"
    assert 30 / INTERVALS_S[-1] >= 3
