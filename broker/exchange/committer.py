"""The thread in which a round becomes durable, while the server goes on with the next one.

Owns the thread and the wake-up of who waits for it. Runs one call at a time; knows nothing of what it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from broker.process.wakeup import Wakeup


class Committer:
    """Runs `flush` on request. `descriptor` becomes readable when it has ended."""

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush
        self._orders: SimpleQueue[bool] = SimpleQueue()
        self._ended = threading.Event()
        self._failure: Exception | None = None
        self._wakeup = Wakeup()
        self.busy = False
        """Whether `start` was called and `finish` was not yet."""
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._thread.start()

    @property
    def descriptor(self) -> int:
        """To be polled."""
        return self._wakeup.fileno()

    @property
    def ended(self) -> bool:
        """Whether `finish` would not wait."""
        return self._ended.is_set()

    def start(self) -> None:
        """Begin a flush."""
        assert not self.busy, "one at a time"
        self.busy = True
        self._orders.put(True)

    def finish(self) -> None:
        """Wait for the end of the flush. Raises what it raised."""
        self._ended.wait()
        self._ended.clear()
        self.busy = False
        self._wakeup.drain()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End the thread, after the flush that is under way."""
        self._orders.put(False)
        self._thread.join()
        self._wakeup.close()

    def _run(self) -> None:
        while self._orders.get():
            try:
                self._flush()
            except Exception as error:  # noqa: BLE001  raised again where it is waited for
                self._failure = error
            # In this order: a wake-up that came after `finish` would stay, and the server would never rest again.
            self._wakeup.wake()
            self._ended.set()
