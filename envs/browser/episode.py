"""An episode in a browser: the tools, what they answer, and what becomes of a page that hangs or crashes.

Every tool answers with the page as it then is. The policy has no scripts, no tabs, no addresses but its site's, and no
way to the browser itself. Subclasses bring the site and grade.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Literal

from envs.browser import acting
from envs.browser.cdp import CdpError
from envs.browser.keys import Key
from envs.browser.page import Page, PageGoneError
from envs.browser.pool import BrowserPool
from envs.browser.snapshot import Element, Snapshot
from envs.browser.web import Site
from envs.interface import EnvironmentFailureError, Message, SandboxError, Task
from envs.tools import ToolEpisode, ToolError, ToolSet, ToolTimeoutError, tool

MAX_TARGET = 500
# The tools bound their own time; the runner's limit is for what they do not foresee, a fresh tab included.
OUTER_LIMIT_S = 240.0
Ref = Annotated[int, "the number of an element of the page last shown"]


@tool(timeout_s=OUTER_LIMIT_S)
async def open(episode: BrowserEpisode, path: Annotated[str, "a path of this site, for example /orders?page=2"]) -> str:  # noqa: A001
    """Go to a path of the site."""
    return await episode.go(path)


@tool(timeout_s=OUTER_LIMIT_S)
async def click(episode: BrowserEpisode, ref: Ref) -> str:
    """Click an element."""
    element = episode.element(ref)
    return await episode.act(lambda page: acting.click(page, element))


@tool(timeout_s=OUTER_LIMIT_S)
async def type(episode: BrowserEpisode, ref: Ref, text: Annotated[str, "replaces what the field holds"]) -> str:  # noqa: A001
    """Type a text into a field."""
    element = episode.element(ref)
    return await episode.act(lambda page: acting.write(page, element, text))


@tool(timeout_s=OUTER_LIMIT_S)
async def select(episode: BrowserEpisode, ref: Ref, option: Annotated[str, "the option's name"]) -> str:
    """Choose an option of a combobox or listbox."""
    element = episode.element(ref)
    return await episode.act(lambda page: acting.select(page, element, option))


@tool(timeout_s=OUTER_LIMIT_S)
async def press(episode: BrowserEpisode, key: Key) -> str:
    """Press a key where the focus is."""
    return await episode.act(lambda page: acting.press(page, key))


@tool(timeout_s=OUTER_LIMIT_S)
async def scroll(
    episode: BrowserEpisode,
    direction: Literal["up", "down"],
    ref: Annotated[int, "an element to scroll within; 0 for the page"] = 0,
) -> str:
    """Turn the mouse's wheel. Everything of a page is shown anyhow; some pages act on being scrolled."""
    element = episode.element(ref) if ref else None
    return await episode.act(lambda page: acting.scroll(page, direction, element))


@tool(timeout_s=OUTER_LIMIT_S)
async def back(episode: BrowserEpisode) -> str:
    """Go back to the page before this one."""
    return await episode.act(_back)


@tool(timeout_s=OUTER_LIMIT_S)
async def read(episode: BrowserEpisode, part: Annotated[int, "from 1; long pages have several parts"] = 1) -> str:
    """Look at the page again, or at another part of it."""
    return await episode.act(_nothing, part)


TOOLS = ToolSet(open, click, type, select, press, scroll, back, read)


async def _back(page: Page) -> None:
    if not await page.back():
        raise ToolError("there is no page before this one")


async def _nothing(_page: Page) -> None:
    """Only look."""


