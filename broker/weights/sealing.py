"""The thread in which the publisher signs a snapshot, after the delta to it has gone out.

The digest of a whole snapshot takes longer than a small delta takes to travel, and only who needs more than that delta
needs it: a late joiner, or one that is behind. So it leaves the cores to whoever wants them: to the delta on its way,
and to the learner's next step. Decides nothing; the store keeps what it makes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from broker.process.signing import SigningKey
from broker.protocol.proofs import Of
from broker.weights import metrics
from broker.weights.chain import Payload
from broker.weights.store import WeightStore
from broker.weights.threads import num_threads
from broker.weights.vouching import sign

NICENESS: Final = 10  # a tenth of a core at least, where all are busy
CORE_SHARE: Final = 0.5


class Sealer:
    """Seals the newest version of `store`, and calls `sealed` then."""

    def __init__(self, store: WeightStore, key: SigningKey, sealed: Callable[[], None]) -> None:
        self._store, self._key, self._sealed = store, key, sealed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weight-seals", initializer=_give_way)
        self._last: Future[None] | None = None

    def begin(self) -> None:
        """Start on the newest version; returns at once. Its memory must not change before `wait` returns."""
        base = self._store.base
        assert base is not None
        self._last = self._thread.submit(self._seal, base)

    def wait(self) -> None:
        """Return when nothing is being sealed. Raises what the last one failed with."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _seal(self, base: Payload) -> None:
        started = time.monotonic()
        proof = sign(base.manifest, Of.SNAPSHOT, base.data, self._key, max(1, int(num_threads() * CORE_SHARE)))
        self._store.seal(base.version, proof)
        metrics.seal_seconds.observe(time.monotonic() - started)
        self._sealed()


def _give_way() -> None:
    """Lower the priority of this thread, which Linux has for each, and the threads that it starts inherit."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
