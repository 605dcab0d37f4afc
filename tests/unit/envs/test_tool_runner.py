"""Where tools run: async ones on the loop, plain ones in threads; and what becomes of those that hang."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from envs import timeouts
from envs.interface import Action, EnvironmentFailureError, Message, Reward, SandboxError, Task, ToolCall
from envs.tools import ToolEpisode, ToolRunner, ToolSet, ToolTimeoutError, tool

RELEASE = threading.Event()


def where(episode: Any) -> str:
    """In which thread it runs."""
    return threading.current_thread().name


@tool(timeout_s=0.01)
def hang(episode: Any) -> str:
    """Hangs in a thread."""
    RELEASE.wait(60)
    return "late"


def leave(episode: Any, how: str) -> str:
    """Ends badly."""
    if how == "exit":
        sys.exit("gone")
    raise StopIteration(how)


@tool(timeout_s=0.01)
async def sleep(episode: Any) -> str:
    """Hangs on the loop."""
    await asyncio.Event().wait()
    return "late"


@tool(timeout_s=0.01)
async def resist(episode: Any) -> str:
    """Hangs on the loop, whatever one does."""
    while not RELEASE.is_set():
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            continue
    return "late"


async def hidden(episode: Any) -> str:
    """Knows its own limit."""
    raise ToolTimeoutError("the search timed out")


def waits(episode: Any) -> Any:
    """A plain function that returns something to await."""
    return asyncio.sleep(0, "awaited")


TOOLS = ToolSet(where, hang, leave, sleep, resist, hidden, waits)


class Tried(ToolEpisode):
    async def grade(self) -> Reward:
        return Reward(0.0)


def episode() -> Tried:
    return Tried(Task("test", "train", 0, "kind", (Message("user", "go"),)), TOOLS)


async def call(name: str, **arguments: Any) -> tuple[str, bool]:
    output = await TOOLS.call(episode(), ToolCall(name, arguments))
    return output.text, output.timed_out


@pytest.fixture(autouse=True)
def released(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(timeouts, "CANCEL_GRACE_S", 0.01)
    RELEASE.clear()
    yield
    RELEASE.set()


@pytest.fixture
async def runner() -> AsyncIterator[ToolRunner]:
    before = timeouts.num_abandoned()
    async with ToolRunner(timeout_s=30.0, num_threads=2) as runner:
        yield runner
        RELEASE.set()
        while runner.num_late_threads or timeouts.num_abandoned() > before:
            await asyncio.sleep(0.001)


async def test_a_plain_function_runs_beside_the_loop(runner: ToolRunner) -> None:
    assert await call("where") == ("tool-where", False)
    assert await call("waits") == ("awaited", False)


@pytest.mark.parametrize("name", ["hang", "sleep", "resist"])
async def test_a_tool_that_hangs_is_an_error_for_the_policy_and_the_episode_goes_on(
    runner: ToolRunner, name: str
) -> None:
    running = episode()
    observation = await running.step(Action("", (ToolCall(name, {}), ToolCall("where", {}))))
    assert [message.content for message in observation.messages] == [
        f"error: {name} timed out after 0.01 s",
        "tool-where",
    ]
    assert (observation.num_timeouts, running.num_tool_timeouts, running.num_tool_errors) == (1, 1, 1)


async def test_a_tool_may_have_its_own_limit_and_is_counted_too(runner: ToolRunner) -> None:
    assert await call("hidden") == ("error: the search timed out", True)


async def test_a_tool_cannot_end_the_process(runner: ToolRunner) -> None:
    with pytest.raises(EnvironmentFailureError, match="end of the process"):
        await call("leave", how="exit")
    with pytest.raises(EnvironmentFailureError, match="StopIteration"):
        await call("leave", how="stop")


async def test_when_every_thread_hangs_tools_fail_as_infrastructure_does(runner: ToolRunner) -> None:
    assert [await call("hang"), await call("hang")] == [("error: hang timed out after 0.01 s", True)] * 2
    assert runner.num_late_threads == 2
    with pytest.raises(SandboxError, match=r'declare where and others that may hang with @tool\(where="process"\)'):
        await call("where")
    RELEASE.set()
    while runner.num_late_threads:
        await asyncio.sleep(0.001)
    assert await call("where") == ("tool-where", False)


async def test_a_call_that_is_given_up_gives_its_thread_back_when_that_ends(runner: ToolRunner) -> None:
    caller = asyncio.create_task(runner.run(TOOLS._functions["where"][2], lambda _: RELEASE.wait(60), None, {}))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert runner.num_late_threads == 1


async def test_each_loop_has_a_runner_of_its_own() -> None:
    first = ToolRunner.current()
    assert ToolRunner.current() is first
    async with ToolRunner() as second:
        assert ToolRunner.current() is second


def test_declarations_that_cannot_be_kept_are_refused() -> None:
    async def asynchronous(episode: Any) -> str:
        """Async."""
        return ""

    def plain(episode: Any) -> str:
        """Plain."""
        return ""

    with pytest.raises(TypeError, match=r"'asynchronous' is an async function, .* where = 'thread' does not fit"):
        tool(where="thread")(asynchronous)
    with pytest.raises(TypeError, match=r"'plain' is a plain function, .* where = 'loop' does not fit"):
        tool(where="loop")(plain)
    with pytest.raises(ValueError, match="timeout_s is 0"):
        tool(timeout_s=0)
    with pytest.raises(TypeError, match="define it at the top of a module"):
        ToolSet(tool(where="process")(plain))
