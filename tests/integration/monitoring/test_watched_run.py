"""A real run, watched by a real Prometheus: every query has an answer, and an alert arrives where it was sent to.

`make test-monitoring`: two minutes of vLLM, DeepSpeed, Prometheus and Alertmanager. `make test` leaves it out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from broker.process.config import load_settings
from deploy.monitoring.dashboards import HERE, load
from deploy.monitoring.monitor import Page, Prometheus, configuration, program
from tests.chaos.kill_each import Kill, run_with_kills
from tests.integration.deploy.runs import RUN
from tests.integration.weights.ends import until
from tests.ports import free_ports, port_overrides
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.skipif(
    "ERGON_MONITORING" not in os.environ, reason="two minutes; make test-monitoring runs it"
)

ALERT = "ErgonRestartLoop"
RELAY_DEATHS = 3


class Webhook:
    """Where Alertmanager sends to; keeps what came."""

    def __init__(self, port: int) -> None:
        self.arrived: dict[str, dict[str, Any]] = {}
        self.seen = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.arrived |= {alert["labels"]["alertname"]: alert for alert in body["alerts"]}
                if ALERT in outer.arrived:
                    outer.seen.set()
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@contextmanager
def alertmanager(directory: Path, port: int, webhook_port: int) -> Iterator[None]:
    config = directory / "alertmanager.yml"
    receiver = {"name": "webhook", "webhook_configs": [{"url": f"http://127.0.0.1:{webhook_port}/"}]}
    route = {"receiver": "webhook", "group_wait": "0s", "group_by": ["alertname"]}
    config.write_text(json.dumps({"route": route, "receivers": [receiver]}))
    subprocess.run([program("amtool"), "check-config", config], check=True, capture_output=True)
    command = [
        *_with_templates(directory),
        program("alertmanager"),
        f"--config.file={config}",
        f"--storage.path={directory / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with (
        (directory / "alertmanager.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            yield
        finally:
            process.terminate()


def _with_templates(directory: Path) -> list[str]:
    """What shows Debian's Alertmanager its templates where it looks for them, if it is not installed as a package."""
    place = Path("/usr/share/prometheus")
    if (place / "alertmanager" / "default.tmpl").exists():
        return []
    beside = Path(program("alertmanager")).parents[1] / "share" / "prometheus"
    return [
        *("bwrap", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"),
        *("--tmpfs", "/usr/share", "--ro-bind", str(beside), str(place), "--bind", str(directory), str(directory)),
    ]


class Watched:
    """The run, from its beginning to its end, as Prometheus remembers it."""

    def __init__(self, page: str, began: float, ended: float, name: str) -> None:
        self.page, self._began, self._ended, self._name = page, began, ended, name
        self.config = Path()

    def start_time(self, job: str) -> str:
        """When the process of a job began, as Prometheus knows it now; empty where it does not."""
        asked = urllib.parse.urlencode({"query": f'process_start_time_seconds{{job="{job}"}}'})
        with urllib.request.urlopen(f"{self.page}/api/v1/query?{asked}") as reply:
            result = json.load(reply)["data"]["result"]
        return str(result[0]["value"][1]) if result else ""

    def points(self, expression: str) -> int:
        """How many samples a query has over the run, asked through the page's server."""
        filled = expression.replace("$namespace", ".*").replace("$run", self._name).replace("$__rate_interval", "30s")
        asked = {"query": filled, "start": self._began, "end": self._ended, "step": 2}
        with urllib.request.urlopen(f"{self.page}/api/v1/query_range?{urllib.parse.urlencode(asked)}") as reply:
            result = json.load(reply)["data"]["result"]
        return sum(value != "NaN" for series in result for _, value in series["values"])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Watched, Webhook]]:
    directory = tmp_path_factory.mktemp("watched")
    run_file = directory / "run.toml"
    run_file.write_text(RUN.format(model=make_tiny_model(directory / "model")))
    overrides = [*port_overrides(), "eval.every=4", "eval.during_tasks=8"]
    settings = load_settings(run_file, overrides)
    manager_port, webhook_port, prometheus_port, page_port = free_ports(4)
    webhook = Webhook(webhook_port)
    with ExitStack() as stack:
        stack.enter_context(alertmanager(directory, manager_port, webhook_port))
        config = configuration(settings, 1.0, f"127.0.0.1:{manager_port}")
        prometheus = stack.enter_context(Prometheus(config, directory / "prometheus", prometheus_port))
        page = stack.enter_context(Page(page_port, prometheus.url, settings.run.name))
        threading.Thread(target=page.serve_forever, daemon=True).start()
        stack.callback(page.shutdown)
        began = time.time()
        run_with_kills(run_file, overrides, [Kill("relay", 3, 0.2)], directory / "runs", timeout_s=600)
        found = Watched(f"http://127.0.0.1:{page_port}", began, time.time(), settings.run.name)
        found.config = directory / "runs" / settings.run.name / "config.toml"
        yield found, webhook


def test_every_query_of_every_dashboard_has_an_answer(watched: tuple[Watched, Webhook]) -> None:
    run, _ = watched
    empty = [
        f"{dashboard.uid}/{panel.title}: {expression}"
        for dashboard in load()
        for row in dashboard.rows
        for panel in row.panels
        for expression, _legend in panel.targets()
        if not panel.quiet and not run.points(expression)
    ]
    assert not empty, "\n".join(empty)


def test_every_series_that_an_alert_watches_exists(watched: tuple[Watched, Webhook]) -> None:
    """A healthy run raises next to none, so it is the selectors that must have answers."""
    run, _ = watched
    empty = []
    for name in ("recording", "alerts"):
        groups = yaml.safe_load((HERE / "rules" / f"{name}.yml").read_text())["groups"]
        for rule in (rule for group in groups for rule in group["rules"]):
            selectors: list[str] = []

            def visit(node: object, selectors: list[str] = selectors) -> bool:
                if isinstance(node, promql_parser.VectorSelector):
                    selectors.append(node.prettify())
                return True

            promql_parser.walk(promql_parser.parse(rule["expr"]), visit)
            assert selectors
            empty += [f"{rule.get('alert')}: {each}" for each in selectors if not run.points(each)]
    assert not empty, "\n".join(empty)


def test_an_alert_arrives(watched: tuple[Watched, Webhook]) -> None:
    """Of a relay that is started again and again, and scraped each time."""
    run, webhook = watched
    was = run.start_time("ergon-relay")
    for _ in range(RELAY_DEATHS):
        command = [sys.executable, "-m", "broker", "relay", "--config", str(run.config)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as relay:
            try:
                until(lambda was=was: run.start_time("ergon-relay") not in ("", was), 60)
                was = run.start_time("ergon-relay")
            finally:
                relay.kill()
    assert webhook.seen.wait(60), f"arrived: {sorted(webhook.arrived)}"
    alert = webhook.arrived[ALERT]
    assert alert["labels"] | {"run": "tiny", "job": "ergon-relay", "severity": "warning"} == alert["labels"]
    assert "has been restarted" in alert["annotations"]["summary"]


def test_the_page_has_the_dashboards(watched: tuple[Watched, Webhook]) -> None:
    run, _ = watched
    with urllib.request.urlopen(f"{run.page}/") as reply:
        assert b"<main>" in reply.read()
    with urllib.request.urlopen(f"{run.page}/dashboards.json") as reply:
        content = json.load(reply)
    assert content["run"] == "tiny"
    assert {board["uid"] for board in content["dashboards"]} == {dashboard.uid for dashboard in load()}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{run.page}/api/v1/admin/tsdb/snapshot")
    assert refused.value.code == 404
