"""Tools in worker processes: what hangs is killed with all that it started, and the next call is served."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from envs.interface import EnvironmentFailureError, Message, SandboxError, Task, ToolCall
from envs.tools import ToolOutput, ToolRunner
from tests.integration.envs.heavy_tools import TOOLS, HeavyEpisode

ROOT = Path(__file__).parents[3]


@pytest.fixture
async def runner() -> AsyncIterator[ToolRunner]:
    async with ToolRunner(num_processes=1) as runner:
        yield runner


async def call(name: str, **arguments: Any) -> ToolOutput:
    episode = HeavyEpisode(Task("heavy", "train", 8, "kind", (Message("user", "go"),)), TOOLS)
    return await TOOLS.call(episode, ToolCall(name, arguments), episode.process_state)


async def worker_pid() -> int:
    pid, index = (await call("who")).text.split()
    assert index == "8"
    return int(pid)


@pytest.mark.parametrize("how", ["sleep", "compute"])
async def test_a_tool_that_hangs_is_killed_and_holds_nobody(runner: ToolRunner, tmp_path: Path, how: str) -> None:
    note = tmp_path / "pids"
    output = await call("hang", how=how, note=str(note))
    assert (output.text, output.timed_out) == ("error: hang timed out after 1 s", True)
    processes = [psutil.Process(int(pid)) for pid in note.read_text().split() if psutil.pid_exists(int(pid))]
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
    assert await worker_pid() == await worker_pid()


async def test_failures_are_what_they_are_elsewhere(runner: ToolRunner) -> None:
    pid = await worker_pid()
    assert (await call("fail", how="refuse")).text == "error: not today"
    with pytest.raises(SandboxError, match="gone"):
        await call("fail", how="sandbox")
    with pytest.raises(EnvironmentFailureError, match="UnlikeError: 1 is not 2"):
        await call("fail", how="unlike")
    with pytest.raises(EnvironmentFailureError, match="'fail' broke"):
        await call("fail", how="lambda")
    with pytest.raises(EnvironmentFailureError, match="end of the process"):
        await call("fail", how="exit")
    assert await worker_pid() == pid
    with pytest.raises(EnvironmentFailureError, match="its process ended with 7"):
        await call("fail", how="die")
    assert await worker_pid() != pid


async def test_a_call_that_is_given_up_ends_its_worker(runner: ToolRunner, tmp_path: Path) -> None:
    note = tmp_path / "pids"
    caller = asyncio.create_task(call("hang", how="sleep", note=str(note)))
    while not note.exists() or not note.read_text():
        await asyncio.sleep(0.01)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await worker_pid() != int(note.read_text().split()[0])


def test_a_hanging_tool_does_not_outlive_a_killed_process(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    program = (
        "import asyncio\n"
        "from tests.integration.envs.test_tool_processes import call\n"
        f"asyncio.run(call('hang', how='sleep', note={str(note)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while not note.exists() or not note.read_text():
        assert process.poll() is None
        os.sched_yield()
    worker = psutil.Process(int(note.read_text().split()[0]))
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs([worker], timeout=20)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
    for pid in note.read_text().split()[1:]:
        os.kill(int(pid), signal.SIGKILL)  # what the tool itself started is nobody's child now
