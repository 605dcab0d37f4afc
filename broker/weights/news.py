"""What a subscriber knows of versions: the newest that was announced, and the one that is on its way; who waits for it.

Thread-safe. Knows no connection: what has come is told to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from broker.protocol.trajectory import PolicyVersion

Coming = Callable[[], PolicyVersion | None]


class News:
    """Of one subscriber, over all its connections. `failure`: why nothing more will be told, or None; `coming`: the
    version of which the first bytes have come, as a delta to what is there."""

    def __init__(self, failure: Callable[[], Exception | None], coming: Coming) -> None:
        self.latest: PolicyVersion | None = None
        """The newest version ever announced."""
        self._failure, self._on_its_way = failure, coming
        self._changed = threading.Condition()

    def announce(self, newest: PolicyVersion | None) -> PolicyVersion | None:
        """That was said to be the newest; it, if it is news."""
        with self._changed:
            if not _is_newer(newest, self.latest):
                return None
            self.latest = newest
            self._changed.notify_all()
        return newest

    def stir(self) -> None:
        """`failure` or `coming` has changed."""
        with self._changed:
            self._changed.notify_all()

    def wait_newer(self, than: PolicyVersion | None, timeout_s: float) -> PolicyVersion | None:
        """Block until a version newer than this one is announced; None when the time is up. Raises `failure`."""
        return self._wait(lambda: self.latest if _is_newer(self.latest, than) else None, timeout_s)

    def wait_coming(self, than: PolicyVersion | None, timeout_s: float) -> PolicyVersion | None:
        """As `wait_newer`, or until a newer one is on its way."""

        def found() -> PolicyVersion | None:
            if _is_newer(self.latest, than):
                return self.latest
            coming = self._on_its_way()
            return coming if _is_newer(coming, than) else None

        return self._wait(found, timeout_s)

    def _wait(self, found: Coming, timeout_s: float) -> PolicyVersion | None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure() is not None or found() is not None, timeout_s)
            failure = self._failure()
            if failure is not None:
                raise failure
            return found()


def _is_newer(version: PolicyVersion | None, than: PolicyVersion | None) -> bool:
    return version is not None and (than is None or version > than)
