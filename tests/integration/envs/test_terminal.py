"""The terminal's own: what the policy sees, and tricks against a grader that only reads the state that is left."""

from __future__ import annotations

import io
import tarfile
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from envs.interface import Action, Reward, Task, ToolCall
from envs.terminal import TerminalEnvironment
from envs.terminal.state import StateError, parse_state
from tests.integration.envs.support import processes_with, unique_marker


@pytest_asyncio.fixture
async def terminal() -> AsyncIterator[TerminalEnvironment]:
    environment = TerminalEnvironment(["log_count"], levels=[1], warm_sandboxes=2, tool_timeout_s=2.0)
    yield environment
    await environment.close()


async def acted(terminal: TerminalEnvironment, task: Task, *commands: str) -> tuple[list[str], Reward]:
    episode = terminal.episode(task)
    try:
        await episode.start()
        told = []
        for command in commands:
            observation = await episode.step(Action("", (ToolCall("bash", {"command": command}),)))
            told.append(observation.messages[0].content)
        return told, await episode.grade()
    finally:
        await episode.close()


async def test_a_shell_that_remembers_and_output_that_steers_no_terminal(terminal: TerminalEnvironment) -> None:
    commands = ("cd /tmp; x=1", "echo $PWD $x; false", "printf '\\033[2J\\a\\r\\n'", "sleep 60", "exit 3", "yes")
    told, _ = await acted(terminal, terminal.task("train", 0), *commands)
    assert told[:3] == ["", "/tmp 1\n[exit status 1]", "\\x1b[2J\\x07"]
    assert told[3] == "[interrupted: it ran past 2 s or wrote too much]\n[exit status 130]"
    assert told[4] == "exit\n[the shell ended and was started again: variables and background jobs are gone]"
    assert "[output was cut]" in told[5]
    assert len(told[5]) < 10_000


async def test_what_a_process_left_behind_writes_after_the_end_does_not_count(terminal: TerminalEnvironment) -> None:
    task = terminal.task("train", 0)
    made = task.secret["problem"]
    ((out, answer),) = made.wanted.items()
    marker = unique_marker()
    late = f"(trap '' TERM INT HUP; while [ ! -e go ]; do sleep 0.01; done; echo {answer} > {out}; sleep {marker}) &"
    _, reward = await acted(terminal, task, late, "true")
    assert reward.total == 0.0
    assert processes_with(marker) == []
    _, reward = await acted(terminal, task, f"echo {answer} > {out}")
    assert reward.total == 1.0


@pytest.mark.parametrize(
    "trick",
    [
        "ln -s app.log {out}",
        "mkdir {out}",
        "mkfifo {out}",
        "echo {answer} > {out}; chmod 000 {out}",
        "echo {answer} > {out}; rm app.log",
        "echo {answer} > {out}; echo x >> app.log",
        "echo {answer} > /tmp/x; ln -s /tmp/x {out}",
        "echo '{answer} 1 2 3 4 5 6 7 8 9' > {out}",
        "echo {answer} > {out}; for i in $(seq 60); do truncate -s 8M big$i; done",
        "seq 0 999 > {out}",
    ],
)
async def test_a_state_that_is_not_what_was_asked_earns_nothing(terminal: TerminalEnvironment, trick: str) -> None:
    task = terminal.task("train", 0)
    ((out, answer),) = task.secret["problem"].wanted.items()
    _, reward = await acted(terminal, task, trick.format(out=out, answer=answer))
    assert reward.total == 0.0


async def test_the_wanted_state_is_nowhere_in_the_sandbox(terminal: TerminalEnvironment) -> None:
    environment = TerminalEnvironment(["stop_job"], levels=[3], warm_sandboxes=0)
    task = environment.task("train", 0)
    key = next(text for text in task.secret["problem"].wanted.values() if text)
    told, _ = await acted(environment, task, "grep -r . /workspace /tmp 2>/dev/null; env")
    assert key not in told[0]
    assert "worker" in told[0]
    await environment.close()


def test_broken_and_bloated_archives_are_states_that_cannot_be_read() -> None:
    with pytest.raises(StateError):
        parse_state(b"x" * 1024)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(20_001):
            tar.addfile(tarfile.TarInfo(f"workspace/{number}"))
    with pytest.raises(StateError, match="too many"):
        parse_state(buffer.getvalue())
