"""Whether a page has come to rest: it has loaded, and no request is under way. Told by events; asks nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

_BEGIN = frozenset({"Page.frameRequestedNavigation", "Page.frameStartedLoading"})
_ENDED = frozenset({"Network.loadingFinished", "Network.loadingFailed"})


class Rest:
    """What goes on in one tab. activity: counts whatever happened; unchanged, nothing did."""

    def __init__(self, frame: str) -> None:
        self.activity = 0
        self._frame = frame
        self._loading = False
        self._requests: set[str] = set()
        self._changed = asyncio.Event()

    def take(self, method: str, event: Mapping[str, Any]) -> None:
        """Take an event down."""
        if method == "Network.requestWillBeSent":
            self._requests.add(event["requestId"])
        elif method in _ENDED:
            self._requests.discard(event["requestId"])
        elif method in _BEGIN and event["frameId"] == self._frame:
            self._loading = True
        elif method == "Page.frameStoppedLoading" and event["frameId"] == self._frame:
            self._loading = False
        elif method == "Page.frameNavigated" and event["frame"]["id"] == self._frame:
            self._requests.clear()  # the former document's
        elif method != "Page.navigatedWithinDocument":
            self._changed.set()  # a crash, or Chromium's end
            return
        self.activity += 1
        self._changed.set()

    async def wait(self, deadline: float, goes_on: Callable[[], bool]) -> None:
        """Wait for rest while the page goes on at all; for its requests, once it has loaded, until the loop's time is
        `deadline`."""
        try:
            while self._loading and goes_on():
                await self._next()
            async with asyncio.timeout_at(deadline):
                while (self._loading or self._requests) and goes_on():
                    await self._next()
        except TimeoutError:
            return

    async def _next(self) -> None:
        self._changed.clear()
        await self._changed.wait()
