"""Tools that run in processes of their own, for `test_tool_processes.py`: a worker must be able to import them."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from envs.interface import Reward, SandboxError, Task
from envs.tools import ToolEpisode, ToolError, ToolSet, tool


class UnlikeError(Exception):
    """Pickles, and does not come back."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} is not {second}")


@tool(where="process", timeout_s=30)
def who(task: Task) -> str:
    """Who answers, and of what task."""
    print("tools may print")
    return f"{os.getpid()} {task.index}"


@tool(where="process", timeout_s=1.0)
def hang(task: Task, how: str, note: str) -> str:
    """Hangs, holding Python's lock if told to."""
    child = subprocess.Popen(["sleep", "1000"])
    Path(note).write_text(f"{os.getpid()} {child.pid}", encoding="utf-8")
    if how == "sleep":
        time.sleep(1000)
    return str(10 ** (10**9) % 7)  # minutes in one instruction


@tool(where="process", timeout_s=30)
def fail(task: Task, how: str) -> Any:
    """Fails."""
    if how == "refuse":
        raise ToolError("not today")
    if how == "sandbox":
        raise SandboxError("gone")
    if how == "die":
        os._exit(7)
    if how == "unlike":
        raise UnlikeError(1, 2)
    if how == "exit":
        raise SystemExit(5)
    return lambda: how


class HeavyEpisode(ToolEpisode):
    async def grade(self) -> Reward:
        return Reward(0.0)


TOOLS = ToolSet(who, hang, fail)
