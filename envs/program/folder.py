"""The built-in environment `program`: tasks are folders, so that an agent and its tasks need no line of Python here.

    TASKS/train/NAME/, TASKS/heldout/NAME/:
        task.md         the task's text, for the program
        task.toml       optional: command, kind, text_by, artifacts, variables, verifier
        files/          optional: what lies in the program's working directory
        verifier/       optional: what lies in the verifier's; the program never sees it
        reference.json  optional: the turns of a reference policy, for a warm start: texts, or lists of calls as
                        {"name": ..., "arguments": {...}}

Index i is the i-th folder by name, begun again where there are no more. Owns the layout and the choice of a reward.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.interface import (
    Action,
    EnvironmentFailureError,
    EnvironmentOptionsError,
    Message,
    ReferencePolicy,
    Reward,
    Split,
    Task,
    ToolCall,
)
from envs.program.environment import ProgramEnvironment, graded_by_exit, graded_by_report
from envs.program.program import Program, ProgramResult
from envs.program.verifier import read_verdict, verifier_program

REWARDS = ("exit", "report", "verifier")
TASK_KEYS = ("command", "kind", "text_by", "artifacts", "variables", "verifier")


class FolderEnvironment(ProgramEnvironment):
    """Runs one program on tasks that lie in folders.

    tasks: the directory with `train` and `heldout`. command: argument vector, where a task's own does not say another.
    reward: `exit` (1 for exit code 0), `report` (what a trusted program POSTs), or `verifier` (the task's verifier, or
    `verifier` here). verifier: a function `module:name` of (task, result), or an argument vector that runs in
    `verifier/` and prints the reward. text_by, artifacts: where a task's own do not say another. The rest:
    see ProgramEnvironment. Raises ValueError, EnvironmentOptionsError.
    """

    name = "program"

    def __init__(
        self,
        tasks: str,
        command: Sequence[str] = (),
        reward: str = "verifier",
        verifier: str | Sequence[str] | None = None,
        text_by: str = "stdin",
        artifacts: Sequence[str] = (),
        trusted: bool = False,
        timeout_s: float = 600.0,
        output_bytes: int = 64 << 10,
        limits: Mapping[str, int] | None = None,
        mounts: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(trusted=trusted, timeout_s=timeout_s, output_bytes=output_bytes, limits=limits, mounts=mounts)
        if reward not in REWARDS:
            raise ValueError(f"reward is {reward!r}; choose {', '.join(REWARDS)}")
        if reward == "report" and not self.bounds.trusted:
            raise ValueError(
                "only a trusted program is believed what it reports; say trusted = true, or use a verifier"
            )
        self._reward = reward
        self._verifier = _function(verifier) if isinstance(verifier, str) else verifier
        self._defaults = {"command": list(command), "text_by": text_by, "artifacts": list(artifacts)}
        self._folders = {split: _folders(Path(tasks).expanduser() / split) for split in ("train", "heldout")}

    def task(self, split: Split, index: int) -> Task:
        """The folder of this split and index. Raises EnvironmentOptionsError for one that is not in order."""
        folders = self._folders[split]
        folder = folders[index % len(folders)]
        facts = self._defaults | _facts(folder)
        text = _read(folder / "task.md").decode()
        secret = {"folder": str(folder), "facts": facts}
        return Task(self.name, split, index, facts.get("kind", ""), (Message("user", text),), secret)

    def program(self, task: Task) -> Program:
        """The task's program. Raises EnvironmentOptionsError."""
        folder, facts = Path(task.secret["folder"]), task.secret["facts"]
        try:
            return Program(
                tuple(facts["command"]),
                task.prompt[0].content,
                facts["text_by"],
                _contents(folder / "files"),
                facts.get("variables", {}),
                tuple(facts["artifacts"]),
            )
        except ValueError as error:
            raise EnvironmentOptionsError(f"{folder}: {error}") from error

    async def verify(self, task: Task, result: ProgramResult, reports: Sequence[Reward]) -> Reward:
        """By exit code, by report, or by the task's or the environment's verifier."""
        if self._reward == "exit":
            return graded_by_exit(result)
        if self._reward == "report":
            return graded_by_report(result, reports)
        command = task.secret["facts"].get("verifier", self._verifier)
        if callable(command):
            # In a thread, since it may take its time; one that is asynchronous must not block.
            verdict = await asyncio.to_thread(command, task, result)
            verdict = await verdict if inspect.isawaitable(verdict) else verdict
            return verdict if isinstance(verdict, Reward) else Reward(float(verdict))
        if not command:
            raise EnvironmentFailureError(
                f"{task.secret['folder']} has no verifier, and the environment has none either"
            )
        files = _contents(Path(task.secret["folder"]) / "verifier")
        return read_verdict(await self.run(verifier_program(tuple(command), files, result)))

    def reference(self, task: Task) -> ReferencePolicy:
        """The turns of reference.json. Raises EnvironmentFailureError where there is none."""
        path = Path(task.secret["folder"]) / "reference.json"
        if not path.is_file():
            raise EnvironmentFailureError(f"{path} is missing, so this task has no reference episode")
        return WrittenTurns(json.loads(path.read_bytes()), path)


class WrittenTurns(ReferencePolicy):
    """Says the turns of a list, one after the other."""

    def __init__(self, turns: object, path: Path) -> None:
        """Raises EnvironmentFailureError for a list that is none of turns."""
        if not isinstance(turns, list):
            raise EnvironmentFailureError(f"{path} must hold a list of turns")
        self._actions = [_action(turn, path) for turn in turns]

    def act(self, messages: Sequence[Message]) -> Action:
        """The turn after as many as were said. Raises EnvironmentFailureError after the last one."""
        num_said = sum(message.role == "assistant" for message in messages)
        if num_said >= len(self._actions):
            raise EnvironmentFailureError(
                f"the reference has {len(self._actions)} turns, and the program wants another"
            )
        return self._actions[num_said]


def _action(turn: object, path: Path) -> Action:
    if isinstance(turn, str):
        return Action(turn)
    try:
        return Action("", tuple(ToolCall(call["name"], call["arguments"]) for call in turn))  # type: ignore[attr-defined]
    except (TypeError, KeyError) as error:
        raise EnvironmentFailureError(
            f"{path}: a turn is a text or a list of objects with name and arguments, not {turn!r:.80}"
        ) from error


def _folders(directory: Path) -> list[Path]:
    found = sorted(path for path in directory.glob("*") if (path / "task.md").is_file())
    if not found:
        raise EnvironmentOptionsError(f"tasks: {directory} has no task folder; each is a directory with a task.md")
    return found


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "task.toml"
    if not path.is_file():
        return {}
    try:
        facts = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise EnvironmentOptionsError(f"{path}: {error}") from error
    for key in facts:
        if key not in TASK_KEYS:
            raise EnvironmentOptionsError(f"{path} has the key {key!r}; its keys: {', '.join(TASK_KEYS)}")
    return facts


def _contents(directory: Path) -> Mapping[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): _read(path) for path in files}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EnvironmentOptionsError(f"{path} cannot be read: {error.strerror}") from error


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise EnvironmentOptionsError(f"verifier {name!r} must name a function as module:function ({error})") from error
    return function
