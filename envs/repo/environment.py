"""The repository: real Python packages into which a bug was put. Find it with a shell and an editor, and repair it.

The policy has a working copy without the tests and with one commit, made from the files with the bug in them, so that
no right version is anywhere near; what the system has of the packages is hidden. When an episode ends all its processes
are killed and the package's own Python files are taken out, nothing else; grading.py says what they must come to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated

from envs.interface import (
    Action,
    Environment,
    EnvironmentFailureError,
    EnvironmentOptionsError,
    Message,
    ReferencePolicy,
    Reward,
    SandboxError,
    Split,
    Task,
    Tool,
    ToolCall,
)
from envs.repo.bugs import LEVELS, Bug, all_bugs, report
from envs.repo.copies import copies
from envs.repo.editor import create, insert, str_replace, view
from envs.repo.grading import Grader
from envs.repo.packages import Package, kit, packages
from envs.repo.sources import CACHE, archive, fetch, tree
from envs.sandbox import AnySandbox, Limits, SandboxPool
from envs.terminal.environment import ShellEpisode
from envs.terminal.state import StateError, final_state
from envs.tools import ToolSet

LIMITS = Limits(
    processes=32,
    memory_bytes=512 << 20,
    work_bytes=24 << 20,
    tmp_bytes=16 << 20,
    open_files=128,
    cpu_s=60,
    output_bytes=12 << 10,
)
BASE = "/tmp/base.tar.gz"
# One commit of fixed date and author, so that it has the same name everywhere, and nothing that remembers more.
COMMIT = (
    f"tar -xzf {BASE} -C /workspace --no-same-owner && rm {BASE} && git init -q -b main . && git add -A && "
    "GIT_AUTHOR_DATE='2026-01-01T00:00:00Z' GIT_COMMITTER_DATE='2026-01-01T00:00:00Z' "
    "git -c user.name=Ergon -c user.email=ergon@localhost -c gc.auto=0 commit -q -m base && rm -rf .git/logs .git/hooks"
)


async def bash(episode: RepoEpisode, command: Annotated[str, "one or more lines for bash"]) -> str:
    """Run a command in a bash shell that keeps its folder, variables and background jobs between calls."""
    return await episode.run(command)


TOOLS = ToolSet(bash, view, str_replace, insert, create)


class RepoEpisode(ShellEpisode):
    """One bug."""

    def __init__(self, task: Task, pool: HidingPool, tool_timeout_s: float) -> None:
        super().__init__(task, pool, tool_timeout_s, TOOLS)
        self._grader = pool.grader
        self._cache = pool.cache
        self._base: Mapping[str, bytes] = {}

    @property
    def _bug(self) -> Bug:
        bug: Bug = self.task.secret["bug"]
        return bug

    @property
    def _package(self) -> Package:
        return packages()[self._bug.package]

    async def furnish(self, sandbox: AnySandbox) -> None:
        """Unpack the working copy and commit it. Raises SandboxError where the package is not to be had."""
        self._base = await asyncio.to_thread(working_copy, self._package, self._bug, self._cache)
        await sandbox.write(BASE, await asyncio.to_thread(archive, self._base))
        made = await sandbox.exec(COMMIT)
        if not made.ok:
            raise EnvironmentFailureError(f"the repository could not be made: {made.stderr[:300]!r}")

    async def grade(self) -> Reward:
        """1 where the repaired package does all that the right one does, else 0.

        calls, tests: the shares of recorded calls and of hidden tests that come out right; tests are only run where all
        calls are. untouched: 1 where the package's files are as they were. tampered: 1 for records that are not sound.
        """
        if self.sandbox is None:
            raise EnvironmentFailureError("the episode has not started, or is closed")
        parts = {"solved": 0.0, "calls": 0.0, "tests": 0.0, "untouched": 0.0, "tampered": 0.0, "state_unreadable": 0.0}
        try:
            state = await final_state(self.sandbox)
        except StateError:
            return Reward(0.0, parts | {"state_unreadable": 1.0})
        before = {path: data for path, data in self._base.items() if self._package.is_code(path)}
        # Files that were not there before are not taken: a repair changes what there is.
        after = {path: entry.data for path in before if (entry := state.get(path)) and entry.data is not None}
        if after == before:
            return Reward(0.0, parts | {"untouched": 1.0})
        verdict = await self._grader.grade(self._package, after)
        solved = float(verdict.solved)
        found = {"solved": solved, "calls": verdict.calls, "tests": verdict.tests, "tampered": float(not verdict.sound)}
        return Reward(solved, parts | found)


class HidingPool:
    """Sandboxes that hide the system's copies of the packages, and the grader whose sandboxes do too.

    What is to be hidden is only known once the packages are there, so nothing is made before the first sandbox is asked
    for. Belongs to one event loop.
    """

    def __init__(self, size: int, names: tuple[str, ...], grade_timeout_s: float, cache: str) -> None:
        self.grader = Grader(grade_timeout_s, cache)
        self.cache = cache
        self._size = size
        self._names = names
        self._lock = asyncio.Lock()
        self._pool: SandboxPool | None = None
        self._closed = False

    async def acquire(self) -> AnySandbox:
        """A fresh sandbox. Raises SandboxError, also where a package is not to be had."""
        return await (await self._made()).acquire()

    async def prepare(self) -> None:
        """Fetch what is missing and fill the pool. Raises SandboxError."""
        pins = [*kit(), *(packages()[name].pin for name in self._names)]
        await asyncio.to_thread(fetch, pins, self.cache)
        await (await self._made()).prepare()
        await self.grader.check([packages()[name] for name in self._names])

    async def _made(self) -> SandboxPool:
        async with self._lock:
            if self._closed:
                raise SandboxError("the environment is closed")
            if self._pool is None:
                self.grader.hidden = await asyncio.to_thread(copies, self._names, self.cache)
                self._pool = SandboxPool(self._size, limits=LIMITS, hidden=self.grader.hidden)
            return self._pool

    async def close(self) -> None:
        """Close what there is."""
        self._closed = True
        await self.grader.close()
        if self._pool is not None:
            await self._pool.close()


def working_copy(package: Package, bug: Bug, cache: str = CACHE) -> dict[str, bytes]:
    """What a policy gets: the package without its tests, with the bug; blocks. Raises SandboxError."""
    files = {path: data for path, data in tree(package, cache).items() if package.is_shown(path)}
    files[bug.path] = bug.applied(files[bug.path])
    return files


class RepoReference(ReferencePolicy):
    """Looks at the place, puts the right text back with the editor, and looks at the difference."""

    def __init__(self, bug: Bug, right: str) -> None:
        self._path = bug.path
        broken = right[: bug.start] + bug.new + right[bug.end :]
        self._line = broken[: bug.start].count("\n") + 1
        start, end, new_end = bug.start, bug.end, bug.start + len(bug.new)
        after = len(broken) - new_end
        while broken.count(broken[start:new_end]) != 1 or not broken[start:new_end]:  # more of what stands around it
            start = max(0, broken.rfind("\n", 0, max(0, start - 1)))
            after = max(0, after - 40)
            new_end, end = len(broken) - after, len(right) - after
        self._old, self._new = broken[start:new_end], right[start:end]

    def act(self, messages: Sequence[Message]) -> Action:
        """The next step, by the number of answers so far."""
        place = {"path": self._path, "first": max(1, self._line - 3), "last": self._line}
        steps = (
            ToolCall("view", place),
            ToolCall("str_replace", {"path": self._path, "old": self._old, "new": self._new}),
            ToolCall("bash", {"command": "git diff --stat"}),
        )
        done = sum(message.role == "tool" for message in messages)
        return Action("", (steps[done],)) if done < len(steps) else Action("It is repaired.")


class RepoEnvironment(Environment):
    """Bugs in real packages.

    packages: names of those to use, all by default. levels: how much is told, of 1 (a failing test's traceback), 2
    (what a call does) and 3 (that something is wrong). warm_sandboxes: how many are kept ready. tool_timeout_s,
    grade_timeout_s: wall-clock seconds of one command, and of each of the two parts of grading. cache: the folder of
    the source distributions, which pip fetches when they are missing. Raises EnvironmentOptionsError.
    """

    name = "repo"
    max_turns = 40

    def __init__(
        self,
        packages: Sequence[str] | None = None,
        levels: Sequence[int] = LEVELS,
        warm_sandboxes: int = 2,
        tool_timeout_s: float = 20.0,
        grade_timeout_s: float = 120.0,
        cache: str = CACHE,
    ) -> None:
        names = _checked(packages)
        if not levels or len(set(levels)) != len(levels) or not set(levels) <= set(LEVELS):
            raise EnvironmentOptionsError(f"levels is {list(levels)}; choose one or more, each once, of 1, 2 and 3")
        for key, value in (("tool_timeout_s", tool_timeout_s), ("grade_timeout_s", grade_timeout_s)):
            if value <= 0:
                raise EnvironmentOptionsError(f"{key} is {value}; it must be greater than 0")
        self._levels = tuple(levels)
        self._tool_timeout_s = tool_timeout_s
        self._cache = cache
        self._pool = HidingPool(warm_sandboxes, names, grade_timeout_s, cache)
        self._bugs = {
            split: [bug for bug in all_bugs() if bug.package in names and bug.split == split]
            for split in ("train", "heldout")
        }

    @property
    def tools(self) -> Sequence[Tool]:
        """`bash`, `view`, `str_replace`, `insert` and `create`."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The task of this split and index; after the last bug they begin again at another level. Raises ValueError."""
        bugs = self._bugs.get(split, [])
        if not bugs or index < 0:
            raise ValueError(
                f"there is no task {index} in the split {split!r}: these packages have {len(bugs)} bugs in it, and the "
                "splits are train and heldout"
            )
        again, place = divmod(index, len(bugs))
        level = self._levels[(place + again) % len(self._levels)]
        bug = bugs[place]
        prompt = (Message("user", report(bug, level)),)
        return Task(self.name, split, index, f"{bug.kind}/{level}", prompt, {"bug": bug})

    def episode(self, task: Task) -> RepoEpisode:
        """A fresh attempt."""
        return RepoEpisode(task, self._pool, self._tool_timeout_s)

    def reference(self, task: Task) -> ReferencePolicy:
        """Puts the right text back. Raises SandboxError where the package is not to be had."""
        bug: Bug = task.secret["bug"]
        return RepoReference(bug, tree(packages()[bug.package], self._cache)[bug.path].decode())

    async def prepare(self) -> None:
        """Fetch what is missing, fill the pool. Raises SandboxError with what to type."""
        await self._pool.prepare()

    async def close(self) -> None:
        """Close the pool of sandboxes, end what is being found out."""
        await self._pool.close()


def _checked(names: Sequence[str] | None) -> tuple[str, ...]:
    """The names of packages. Raises EnvironmentOptionsError."""
    known = packages()
    if names is None:
        return tuple(known)
    if not names or len(set(names)) != len(names) or not set(names) <= set(known):
        raise EnvironmentOptionsError(
            f"packages is {list(names)}; choose one or more, each once, of {', '.join(known)}"
        )
    return tuple(names)
