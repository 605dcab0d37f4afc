"""A site whose pages a test writes, and an episode on it: for what Chromium must hold back and survive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from envs.browser.episode import BrowserEpisode
from envs.browser.pool import BrowserPool
from envs.browser.web import Request, Response
from envs.interface import Action, Message, Reward, Task, ToolCall

Answer = bytes | Response | Callable[[Request], Response]


class WrittenSite:
    """Answers with what a test wrote for a path, and keeps what was asked."""

    origin = "http://written.test"

    def __init__(self, pages: Mapping[str, Answer]) -> None:
        self.asked: list[Request] = []
        self._pages = pages

    def answer(self, request: Request) -> Response:
        self.asked.append(request)
        found = self._pages.get(request.path, Response(b"nothing here", 404))
        if isinstance(found, bytes):
            return Response(found)
        return found if isinstance(found, Response) else found(request)


class WrittenEpisode(BrowserEpisode):
    """An episode on such a site."""

    def __init__(self, pool: BrowserPool, pages: Mapping[str, Answer], limit_s: float) -> None:
        super().__init__(Task("written", "train", 0, "written", (Message("user", "task"),)), pool, limit_s)
        self.written = WrittenSite(pages)

    def site(self) -> WrittenSite:
        return self.written

    async def grade(self) -> Reward:
        return Reward(0.0)

    async def do(self, name: str, limit_s: float | None = None, **arguments: Any) -> str:
        """What the policy sees of one call. limit_s: of this action, where it is not the episode's."""
        usual, self._action_limit_s = self._action_limit_s, limit_s or self._action_limit_s
        try:
            return await self._did(name, arguments)
        finally:
            self._action_limit_s = usual

    async def _did(self, name: str, arguments: Mapping[str, Any]) -> str:
        observation = await self.step(Action("", (ToolCall(name, arguments),)))
        return observation.messages[0].content

    def ref(self, name: str) -> int:
        """The number of the element of this name."""
        assert self._shown is not None
        return next(ref for ref, element in self._shown.elements.items() if element.name == name)


@asynccontextmanager
async def written(pool: BrowserPool, limit_s: float = 30.0, **pages: Answer) -> AsyncIterator[WrittenEpisode]:
    """A started episode; `index` is its first page, other names are paths."""
    paths = {"/" if name == "index" else f"/{name}": page for name, page in pages.items()}
    episode = WrittenEpisode(pool, paths, limit_s)
    try:
        await episode.start()
        yield episode
    finally:
        await episode.close()


@asynccontextmanager
async def listener() -> AsyncIterator[tuple[int, list[bytes]]]:
    """A port on the host's loopback, and what arrives at it."""
    arrived: list[bytes] = []

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.append(await reader.read(100))
        writer.close()

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], arrived
    finally:
        server.close()
        await server.wait_closed()