class BrowserEpisode(ToolEpisode):
    """One attempt at one task on one page.

    action_limit_s: seconds of one action, until the page is shown. number_texts: see snapshot.py.
    """

    start_target = "/"
    number_texts = False
    toolset = TOOLS

    def __init__(self, task: Task, pool: BrowserPool, action_limit_s: float) -> None:
        super().__init__(task, self.toolset)
        self._pool = pool
        self._action_limit_s = action_limit_s
        self._page: Page | None = None
        self._shown: Snapshot | None = None
        self._closed = False

    @abstractmethod
    def site(self) -> Site:
        """The site that this episode begins with; called once."""

    async def start(self) -> Sequence[Message]:
        """Take a page, go to the site's first, and show it below the task. Raises SandboxError."""
        if self._closed or self._page is not None:
            raise EnvironmentFailureError("an episode is started once, and not after it is closed")
        self._page = await self._pool.acquire(self.site())
        try:
            text = await self._within(self._begin, 1)
        except ToolError as error:
            raise SandboxError(f"the site's first page could not be shown: {error}") from error
        first, *rest = self.task.prompt
        return (*rest, Message(first.role, f"{first.content}\n\n{text}"))

    async def _begin(self, page: Page) -> None:
        await page.goto(self.start_target)
        await page.settle()
        await self.prepare_page(page)

    async def prepare_page(self, page: Page) -> None:
        """What an environment does on its first page before the policy sees it."""

    async def acted(self, page: Page) -> str | None:
        """Called when the page has come to rest after an action; a text is shown in the page's place."""
        return None

    @property
    def page(self) -> Page:
        """The page. Raises EnvironmentFailureError before `start` and after `close`."""
        if self._page is None or self._closed:
            raise EnvironmentFailureError("the episode has not started, or is closed")
        return self._page

    def element(self, ref: int) -> Element:
        """What a number of the page last shown stands for. Raises ToolError."""
        found = self._shown.elements.get(ref) if self._shown else None
        if found is None:
            last = len(self._shown.elements) if self._shown else 0
            known = f"numbers go from 1 to {last}" if last else "it has none"
            raise ToolError(f"the page last shown has no element {ref}; {known}")
        return found

    async def go(self, path: str) -> str:
        """Go to a path of the site. Raises ToolError for anything else."""
        if not path.startswith("/") or path.startswith("//") or "\\" in path or not path.isprintable():
            raise ToolError("a path of this site begins with one / and has no other host, for example /orders")
        if len(path) > MAX_TARGET:
            raise ToolError(f"a path may have {MAX_TARGET} characters")
        return await self.act(lambda page: page.goto(path))

    async def act(self, doing: Callable[[Page], Awaitable[None]], part: int = 1) -> str:
        """Do something, wait until the page has come to rest, and show it. Raises ToolError, SandboxError."""
        return await self._within(doing, part)

    async def _within(self, doing: Callable[[Page], Awaitable[None]], part: int) -> str:
        """Within the time of one action; a page that hangs or crashes is replaced by an empty one."""
        page = self.page
        try:
            async with asyncio.timeout(self._action_limit_s):
                return await self._done(page, doing, part)
        except TimeoutError:
            await self._renew(page)
            raise ToolTimeoutError(
                f"the page did not answer within {self._action_limit_s:g} s and was closed; go on with open"
            ) from None
        except PageGoneError:
            await self._renew(page)
            raise ToolError("the page crashed and was closed; go on with open") from None
        except CdpError as error:
            if not page.alive:
                raise SandboxError(f"the page has ended: {error}") from error
            raise ToolError("the page could not do this; look at it again with read") from error

    async def _renew(self, page: Page) -> None:
        self._shown = None
        await page.renew()

    async def _done(self, page: Page, doing: Callable[[Page], Awaitable[None]], part: int) -> str:
        await doing(page)
        await page.settle()
        said = await self.acted(page)
        if said is not None:
            return said
        self._shown = shown = await page.look(self.number_texts)
        notes, page.notes = page.notes, []
        try:
            text = shown.text(part)
        except IndexError as error:
            raise ToolError(str(error)) from None
        return "\n".join([*(f"[{note}]" for note in notes), text])

    async def close(self) -> None:
        """Give the page back; idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._page is not None:
            await self._pool.release(self._page)
