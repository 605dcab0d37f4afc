"""`ergon monitor`: a Prometheus for the run on this machine, and its dashboards as a page without Grafana.

Owns the Prometheus process, its configuration (made of the run's ports) and the page's server, which passes queries
on, so that one port is enough. Writes below `runs/NAME/monitoring` only; the run does not know of it.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from deploy.loopback import HOST, LoopbackServer, Reply, plain

logger = logging.getLogger(__name__)

HERE: Final = Path(__file__).parent
READY_S: Final = 60.0  # for Prometheus to replay what an earlier one wrote
_JSON: Final = "application/json"
_PASSED_ON: Final = ("/api/v1/query", "/api/v1/query_range", "/api/v1/alerts", "/api/v1/label/", "/api/v1/series")


def targets(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """(job, instance, address) of every process of a run on this machine."""
    metrics = settings.metrics
    for role in ("broker", "relay", "learner"):
        yield f"ergon-{role}", role, f"{metrics.host}:{getattr(metrics, f'{role}_port')}"
    for index in range(settings.actor.count):
        yield "ergon-actor", f"actor-{index}", f"{metrics.host}:{metrics.actor_port + index}"


def configuration(settings: Settings, interval_s: float, alertmanager: str | None = None) -> dict[str, Any]:
    """Prometheus' configuration for a run on this machine. alertmanager: HOST:PORT that alerts are sent to."""
    jobs: dict[str, list[Mapping[str, Any]]] = {}
    for job, instance, address in targets(settings):
        labels = {"run": settings.run.name, "instance": instance}
        jobs.setdefault(job, []).append({"targets": [address], "labels": labels})
    interval = f"{max(1, round(interval_s * 1000))}ms"
    config: dict[str, Any] = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(path.resolve()) for path in sorted((HERE / "rules").glob("*.yml"))],
        "scrape_configs": [{"job_name": job, "static_configs": static} for job, static in jobs.items()],
    }
    if alertmanager:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    return config


def program(name: str) -> str:
    """The path of a program that set-up installs. Raises ErgonError where it is not there."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ErgonError(f"{name} is not installed; `make setup` puts it beside this Python, or install Prometheus")
    return found


class Prometheus:
    """A running Prometheus; a context manager. Raises ErgonError where it cannot start."""

    def __init__(self, config: Mapping[str, Any], directory: Path, port: int) -> None:
        self._config, self._directory = config, directory
        self.url = f"http://{HOST}:{port}"
        self._listens = f"{HOST}:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Prometheus:
        self._directory.mkdir(parents=True, exist_ok=True)
        path, log = self._directory / "prometheus.yml", self._directory / "prometheus.log"
        path.write_text(json.dumps(self._config, indent=1), encoding="utf-8")  # JSON is YAML
        options = {
            "config.file": path,
            "storage.tsdb.path": self._directory / "data",
            "storage.tsdb.retention.size": "2GB",
            "web.listen-address": self._listens,
        }
        command = [program("prometheus"), *(f"--{name}={value}" for name, value in options.items())]
        with log.open("ab") as file:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            self._wait_until_ready(log)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _wait_until_ready(self, log: Path) -> None:
        assert self._process is not None
        pause = threading.Event()
        for _ in range(round(READY_S * 10)):
            if self._process.poll() is not None:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
                raise ErgonError(f"prometheus ended at once: {' '.join(lines)}; its log is {log}")
            try:
                with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2):
                    return
            except OSError:
                pause.wait(0.1)
        raise ErgonError(f"prometheus was not ready after {READY_S:g} s; its log is {log}")


class Page(LoopbackServer):
    """Serves page.html and the dashboards, and passes queries on to Prometheus; nothing else of it can be reached."""

    def __init__(self, port: int, prometheus_url: str, run: str) -> None:
        boards = [json.loads(path.read_text("utf-8")) for path in sorted((HERE / "dashboards").glob("*.json"))]
        self.content = {
            "/": Reply(200, "text/html; charset=utf-8", (HERE / "page.html").read_bytes()),
            "/dashboards.json": Reply(200, _JSON, json.dumps({"run": run, "dashboards": boards}).encode()),
        }
        self.prometheus_url = prometheus_url
        super().__init__(port)

    def reply(self, path: str) -> Reply:
        """See LoopbackServer."""
        name = path.split("?", 1)[0]
        if name in self.content:
            return self.content[name]
        return self._passed_on(path) if name.startswith(_PASSED_ON) else plain(404, "not found")

    def _passed_on(self, path: str) -> Reply:
        try:
            with urllib.request.urlopen(self.prometheus_url + path, timeout=30) as reply:
                return Reply(reply.status, _JSON, reply.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, _JSON, error.read())
        except OSError as error:
            return plain(502, f"prometheus does not answer: {error}")


def monitor(
    settings: Settings, port: int, interval_s: float, wait: Callable[[], object], alertmanager: str | None = None
) -> None:
    """Serve the page on `port` and Prometheus on the next one, until `wait` returns."""
    directory = settings.run_dir / "monitoring"
    config = configuration(settings, interval_s, alertmanager)
    with Prometheus(config, directory, port + 1) as prometheus, Page(port, prometheus.url, settings.run.name) as page:
        thread = threading.Thread(target=page.serve_forever, name="page", daemon=True)
        thread.start()
        logger.info("monitoring run=%s page=http://%s:%d/ prometheus=%s", settings.run.name, HOST, port, prometheus.url)
        wait()
        page.shutdown()
        thread.join()
