"""MiniWoB++'s pages as an environment, with the tools of `browser`; the reward is read from the page by the harness.

A page is started with the task's seed and without its clock, and its first end is the end: what it says of the reward
then is kept, and nothing on the page can be done after it. Full marks are paid for a raw reward of 1 only. The pages'
own code grades in the page, where a policy that could run scripts would help itself; it has no tool for that, none to
go to another page, and no second try.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence

from envs.browser.cdp import CdpError
from envs.browser.episode import BrowserEpisode, click, press, read, scroll, select, type  # noqa: A004
from envs.browser.miniwob.reference import SOLVERS, MiniwobReference
from envs.browser.miniwob.site import MiniwobSite, pages_folder
from envs.browser.page import Page
from envs.browser.pool import BrowserPool
from envs.interface import Action, Environment, EnvironmentFailureError, Message, Observation, Reward, Split, Task, Tool
from envs.tools import ToolError, ToolSet

PAGES = tuple(SOLVERS)
"""The pages that are sound with these tools: what the accessibility tree shows suffices to solve them, for which each
has its reference policy, and knowing nothing earns nothing. Left out are drawing, dragging, pictures, colours, moving
targets, and what a few blind clicks solve."""
TOOLS = ToolSet(click, type, select, press, scroll, read)
PROMPT = "Do on the page what its first lines say. Elements are shown in brackets with their numbers."

# No clock, no animations, no score on the page, and no new problem after the end.
_BEGIN = """(() => {
  Math.seedrandom(%s);
  core.EPISODE_MAX_TIME = 2000000000;
  core.countdownTimer = () => {};
  core.startEpisodeReal();
  core.startEpisode = () => {};
  core.hideDisplay();
  document.getElementById('click-canvas').remove();
  core.canvasDrawClick = core.canvasClear = () => {};
  if (window.jQuery) jQuery.fx.off = true;
})()"""
_STATE = "typeof WOB_DONE_GLOBAL === 'undefined' ? null : [WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL]"


def verify(artifact: bytes) -> Reward:
    """The reward of what an episode left: 1 for an end with a raw reward of 1, else 0."""
    found = json.loads(artifact)
    solved = float(found["ended"] and found["raw"] == 1.0)
    return Reward(solved, {"solved": solved, "raw": float(found["raw"]), "ended": float(found["ended"])})


class MiniwobEpisode(BrowserEpisode):
    """One page with one seed."""

    number_texts = True
    toolset = TOOLS

    def __init__(self, task: Task, pool: BrowserPool, action_limit_s: float) -> None:
        super().__init__(task, pool, action_limit_s)
        self.start_target = f"/miniwob/{task.kind}.html"
        self._ended = False
        self._raw = 0.0

    def site(self) -> MiniwobSite:
        """The pages."""
        return MiniwobSite(self.start_target)

    async def prepare_page(self, page: Page) -> None:
        """Start the problem. Raises EnvironmentFailureError where the page does not."""
        try:
            await page.evaluate(_BEGIN % json.dumps(self.task.secret["seed"]), world="")
        except CdpError as error:
            raise EnvironmentFailureError(f"the page {self.task.kind} cannot be started: {error}") from error

    async def act(self, doing: Callable[[Page], Awaitable[None]], part: int = 1) -> str:
        """As any; after the page's end nothing is done. Raises ToolError."""
        if self._ended:
            raise ToolError("it is over")
        return await super().act(doing, part)

    async def acted(self, page: Page) -> str | None:
        """Take down the end, when it has come."""
        state = await page.evaluate(_STATE, world="")
        if state is None or state[0]:  # a page that was left is over, too
            self._ended = True
            self._raw = float(state[1]) if state else 0.0
            return "It is over."
        return None

    async def step(self, action: Action) -> Observation:
        """As any tool episode, but the end of the page ends it too."""
        observation = await super().step(action)
        return Observation(observation.messages, observation.done or self._ended, num_timeouts=observation.num_timeouts)

    def artifact(self) -> bytes:
        """What the page said at its end."""
        return json.dumps({"ended": self._ended, "raw": self._raw}).encode()

    async def grade(self) -> Reward:
        """By what was taken down. Raises EnvironmentFailureError after `close`."""
        if self._closed:
            raise EnvironmentFailureError("the episode is closed")
        return verify(self.artifact())


class MiniwobEnvironment(Environment):
    """MiniWoB++'s pages, which take turns.

    pages: which of PAGES, all by default. Splits differ by their seeds; what small pages ask may come up in both.
    warm_pages, max_pages, action_timeout_s: as of `browser`. Raises ValueError, EnvironmentOptionsError without the
    package.
    """

    name = "miniwob"
    max_turns = 24

    def __init__(
        self,
        pages: Sequence[str] | None = None,
        warm_pages: int = 4,
        max_pages: int = 64,
        action_timeout_s: float = 30.0,
    ) -> None:
        wanted = PAGES if pages is None else tuple(pages)
        if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(PAGES):
            raise ValueError(f"pages is {list(wanted)}; choose one or more, each once, of {', '.join(PAGES)}")
        if action_timeout_s <= 0:
            raise ValueError(f"action_timeout_s is {action_timeout_s}; it must be greater than 0")
        pages_folder()
        self._pages = wanted
        self._action_timeout_s = action_timeout_s
        self._pool = BrowserPool(warm_pages, max_pages, MiniwobSite.origin)

    @property
    def tools(self) -> Sequence[Tool]:
        """`click`, `type`, `select`, `press`, `scroll` and `read`."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The page and seed of this split and index. Raises ValueError for a split or index that does not exist."""
        if split not in ("train", "heldout") or index < 0:
            raise ValueError(f"miniwob has the splits train and heldout from index 0, not {split!r} {index}")
        turn, which = divmod(index, len(self._pages))
        secret = {"seed": f"{split} {turn}"}
        return Task(self.name, split, index, self._pages[which], (Message("user", PROMPT),), secret)

    def episode(self, task: Task) -> MiniwobEpisode:
        """A fresh attempt."""
        return MiniwobEpisode(task, self._pool, self._action_timeout_s)

    def reference(self, task: Task) -> MiniwobReference:
        """Solves the page through the tools."""
        return MiniwobReference(task.kind)

    async def prepare(self) -> None:
        """Start Chromium and make the warm pages. Raises SandboxError with the command to type."""
        await self._pool.prepare()

    async def close(self) -> None:
        """End Chromium."""
        await self._pool.close()
