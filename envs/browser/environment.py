"""The browser: office work in a web application, through a real Chromium; graded on what the server holds at the end.

The application runs in this process, one for each episode; Chromium is in a box without network, and its pages'
requests are answered over its pipe. What the verifier gets is the server's final state, nothing that was said or shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from envs.browser.episode import TOOLS, BrowserEpisode
from envs.browser.office.reference import OfficeReference
from envs.browser.office.site import USER, OfficeSite
from envs.browser.office.tasks import KINDS, password_of, problem
from envs.browser.office.verifier import verify
from envs.browser.pool import BrowserPool
from envs.interface import Environment, EnvironmentFailureError, Message, Reward, Split, Task, Tool
from envs.plans import Kind

LEVELS = (1, 2, 3)
SIGN_IN_LEVEL = 3
PROMPT = (
    "You work with an office's web application in a browser. Change what the task asks for and nothing else; answer "
    "with the word done afterwards. Elements that you can act on are shown in brackets with their numbers.{sign_in}\n\n"
    "Task: {instruction}"
)


class OfficeEpisode(BrowserEpisode):
    """One task in one office."""

    def __init__(self, task: Task, pool: BrowserPool, action_limit_s: float) -> None:
        super().__init__(task, pool, action_limit_s)
        self.office = OfficeSite(task.secret["rows"], task.secret["password"])

    def site(self) -> OfficeSite:
        """The office."""
        return self.office

    def artifact(self) -> bytes:
        """The state that leaves for the verifier."""
        return self.office.store.artifact()

    async def grade(self) -> Reward:
        """Of the state reached, whatever the policy says about it. Raises EnvironmentFailureError after `close`."""
        if self._closed:
            raise EnvironmentFailureError("the episode is closed")
        return verify(self.task.secret, self.artifact())


class BrowserEnvironment(Environment):
    """Tasks in an office's web application.

    levels: which levels of difficulty to ask, of 1 (one form) to 3 (sign in, several pages and forms). warm_pages: how
    many are kept ready. max_pages: how many are in use at once. action_timeout_s: wall-clock seconds of one action;
    past it a page counts as hanging, so it is generous to a busy machine. Raises ValueError.
    """

    name = "browser"
    max_turns = 60

    def __init__(
        self,
        levels: Sequence[int] = LEVELS,
        warm_pages: int = 4,
        max_pages: int = 64,
        action_timeout_s: float = 30.0,
    ) -> None:
        if not levels or len(set(levels)) != len(levels) or not set(levels) <= set(LEVELS):
            raise ValueError(f"levels is {list(levels)}; choose one or more, each once, of 1, 2 and 3")
        if action_timeout_s <= 0:
            raise ValueError(f"action_timeout_s is {action_timeout_s}; it must be greater than 0")
        self._kinds: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind.level in levels)
        self._action_timeout_s = action_timeout_s
        self._pool = BrowserPool(warm_pages, max_pages, OfficeSite.origin)

    @property
    def tools(self) -> Sequence[Tool]:
        """`open`, `click`, `type`, `select`, `press`, `scroll`, `back` and `read`."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The task of this split and index. Raises ValueError for a split or index that does not exist."""
        if split not in ("train", "heldout") or index < 0:
            raise ValueError(f"browser has the splits train and heldout from index 0, not {split!r} {index}")
        found = problem(self._kinds, split, index)
        password = password_of(split, index) if found.kind.level >= SIGN_IN_LEVEL else None
        sign_in = f" Sign in as {USER} with the password {password}." if password else ""
        text = PROMPT.format(sign_in=sign_in, instruction=found.plan.instruction)
        secret = {"rows": found.rows, "expected": found.expected, "facts": found.plan.facts, "password": password}
        return Task(self.name, split, index, found.kind.name, (Message("user", text),), secret)

    def episode(self, task: Task) -> OfficeEpisode:
        """A fresh attempt."""
        return OfficeEpisode(task, self._pool, self._action_timeout_s)

    def reference(self, task: Task) -> OfficeReference:
        """Solves the task through the tools."""
        return OfficeReference(task.kind, task.secret["facts"])

    async def prepare(self) -> None:
        """Start Chromium and make the warm pages. Raises SandboxError with the command to type."""
        await self._pool.prepare()

    async def close(self) -> None:
        """End Chromium."""
        await self._pool.close()
