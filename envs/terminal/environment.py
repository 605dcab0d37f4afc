"""The terminal: one tool, a persistent bash in a sandbox. What is left is graded, by the parent, which only reads.

Nothing that the policy says counts, nor any status: when an episode ends, all its processes are killed, the files are
read as an archive, and the parent compares. What is wanted never enters the sandbox.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

from envs.interface import (
    Action,
    Environment,
    EnvironmentFailureError,
    Episode,
    Message,
    ReferencePolicy,
    Reward,
    Split,
    Task,
    Tool,
    ToolCall,
)
from envs.sandbox import AnySandbox, Limits, SandboxPool, check_walled
from envs.terminal.kinds import KINDS
from envs.terminal.problem import Kind, Problem, problem
from envs.terminal.state import StateError, final_state
from envs.tools import ToolEpisode, ToolError, ToolSet
from envs.tools.output import shown

LIMITS = Limits(processes=24, memory_bytes=256 << 20, work_bytes=8 << 20, tmp_bytes=8 << 20, output_bytes=8192)
LEVELS = (1, 2, 3)
PREAMBLE = "You have a bash shell in /workspace. {prompt} When it is done, answer without calling a tool."


async def bash(episode: ShellEpisode, command: Annotated[str, "one or more lines for bash"]) -> str:
    """Run a command in a bash shell that keeps its folder, variables and background jobs between calls."""
    return await episode.run(command)


TOOLS = ToolSet(bash)


class Sandboxes(Protocol):
    """Where an episode's sandbox comes from: a pool, or what stands for one."""

    async def acquire(self) -> AnySandbox:
        """A fresh sandbox, which the taker closes. Raises SandboxError."""


class ShellEpisode(ToolEpisode):
    """An attempt with a shell. Subclasses put the task's files into the sandbox and grade what is left."""

    def __init__(self, task: Task, pool: Sandboxes, tool_timeout_s: float, tools: ToolSet = TOOLS) -> None:
        super().__init__(task, tools)
        self.sandbox: AnySandbox | None = None
        self.tool_timeout_s = tool_timeout_s
        self._pool = pool

    async def start(self) -> Sequence[Message]:
        """Take a fresh sandbox and put the task into it. Raises SandboxError."""
        self.sandbox = await self._pool.acquire()
        await self.furnish(self.sandbox)
        return self.task.prompt

    async def furnish(self, sandbox: AnySandbox) -> None:
        """Put the task's files into the sandbox."""

    async def run(self, command: str) -> str:
        """Run one command; its output, and what else the policy must know of it. Raises ToolError, SandboxError."""
        if self.sandbox is None:
            raise EnvironmentFailureError("the episode has not started, or is closed")
        try:
            result = await self.sandbox.shell(command, timeout_s=self.tool_timeout_s)
        except (ValueError, UnicodeError) as error:
            raise ToolError(str(error)) from error
        return shown(result, self.tool_timeout_s)

    async def close(self) -> None:
        """Kill the sandbox."""
        if self.sandbox is not None:
            sandbox, self.sandbox = self.sandbox, None
            await sandbox.close()


class TerminalEpisode(ShellEpisode):
    """One procedural task."""

    async def furnish(self, sandbox: AnySandbox) -> None:
        """Unpack the files, start what runs besides."""
        made: Problem = self.task.secret["problem"]
        await sandbox.write("/tmp/task.tar", made.archive())
        unpack = "tar -xf /tmp/task.tar -C /workspace --no-same-owner && rm /tmp/task.tar"
        result = await sandbox.exec(f"{unpack} && {{ {made.background or ':;'} }}")
        if not result.ok:
            raise EnvironmentFailureError(f"the task's files could not be unpacked: {result.stderr[:300]!r}")

    async def grade(self) -> Reward:
        """1 where every file is as it must be, else 0. `state_unreadable`: 1 where the files could not be read."""
        if self.sandbox is None:
            raise EnvironmentFailureError("the episode has not started, or is closed")
        made: Problem = self.task.secret["problem"]
        try:
            state = await final_state(self.sandbox)
        except StateError:
            return Reward(0.0, {"solved": 0.0, "state_unreadable": 1.0})
        solved = float(not made.failures(state))
        return Reward(solved, {"solved": solved, "state_unreadable": 0.0})


class CommandsReference(ReferencePolicy):
    """Runs given commands one after the other, then says that it is done."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands

    def act(self, messages: Sequence[Message]) -> Action:
        """The next command, by the number of answers so far."""
        done = sum(message.role == "tool" for message in messages)
        if done < len(self._commands):
            return Action("", (ToolCall("bash", {"command": self._commands[done]}),))
        return Action("Done.")


class TerminalEnvironment(Environment):
    """Procedural tasks for a shell: files, logs, text, archives, processes.

    kinds: names of the kinds to ask, all by default. levels: of difficulty, of 1, 2 and 3. warm_sandboxes: how many are
    kept ready. tool_timeout_s: wall-clock seconds of one command. sandbox: the backend, `bubblewrap` or `pod`. Raises
    ValueError.
    """

    name = "terminal"

    def __init__(
        self,
        kinds: Sequence[str] | None = None,
        levels: Sequence[int] = LEVELS,
        warm_sandboxes: int = 4,
        tool_timeout_s: float = 10.0,
        sandbox: str = "bubblewrap",
    ) -> None:
        known = {kind.name: kind for kind in KINDS}
        names = tuple(known) if kinds is None else tuple(kinds)
        if not names or len(set(names)) != len(names) or not set(names) <= set(known):
            raise ValueError(f"kinds is {list(names)}; choose one or more, each once, of {', '.join(known)}")
        if not levels or len(set(levels)) != len(levels) or not set(levels) <= set(LEVELS):
            raise ValueError(f"levels is {list(levels)}; choose one or more, each once, of 1, 2 and 3")
        if tool_timeout_s <= 0:
            raise ValueError(f"tool_timeout_s is {tool_timeout_s}; it must be greater than 0")
        self._kinds: tuple[Kind, ...] = tuple(known[name] for name in names)
        self._levels = tuple(levels)
        self._tool_timeout_s = tool_timeout_s
        self._pool = SandboxPool(warm_sandboxes, limits=LIMITS, backend=check_walled(sandbox))

    @property
    def tools(self) -> Sequence[Tool]:
        """`bash`."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The task of this split and index; kinds take turns, and then levels. Raises ValueError."""
        if split not in ("train", "heldout") or index < 0:
            raise ValueError(f"the terminal has the splits train and heldout from index 0, not {split!r} {index}")
        number, place = divmod(index, len(self._kinds))
        kind = self._kinds[place]
        number, rank = divmod(number, len(self._levels))
        level = self._levels[rank]
        made = problem(kind, level, split, number)
        prompt = (Message("user", PREAMBLE.format(prompt=made.prompt)),)
        return Task(self.name, split, index, f"{kind.name}/{level}", prompt, {"problem": made})

    def episode(self, task: Task) -> Episode:
        """A fresh attempt."""
        return TerminalEpisode(task, self._pool, self._tool_timeout_s)

    def reference(self, task: Task) -> ReferencePolicy:
        """Types the solution."""
        return CommandsReference(task.secret["problem"].solution)

    async def prepare(self) -> None:
        """Fill the pool of sandboxes. Raises SandboxError with the command to type."""
        await self._pool.prepare()

    async def close(self) -> None:
        """Close the pool of sandboxes."""
        await self._pool.close()
