"""Passes the lines of metrics.jsonl on to sinks, each in a thread of its own, so that none can stop the training.

A sink that raises, or hangs until its queue is full, loses lines. Each is counted (`ergon_learner_sink_lost_total`);
that it began, and that it is over, is said in the log once. metrics.jsonl has them all. Knows no sink in particular.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from learner import metrics
from learner.sinks.points import Points, points_of

logger = logging.getLogger(__name__)

REOPEN_S: Final = 60.0
LOSES: Final = "sink loses lines, which metrics.jsonl has sink=%s reason=%s"


class Sink(Protocol):
    """What a library is to us. All of it is called in one thread, which the library may block."""

    @property
    def name(self) -> str:
        """As in the settings."""

    def open(self) -> None:
        """Begin, or go on with, the run there."""

    def write(self, points: Points) -> None:
        """Take points."""

    def close(self) -> None:
        """End it there; everything is on its way when this returns."""


class _Lane:
    """One sink, its queue and its thread."""

    def __init__(self, sink: Sink, capacity: int) -> None:
        self._sink = sink
        self._waiting: queue.Queue[Points | None] = queue.Queue(capacity)
        self._is_open = False
        self._tried_at = -REOPEN_S
        self._loses = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"sink-{sink.name}", daemon=True)
        self._thread.start()

    def offer(self, points: Points) -> None:
        """Never waits and never raises."""
        try:
            self._waiting.put_nowait(points)
        except queue.Full:
            if self._lose("full"):
                logger.warning(LOSES, self._sink.name, "its queue is full")

    def close(self, patience_s: float) -> None:
        """Let it take what waits, for so long."""
        deadline = time.monotonic() + patience_s
        try:
            self._waiting.put(None, timeout=patience_s)
        except queue.Full:
            logger.warning("sink does not end sink=%s reason=its queue is still full", self._sink.name)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            num_left = self._waiting.qsize()
            metrics.SINK_LOST.labels(self._sink.name, "closed").inc(num_left)
            logger.warning("sink left behind sink=%s patience_s=%g waiting=%d", self._sink.name, patience_s, num_left)

    def _run(self) -> None:
        while (points := self._waiting.get()) is not None:
            self._pass_on(points)
        if self._is_open:
            try:
                self._sink.close()
            except Exception:
                logger.exception("sink could not be closed sink=%s", self._sink.name)

    def _pass_on(self, points: Points) -> None:
        try:
            if not self._is_open:
                if time.monotonic() < self._tried_at + REOPEN_S:
                    metrics.SINK_LOST.labels(self._sink.name, "failed").inc()
                    return
                self._tried_at = time.monotonic()
                self._sink.open()
                self._is_open = True
            self._sink.write(points)
        except Exception as error:
            # Whatever a library raises: the training goes on without it.
            if self._lose("failed"):
                logger.exception(LOSES, self._sink.name, f"{type(error).__name__}: {error}")
        else:
            with self._lock:
                before, self._loses = self._loses, False
            if before:
                logger.info("sink takes lines again sink=%s", self._sink.name)

    def _lose(self, reason: str) -> bool:
        """Count a line; whether it is the first one."""
        metrics.SINK_LOST.labels(self._sink.name, reason).inc()
        with self._lock:
            before, self._loses = self._loses, True
        return not before


class Sinks:
    """All sinks of a run; `offer` costs a step microseconds."""

    def __init__(self, sinks: Sequence[Sink] = (), capacity: int = 1024, patience_s: float = 10.0) -> None:
        self._patience_s = patience_s
        self._lanes = [_Lane(sink, capacity) for sink in sinks]

    def offer(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl. Never waits for a sink."""
        if self._lanes and (points := points_of(record)) is not None:
            for lane in self._lanes:
                lane.offer(points)

    def close(self) -> None:
        """End all, each within its patience."""
        for lane in self._lanes:
            lane.close(self._patience_s)
