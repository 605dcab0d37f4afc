"""What watches a run fits the code: what queries name exists, every alert is explained."""

import json
import re
from collections.abc import Iterator

import promql_parser
import pytest
import yaml

from deploy.monitoring.dashboards import DIRECTORY, HERE, as_json, load
from tests.reference import LABELS, ROOT

RULES = HERE / "rules"
RUNBOOK = HERE / "RUNBOOK.md"
TARGET_LABELS = {"namespace", "run", "job", "instance"}
FOREIGN = re.compile(r"^(vllm:|process_|up$|ALERTS$)")


def rules(name: str) -> list[dict[str, str]]:
    groups = yaml.safe_load((RULES / f"{name}.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, expression) of every rule and panel."""
    for rule in rules("recording"):
        yield rule["record"], rule["expr"]
    for rule in rules("alerts"):
        yield rule["alert"], rule["expr"]
    for dashboard in load():
        for row in dashboard.rows:
            for panel in row.panels:
                for expression, _ in panel.targets():
                    yield f"{dashboard.uid}/{panel.title}", expression.replace("$__rate_interval", "1m")


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """(metric, labels matched) of every selector of a PromQL expression."""
    found: list[tuple[str, set[str]]] = []

    def visit(node: object) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {matcher.name for matcher in node.matchers.matchers}))
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    yield from found


def documented() -> dict[str, set[str]]:
    """Series names of REFERENCE.md with their labels."""
    names: dict[str, set[str]] = {}
    page = (ROOT / "deploy" / "REFERENCE.md").read_text()
    for name, kind, labels in re.findall(r"^\| `(ergon_\w+)` \| (\w+) \| ([\w, ]*) \|", page, re.MULTILINE):
        own = {label.strip() for label in labels.split(",") if label.strip()}
        if kind == "histogram":
            names |= {f"{name}_bucket": own | {"le"}, f"{name}_sum": own, f"{name}_count": own}
        else:
            names[name] = own
    return names


def test_every_metric_of_a_query_is_documented_with_its_labels() -> None:
    known, recorded = documented(), {rule["record"] for rule in rules("recording")}
    wrong = []
    for where, expression in expressions():
        found = list(selectors(expression))
        assert found, where
        for metric, labels in found:
            if metric in recorded or FOREIGN.match(metric):
                continue
            if metric not in known or not labels <= known[metric] | TARGET_LABELS:
                wrong.append(f"{where}: {metric} {labels}")
    assert not wrong


def test_the_labels_of_legends_exist() -> None:
    for dashboard in load():
        for row in dashboard.rows:
            for panel in row.panels:
                for expression, legend in panel.targets():
                    for label in re.findall(r"{{(\w+)}}", legend):
                        assert label in {*LABELS, *TARGET_LABELS}, (panel.title, legend)
                        if match := re.match(r"(?:sum|histogram_quantile\(0\.\d+, sum) by \(([\w, ]+)\)", expression):
                            assert label in match[1].split(", "), (panel.title, expression)


@pytest.mark.parametrize("dashboard", load(), ids=lambda dashboard: dashboard.uid)
def test_the_committed_dashboards_are_those_of_the_panels(dashboard) -> None:  # type: ignore[no-untyped-def]
    path = DIRECTORY / f"{dashboard.uid}.json"
    assert path.read_text() == as_json(dashboard), "run: make dashboards"
    content = json.loads(path.read_text())
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in content["panels"]]
    assert len(places) == len(set(places))
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in content["panels"])


def test_there_is_no_dashboard_without_panels() -> None:
    assert {path.stem for path in DIRECTORY.glob("*.json")} == {dashboard.uid for dashboard in load()}


def test_every_alert_has_a_section_in_the_runbook_and_none_is_left_over() -> None:
    names = [rule["alert"] for rule in rules("alerts")]
    sections = re.findall(r"^## (Ergon\w+)\n+(.+?)(?=\n## |\Z)", RUNBOOK.read_text(), re.MULTILINE | re.DOTALL)
    assert [name for name, _ in sections] == names, "the sections, in the order of the alerts"
    for name, text in sections:
        assert len(text.split()) >= 30, f"{name} says next to nothing"


def test_every_alert_says_how_bad_it_is_and_of_which_run() -> None:
    for rule in yaml.safe_load((RULES / "alerts.yml").read_text())["groups"][0]["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert "$labels.run" in rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"] == f"deploy/monitoring/RUNBOOK.md#{rule['alert'].lower()}"
