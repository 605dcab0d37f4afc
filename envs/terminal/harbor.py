"""Harbor-style task folders as an environment, without containers: a documented subset of that format.

A folder of tasks holds one folder each. Honoured:

- `instruction.md`: the prompt. Required.
- `task.toml`: `metadata.difficulty` (the task's kind) and `verifier.timeout_sec`. Required. All else is ignored:
  images, resources, users, network (there never is any).
- `environment/`: its files, but a Dockerfile and compose files, lie in /workspace, which is also /app. No Dockerfile is
  executed: programs and packages are those of this machine.
- `tests/`: in /tests, in the grading sandbox only, where `bash /tests/test.sh` runs beside a copy of the policy's
  /workspace after all its processes are dead. Required.
- `/logs/verifier/reward.txt` (a number), or else `reward.json` (its `reward`, or its only number): the reward, which
  must lie between 0 and 1; anything else, or nothing, is 0.
- `solution/solve.sh`: the reference policy. Without it there is none.

Such a test runs the policy's files in its own sandbox, so it is as honest as its author made it: what it executes of
them can forge the reward. The procedural `terminal` has no such weakness.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.interface import (
    Environment,
    EnvironmentFailureError,
    EnvironmentOptionsError,
    Episode,
    Message,
    ReferencePolicy,
    Reward,
    Split,
    Task,
    Tool,
)
from envs.sandbox import AnySandbox, Limits, Sandbox, SandboxPool
from envs.terminal.environment import TOOLS, CommandsReference, ShellEpisode

LIMITS = Limits(processes=48, memory_bytes=1 << 30, file_bytes=32 << 20, work_bytes=64 << 20, tmp_bytes=32 << 20)
NOT_COPIED = ("Dockerfile", "docker-compose.yaml", "docker-compose.yml", ".dockerignore")
REWARDS = "/tmp/logs/verifier"  # /logs leads there
WORK = "/opt/workspace.tar"


@dataclass(frozen=True, slots=True)
class Folder:
    """One task as it was read. `files` are relative to /workspace, `tests` to /tests."""

    name: str
    difficulty: str
    instruction: str
    files: dict[str, bytes]
    tests: dict[str, bytes]
    solution: str | None
    timeout_s: float


def _files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and str(path.relative_to(root)) not in NOT_COPIED
    }


def read_folder(path: Path) -> Folder:
    """Read one task. Raises EnvironmentOptionsError for one that is not whole."""
    for needed in ("task.toml", "instruction.md", "tests/test.sh"):
        if not (path / needed).is_file():
            raise EnvironmentOptionsError(f"task folder {path} has no {needed}; it needs one")
    try:
        settings = tomllib.loads((path / "task.toml").read_text())
        timeout_s = float(settings.get("verifier", {}).get("timeout_sec", 600.0))
        difficulty = str(settings.get("metadata", {}).get("difficulty", "task"))
    except (tomllib.TOMLDecodeError, AttributeError, TypeError, ValueError) as error:
        raise EnvironmentOptionsError(f"{path / 'task.toml'} cannot be read: {error}") from error
    if not 0 < timeout_s < math.inf:
        raise EnvironmentOptionsError(f"{path / 'task.toml'}: verifier.timeout_sec is {timeout_s}; it must be positive")
    solve = path / "solution" / "solve.sh"
    return Folder(
        path.name,
        difficulty,
        (path / "instruction.md").read_text(),
        _files(path / "environment"),
        _files(path / "tests"),
        solve.read_text() if solve.is_file() else None,
        timeout_s,
    )


def parse_reward(text: bytes | None, document: bytes | None) -> float | None:
    """The number of reward.txt, or else of reward.json; None where there is none between 0 and 1."""
    try:
        if text is not None:
            value = float(text.decode().strip())
        else:
            found = json.loads(document or b"null")
            numbers = found if isinstance(found, dict) else {}
            value = float(
                numbers["reward"] if "reward" in numbers or len(numbers) != 1 else next(iter(numbers.values()))
            )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return value if 0 <= value <= 1 else None


class HarborEpisode(ShellEpisode):
    """One task folder."""

    async def furnish(self, sandbox: AnySandbox) -> None:
        """Copy environment/ into /workspace."""
        for path, data in self.task.secret["folder"].files.items():
            await sandbox.write(path, data)

    async def grade(self) -> Reward:
        """What tests/test.sh says in a fresh sandbox. `no_reward`: 1 where it said nothing, or nothing sound."""
        if self.sandbox is None:
            raise EnvironmentFailureError("the episode has not started, or is closed")
        folder: Folder = self.task.secret["folder"]
        await self.sandbox.kill_all()
        try:
            work = await self.sandbox.snapshot()
        except OSError:
            return Reward(0.0, {"no_reward": 1.0})
        files = {f"/tests/{path}": data for path, data in folder.tests.items()} | {WORK: work}
        async with await Sandbox.create(files, LIMITS) as fresh:
            unpacked = await fresh.exec(f"tar -xf {WORK} -C / --no-overwrite-dir workspace && mkdir -p {REWARDS}")
            if not unpacked.ok:
                return Reward(0.0, {"no_reward": 1.0})
            tested = await fresh.exec("exec bash /tests/test.sh", timeout_s=folder.timeout_s)
            value = None
            if tested.exit_code is not None:
                await fresh.kill_all()
                value = parse_reward(await _content(fresh, "reward.txt"), await _content(fresh, "reward.json"))
        return Reward(value or 0.0, {"no_reward": float(value is None)})


async def _content(sandbox: Sandbox, name: str) -> bytes | None:
    try:
        return await sandbox.read(f"{REWARDS}/{name}", max_bytes=4096)
    except OSError:
        return None  # not written, which the caller reports


class HarborEnvironment(Environment):
    """The tasks of a folder. Named `envs.terminal:HarborEnvironment` in a configuration.

    path: the folder of tasks. heldout_every: each task of this number, by name, is held out; 0 for none.
    warm_sandboxes, tool_timeout_s: as of `terminal`. Raises EnvironmentOptionsError, ValueError.
    """

    name = "harbor"
    max_turns = 50

    def __init__(
        self, path: str, heldout_every: int = 5, warm_sandboxes: int = 2, tool_timeout_s: float = 60.0
    ) -> None:
        folders = sorted(each.parent for each in Path(path).glob("*/task.toml"))
        if not folders:
            raise EnvironmentOptionsError(f"path is {path!r}; no folder in it has a task.toml")
        if heldout_every < 0 or tool_timeout_s <= 0:
            raise ValueError("heldout_every must be 0 or more, tool_timeout_s greater than 0")
        read = [read_folder(each) for each in folders]
        held = [heldout_every > 0 and place % heldout_every == heldout_every - 1 for place in range(len(read))]
        self._splits: dict[str, list[Folder]] = {
            "train": [each for each, out in zip(read, held, strict=True) if not out],
            "heldout": [each for each, out in zip(read, held, strict=True) if out],
        }
        self._tool_timeout_s = tool_timeout_s
        self._pool = SandboxPool(warm_sandboxes, limits=LIMITS)

    @property
    def tools(self) -> Sequence[Tool]:
        """`bash`."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The task of this split and index; they begin again after the last. Raises ValueError."""
        folders = self._splits.get(split, [])
        if not folders or index < 0:
            raise ValueError(f"there is no task {index} in the split {split!r}, which has {len(folders)} folders")
        folder = folders[index % len(folders)]
        prompt = (Message("user", folder.instruction),)
        return Task(self.name, split, index, folder.difficulty, prompt, {"folder": folder})

    def episode(self, task: Task) -> Episode:
        """A fresh attempt."""
        return HarborEpisode(task, self._pool, self._tool_timeout_s)

    def reference(self, task: Task) -> ReferencePolicy:
        """Runs solution/solve.sh. Raises EnvironmentFailureError where the task has none."""
        folder: Folder = task.secret["folder"]
        if folder.solution is None:
            raise EnvironmentFailureError(f"task folder {folder.name} has no solution/solve.sh, so no reference policy")
        return CommandsReference([f"(\n{folder.solution}\n)"])

    async def prepare(self) -> None:
        """Fill the pool of sandboxes. Raises SandboxError with the command to type."""
        await self._pool.prepare()

    async def close(self) -> None:
        """Close the pool of sandboxes."""
        await self._pool.close()
