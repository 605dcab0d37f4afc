"""One Chromium and the pages that wait in it, made ahead so that no episode waits for one. Each is used once.

Chromium is started when a page is first needed, and again when it has ended: whoever had a page in it is told with a
SandboxError, which is infrastructure. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from envs.browser.chromium import Chromium
from envs.browser.page import Page
from envs.browser.web import Site
from envs.interface import SandboxError

logger = logging.getLogger(__name__)

MAKING_AT_ONCE = 2


class BrowserPool:
    """Keeps up to `size` empty pages ready in one Chromium; at most `max_pages` are in use at once, others wait.

    origin: of the sites that the pages are for. num_starts: how often Chromium was started.
    """

    def __init__(self, size: int, max_pages: int, origin: str) -> None:
        if size < 0 or max_pages < 1:
            raise ValueError(f"a pool of {size} warm pages and at most {max_pages} makes no sense")
        self.num_starts = 0
        self._origin = origin
        self._size = size
        self._places = asyncio.Semaphore(max_pages)
        self._making = asyncio.Semaphore(MAKING_AT_ONCE)
        self._starting = asyncio.Lock()
        self._chromium: Chromium | None = None
        self._ready: deque[Page] = deque()
        self._filler: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def chromium(self) -> Chromium | None:
        """The Chromium that is running, if any."""
        return self._chromium

    @property
    def num_ready(self) -> int:
        """Pages that wait to be taken."""
        return len(self._ready)

    async def prepare(self) -> None:
        """Start Chromium and fill the pool. Raises SandboxError where that cannot be."""
        await self._running()
        self._refill()
        if self._filler is not None:
            await asyncio.shield(self._filler)

    async def acquire(self, site: Site) -> Page:
        """A fresh page for a site: a warm one, or one made now. Give it back with `release`. Raises SandboxError."""
        await self._places.acquire()
        try:
            page = await self._taken()
            page.serve(site)
        except BaseException:
            self._places.release()
            raise
        self._refill()
        return page

    async def release(self, page: Page) -> None:
        """Close a page that was acquired. A Chromium that does not close it in time is ended."""
        try:
            await page.close()
        except SandboxError as error:
            logger.warning("chromium is ended error=%s", error)
            if self._chromium is not None:
                await self._chromium.close()
        finally:
            self._places.release()

    async def _taken(self) -> Page:
        while self._ready:
            page = self._ready.popleft()
            if page.alive:
                return page
        return await self._made()

    async def _made(self) -> Page:
        async with self._making:
            chromium = await self._running()
            page = await Page.create(chromium.connection)
            try:
                await page.warm(self._origin)
            except BaseException:
                await page.close()
                raise
            return page

    async def _running(self) -> Chromium:
        """The Chromium, started where there is none or it has ended."""
        async with self._starting:
            if self._closed:
                raise SandboxError("the pool of pages is closed")
            if self._chromium is None or not self._chromium.alive:
                old, self._chromium = self._chromium, None
                if old is not None:
                    logger.warning("chromium has ended and is started again")
                    await old.close()
                self._chromium = await Chromium.start()
                self.num_starts += 1
            return self._chromium

    def _refill(self) -> None:
        if not self._closed and len(self._ready) < self._size and (self._filler is None or self._filler.done()):
            self._filler = asyncio.create_task(self._fill(), name="browser-pool-refill")

    async def _fill(self) -> None:
        """Make what is missing; at a failure stop, and leave it to the next `acquire` to say why."""
        try:
            while not self._closed and len(self._ready) < self._size:
                self._ready.append(await self._made())
        except SandboxError as error:
            if self._closed:
                return
            logger.warning("browser pool stopped refilling ready=%d error=%s", len(self._ready), error)

    async def close(self) -> None:
        """End Chromium with all its pages; idempotent."""
        self._closed = True
        async with self._starting:
            if self._chromium is not None:
                await self._chromium.close()
        if self._filler is not None:
            await asyncio.wait([self._filler])
        self._ready.clear()
