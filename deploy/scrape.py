"""Reads what the processes of a run say about themselves: their /metrics and the learner's metrics.jsonl.

Owns a thread that scrapes; never blocks the supervisor. A process that does not answer is simply absent.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from broker.process.settings import Settings

TIMEOUT_S = 2.0
INTERVAL_S = 2.0

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


class Scraper:
    """The newest samples of every process, and the rates of counters between scrapes."""

    def __init__(self, settings: Settings, on_scrape: Callable[[Mapping[str, Samples]], None] | None = None) -> None:
        """on_scrape: called in the scraping thread with the samples of the processes that have answered."""
        self._on_scrape = on_scrape
        metrics = settings.metrics
        ports = {"broker": metrics.broker_port, "relay": metrics.relay_port, "learner": metrics.learner_port}
        ports |= {f"actor-{index}": metrics.actor_port + index for index in range(settings.actor.count)}
        self._urls = {name: f"http://{metrics.host}:{port}/metrics" for name, port in ports.items()}
        self._lock = threading.Lock()
        self._samples: dict[str, Samples] = {}
        self._totals: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scraper", daemon=True)

    def start(self) -> None:
        """Begin scraping."""
        self._thread.start()

    def close(self) -> None:
        """Stop scraping."""
        self._stop.set()
        self._thread.join(TIMEOUT_S * 2)

    def total(self, name: str, **labels: str) -> float:
        """Sum of a metric over all processes and all label sets that contain `labels`; 0 where nobody reports it."""
        wanted = set(labels.items())
        with self._lock:
            return sum(
                value
                for samples in self._samples.values()
                for (sample, pairs), value in samples.items()
                if sample == name and wanted <= pairs
            )

    def rate(self, name: str, window_s: float = 30.0) -> float:
        """Increase per second of a counter over the last `window_s`; a restarted process counts from its restart."""
        now = time.monotonic()
        history = self._totals[name]
        history.append((now, self.total(name)))
        while len(history) > 2 and history[1][0] < now - window_s:
            history.pop(0)
        increase = sum(max(0.0, b[1] - a[1]) for a, b in itertools.pairwise(history))
        elapsed_s = history[-1][0] - history[0][0]
        return increase / elapsed_s if elapsed_s else 0.0

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.scrape_once()

    def scrape_once(self) -> None:
        """Ask every process now."""
        fresh = {name: samples for name, url in self._urls.items() if (samples := scrape(url)) is not None}
        with self._lock:
            self._samples = dict(fresh)
        if self._on_scrape is not None:
            self._on_scrape(fresh)


def scrape(url: str) -> Samples | None:
    """All samples of an endpoint, or None where it does not answer (starting, restarting or gone)."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply:
            text = reply.read().decode()
    except (urllib.error.URLError, OSError):
        return None
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class JsonLines:
    """Follows a growing JSON-lines file; returns only whole lines that were not returned before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """The records since the last call. A file that became shorter is read from its start."""
        if not self._path.exists():
            return []
        if self._path.stat().st_size < self._offset:
            self._offset = 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
