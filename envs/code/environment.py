"""Code: write a function. A tool tries code out; the final answer is graded in a fresh sandbox on hidden inputs.

What counts is what comes out: the parent holds the expected values and compares results of primitive types. No exit
code, no printed verdict, no clock and no equality of the candidate's process is believed.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from envs.code.families import FAMILIES
from envs.code.problem import FUNCTION, Problem, problem, results, same
from envs.interface import (
    Action,
    Environment,
    EnvironmentFailureError,
    Episode,
    Message,
    ReferencePolicy,
    Reward,
    SandboxError,
    SnapshotError,
    Split,
    Task,
    Tool,
    ToolCall,
)
from envs.sandbox import AnySandbox, Limits, SandboxPool, check_walled
from envs.snapshots import State, pack, unpack
from envs.tools import ToolEpisode, ToolError, ToolSet
from envs.tools.output import shown

LIMITS = Limits(processes=8, memory_bytes=256 << 20, work_bytes=4 << 20, tmp_bytes=2 << 20, output_bytes=8192)
RUNNER = "/opt/code/runner.py"
RECORDS_BYTES = 256 << 10
MAX_SOURCE = 32 << 10
MAX_FILES = 8 << 20  # an archive of the sandbox's files: its two file systems together, and the archive's own
FENCE = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)
ASK = "{question}\n\nYou may try code with the tool. Answer with the whole function in one ```python block."


async def python(episode: CodeEpisode, code: Annotated[str, "a Python program"]) -> str:
    """Run a Python program in a sandbox and see what it prints."""
    return await episode.run(code)


TOOLS = ToolSet(python)


def candidate(text: str | None) -> str | None:
    """The source in the one code block of the final answer; None for anything else."""
    blocks = FENCE.findall(text or "")
    return blocks[0] if len(blocks) == 1 and 0 < len(blocks[0]) <= MAX_SOURCE and "\0" not in blocks[0] else None


class CodeState(State, kw_only=True):
    """Beside the counts: an archive of the sandbox's files, None while no program was run. Nothing that runs on after
    its program is in it."""

    files: Annotated[bytes, Meta(max_length=MAX_FILES)] | None = None


class CodeEpisode(ToolEpisode):
    """One function to write."""

    def __init__(self, task: Task, pool: SandboxPool, tool_timeout_s: float, grade_timeout_s: float) -> None:
        super().__init__(task, TOOLS)
        self._pool = pool
        self._tool_timeout_s = tool_timeout_s
        self._grade_timeout_s = grade_timeout_s
        self._sandbox: AnySandbox | None = None
        self._closed = False

    async def run(self, code: str) -> str:
        """Run a program of the policy; what it printed. Raises ToolError, SandboxError."""
        if self._closed:
            raise EnvironmentFailureError("the episode is closed")
        source = code.encode(errors="replace")
        if len(source) > MAX_SOURCE or b"\0" in source:
            raise ToolError(f"at most {MAX_SOURCE} bytes, and no NUL")
        if self._sandbox is None:
            self._sandbox = await self._pool.acquire()
        try:
            await self._sandbox.write("program.py", source)
        except OSError as error:
            raise ToolError("the program could not be written; is the disk full?") from error
        result = await self._sandbox.shell("python3 -I -S program.py", timeout_s=self._tool_timeout_s)
        return shown(result, self._tool_timeout_s)

    async def snapshot(self) -> bytes:
        """See Episode. Raises SnapshotError where the sandbox's files cannot be read."""
        if self.final_text is not None:
            raise SnapshotError("the episode is over")
        try:
            files = None if self._sandbox is None else await self._sandbox.snapshot(MAX_FILES)
        except (OSError, SandboxError) as error:
            raise SnapshotError(str(error)) from error
        counts = msgspec.structs.asdict(self.state())
        return pack(self.task, CodeState(**counts, files=files))

    async def resume(self, snapshot: bytes) -> None:
        """Of a fresh episode: go on from a snapshot. Raises SnapshotError and SandboxError."""
        state = unpack(self.task, snapshot, CodeState)
        self.set_state(state)
        if state.files is not None:
            try:
                self._sandbox = await self._pool.restore(state.files)
            except OSError as error:
                raise SnapshotError(str(error)) from error

    async def grade(self) -> Reward:
        """1 where all hidden calls give the right value, else 0. `passed`: the fraction; `tampered`: bad records."""
        made: Problem = self.task.secret["problem"]
        source = candidate(self.final_text)
        if source is None:
            return Reward(0.0, {"solved": 0.0, "passed": 0.0, "tampered": 0.0})
        nonce = secrets.token_hex(16)
        async with await self._pool.acquire() as fresh:
            await fresh.write("candidate.py", source.encode(errors="replace"))
            await fresh.write("inputs.json", json.dumps(made.hidden).encode())
            command = f"exec python3 -I -S {RUNNER} {nonce} {FUNCTION}"
            ended = await fresh.exec(command, timeout_s=self._grade_timeout_s, output_bytes=RECORDS_BYTES)
        found = None if ended.truncated else results(ended.stdout, nonce, len(made.hidden))
        right = sum(
            number in (found or {}) and same((found or {})[number], value) for number, value in enumerate(made.expected)
        )
        solved = float(right == len(made.expected))
        return Reward(
            solved, {"solved": solved, "passed": right / len(made.expected), "tampered": float(found is None)}
        )

    async def close(self) -> None:
        """Kill the sandbox."""
        self._closed = True
        if self._sandbox is not None:
            await self._sandbox.close()


