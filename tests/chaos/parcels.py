"""How many trajectories reached the broker in one message with others: by its own metrics, over all its lives.

Owns one thread. What a broker counted after the last look at it and before its death is missing: the figure is a lower
bound. Never fails because nobody answers.
"""

from __future__ import annotations

import http.client
import threading
import urllib.request
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

LOOK_S = 0.5


class Counts(NamedTuple):
    """What one life of the broker has counted."""

    messages: int = 0  # TRAJECTORY messages
    results: int = 0  # trajectories in them

    @property
    def shared(self) -> int:
        """Trajectories that needed no message of their own; messages that were refused make it too small."""
        return max(0, self.results - self.messages)


def read_counts(text: str) -> Counts:
    """The counts in a page of metrics."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    messages = [
        sample.value
        for sample in samples
        if sample.name == "ergon_broker_messages_total" and sample.labels["command"] == "TRAJECTORY"
    ]
    results = [sample.value for sample in samples if sample.name == "ergon_broker_results_total"]
    return Counts(int(sum(messages)), int(sum(results)))


class ParcelWatch(threading.Thread):
    """Looks at the metrics page on `port` until told to finish."""

    def __init__(self, port: int) -> None:
        super().__init__(name="parcels", daemon=True)
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._ended = threading.Event()
        self._past, self._counts = 0, Counts()

    @property
    def num_shared(self) -> int:
        """Trajectories that needed no message of their own, at least."""
        return self._past + self._counts.shared

    def run(self) -> None:
        while not self._ended.wait(LOOK_S):
            try:
                with urllib.request.urlopen(self._url, timeout=LOOK_S) as page:
                    self.note(read_counts(page.read().decode()))
            except (OSError, http.client.HTTPException):
                continue  # it is dead, stopped, or not up yet

    def note(self, counts: Counts) -> None:
        """What was seen: of the same life as before, or of another, which counts from 0."""
        if counts.messages < self._counts.messages or counts.results < self._counts.results:
            self._past += self._counts.shared
        self._counts = counts

    def finish(self) -> None:
        """Look no more."""
        self._ended.set()
        if self.ident is not None:
            self.join()
