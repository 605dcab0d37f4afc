"""A real headless Chromium for tests of pages: what it shows, what its console says, a picture.

The browser is that of `envs/browser`, in its box without network; its requests are passed on to a server on loopback by
the test.
"""

from __future__ import annotations

import base64
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from envs.browser.chromium import Chromium
from envs.browser.page import Page
from envs.browser.web import Request, Response


class Forwarded:
    """A site that is a server on loopback, and files beside it."""

    def __init__(self, port: int, files: Mapping[str, Path] = {}) -> None:
        self.origin = f"http://127.0.0.1:{port}"
        self._files = files

    def answer(self, request: Request) -> Response:
        if request.path in self._files:
            return Response(self._files[request.path].read_bytes())
        asked = urllib.request.Request(f"{self.origin}{request.target}", method=request.method)
        try:
            with urllib.request.urlopen(asked, timeout=30) as reply:
                return Response(reply.read(), reply.status, reply.headers["Content-Type"], dict(reply.headers))
        except urllib.error.HTTPError as error:
            return Response(error.read(), error.code, error.headers["Content-Type"], dict(error.headers))


class Looker:
    """A tab and what its console said."""

    def __init__(self, chromium: Chromium, page: Page, session: str) -> None:
        self._chromium, self._page, self._session = chromium, page, session
        self.said: list[str] = []
        chromium.connection.listen(session, self._on_event)

    def _on_event(self, method: str, event: Mapping[str, Any]) -> None:
        if method == "Log.entryAdded":
            self.said.append(f"{event['entry']['level']}: {event['entry']['text']}")
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.said.append(f"{method}: {event}")

    async def go(self, target: str) -> None:
        """Go there and wait until it is shown."""
        await self._page.goto(target)
        await self._page.settle()

    async def find(self, expression: str) -> Any:
        """The value of an expression about the page."""
        return await self._page.evaluate(expression)

    async def click(self, selector: str) -> None:
        """Click what a selector finds, and wait for what follows."""
        await self._page.evaluate(f"document.querySelector({selector!r}).click()")
        await self._page.settle()

    async def picture(self, path: Path, width: int, height: int, *, dark: bool = False, mobile: bool = False) -> None:
        """Draw what is shown as PNG."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        await self._page.send("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self._page.send("Emulation.setEmulatedMedia", features=[scheme])
        taken = await self._page.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(taken["data"]))


@asynccontextmanager
async def looking(site: Forwarded) -> AsyncIterator[Looker]:
    """A tab on this site."""
    chromium = await Chromium.start()
    try:
        page = await Page.create(chromium.connection)
        page.serve(site)
        found = await chromium.connection.send("Target.attachToTarget", targetId=page._target, flatten=True)
        looker = Looker(chromium, page, found["sessionId"])
        for method in ("Runtime.enable", "Log.enable"):
            await chromium.connection.send(method, found["sessionId"])
        yield looker
    finally:
        await chromium.close()
