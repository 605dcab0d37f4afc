"""The thread in which folds of deltas are made, each once for all who ask for it. Decides nothing: the store says what
is to be made, and keeps it."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from broker.weights import metrics
from broker.weights.chain import FoldJob, Key, Payload
from broker.weights.store import WeightStore

logger = logging.getLogger(__name__)


class Folder:
    """Makes folds for `store`, one after the other."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._making: set[Key] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weight-folds")

    def make(self, job: FoldJob) -> None:
        """Begin this fold unless that has been done; returns at once. The store has it, or its failure, in the end."""
        with self._lock:
            if job.key in self._making:
                return
            self._making.add(job.key)
        self._thread.submit(self._make, job)

    def close(self) -> None:
        """End the thread after the fold it is at."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self, job: FoldJob) -> None:
        started = time.monotonic()
        self._store.add_fold(job, self._run(job))
        with self._lock:
            self._making.discard(job.key)
        metrics.fold_seconds.observe(time.monotonic() - started)

    def _run(self, job: FoldJob) -> Payload | None:
        try:
            return job.run()
        except Exception:  # whatever it was: who waits for it gets the anchor
            logger.exception("deltas cannot be folded key=%s num=%d", job.key, len(job.deltas))
            return None
