"""One job at a time on a thread of its own. Owns the thread; its error is raised where the loop next asks."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one job after the other, never two at once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job was started and nobody has waited for its end yet."""
        return self._thread is not None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job. The previous one must have been waited for."""
        if self._thread is not None:
            raise RuntimeError(f"{self._name} is busy: wait() for its job first")

        def run() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
                self._error = error

        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def ended(self, timeout_s: float) -> bool:
        """Wait for the job's end; whether it has ended (or there is none). Raises nothing: `wait` will."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the job's end, if there is a job; False where it lasts longer. Raises what the job raised."""
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
        return True