class CodeReference(ReferencePolicy):
    """Tries the solution once, then answers with it."""

    def __init__(self, source: str) -> None:
        self._source = source

    def act(self, messages: Sequence[Message]) -> Action:
        """The trial, or the answer."""
        if not any(message.role == "tool" for message in messages):
            return Action("", (ToolCall("python", {"code": f"{self._source}\nprint({FUNCTION}.__name__)"}),))
        return Action(f"```python\n{self._source}```")


class CodeEnvironment(Environment):
    """Functions to write, of procedural families.

    families: names of those to ask, all by default. warm_sandboxes: how many are kept ready. tool_timeout_s,
    grade_timeout_s: wall-clock seconds of one trial, and of all hidden calls together. sandbox: the backend,
    `bubblewrap` or `pod`. Raises ValueError.
    """

    name = "code"
    snapshots = True

    def __init__(
        self,
        families: Sequence[str] | None = None,
        warm_sandboxes: int = 4,
        tool_timeout_s: float = 10.0,
        grade_timeout_s: float = 10.0,
        sandbox: str = "bubblewrap",
    ) -> None:
        known = {family.name: family for family in FAMILIES}
        names = tuple(known) if families is None else tuple(families)
        if not names or len(set(names)) != len(names) or not set(names) <= set(known):
            raise ValueError(f"families is {list(names)}; choose one or more, each once, of {', '.join(known)}")
        for key, value in (("tool_timeout_s", tool_timeout_s), ("grade_timeout_s", grade_timeout_s)):
            if value <= 0:
                raise ValueError(f"{key} is {value}; it must be greater than 0")
        self._families = tuple(known[name] for name in names)
        self._timeouts_s = tool_timeout_s, grade_timeout_s
        runner = Path(__file__).with_name("runner.py").read_bytes()
        backend = check_walled(sandbox)
        self._pool = SandboxPool(warm_sandboxes, {RUNNER: runner}, LIMITS, backend)

    @property
    def tools(self) -> Sequence[Tool]:
        """`python`."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The task of this split and index; families take turns. Raises ValueError."""
        if split not in ("train", "heldout") or index < 0:
            raise ValueError(f"code has the splits train and heldout from index 0, not {split!r} {index}")
        number, place = divmod(index, len(self._families))
        made = problem(self._families[place], split, number)
        prompt = (Message("user", ASK.format(question=made.question)),)
        return Task(self.name, split, index, made.family, prompt, {"problem": made})

    def episode(self, task: Task) -> CodeEpisode:
        """A fresh attempt."""
        return CodeEpisode(task, self._pool, *self._timeouts_s)

    async def restore(self, task: Task, snapshot: bytes) -> Episode:
        """See Environment."""
        episode = self.episode(task)
        await episode.resume(snapshot)
        return episode

    def reference(self, task: Task) -> ReferencePolicy:
        """Answers with the family's own solution."""
        return CodeReference(task.secret["problem"].source)

    async def prepare(self) -> None:
        """Fill the pool of sandboxes and look for Python in them. Raises SandboxError with the command to type."""
        await self._pool.prepare()
        async with await self._pool.acquire() as sandbox:
            tried = await sandbox.exec("exec python3 -I -S -c 'print(42)'")
        if tried.stdout != b"42\n":
            raise SandboxError(
                "code needs python3 in /usr/bin or /usr/local/bin: type `apt-get install python3-minimal`"
            )

    async def close(self) -> None:
        """Close the pool of sandboxes."""
        await self._pool.close()
