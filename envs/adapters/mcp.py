"""Tools of any MCP server as an environment's tools: one server process per episode, over standard input and output.

The server is trusted: it runs beside this process and not in a sandbox, so choose one that cannot do harm. Tasks and
grades are the author's, in a file; this knows no particular server. The package is the optional extra `mcp`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from envs.interface import (
    Environment,
    EnvironmentFailureError,
    EnvironmentOptionsError,
    Message,
    Reward,
    SandboxError,
    Split,
    Task,
    Tool,
    ToolCall,
)
from envs.reason.answers import tagged
from envs.scripted import Script, ScriptedPolicy
from envs.tools import ToolEpisode, ToolOutput, ToolSet

MAX_OUTPUT = 8000
START_S = 60.0
T = TypeVar("T")
Pending = tuple[str, dict[str, Any], "asyncio.Future[ToolOutput]"]


class McpServer:
    """A running server, spoken to by a task of its own: MCP's client must be left by the task that entered it.

    Raises SandboxError where the server does not start or has ended.
    """

    def __init__(self, command: Sequence[str], timeout_s: float) -> None:
        self._command = list(command)
        self._timeout_s = timeout_s
        self._pending: asyncio.Queue[Pending | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> tuple[Tool, ...]:
        """Start it; its tools."""
        ready: asyncio.Future[tuple[Tool, ...]] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._serve(ready))
        either: list[asyncio.Future[Any]] = [self._task, ready]
        await asyncio.wait(either, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            why = self._task.exception() if self._task.done() else "it did not answer in time"
            await self.close()
            raise SandboxError(f"the MCP server {self._command[0]} did not start: {_reason(why)}")
        return ready.result()

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolOutput:
        """What a tool answers."""
        if self._task is None or self._task.done():
            raise SandboxError(f"the MCP server {self._command[0]} is not running")
        answer: asyncio.Future[ToolOutput] = asyncio.get_running_loop().create_future()
        self._pending.put_nowait((name, arguments, answer))
        either: list[asyncio.Future[Any]] = [self._task, answer]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise SandboxError(f"the MCP server {self._command[0]} ended")
        return answer.result()

    async def close(self) -> None:
        """End the server; idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        self._pending.put_nowait(None)
        if not (await asyncio.wait([task], timeout=5))[0]:
            task.cancel()
            await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # it was told to whoever waited for an answer

    async def _serve(self, ready: asyncio.Future[tuple[Tool, ...]]) -> None:
        from mcp import Client, MCPError, StdioServerParameters

        parameters = StdioServerParameters(command=self._command[0], args=self._command[1:])
        async with Client(parameters, read_timeout_seconds=self._timeout_s) as client:
            listed = (await client.list_tools()).tools
            ready.set_result(tuple(Tool(t.name, t.description or t.name, t.input_schema) for t in listed))
            while (item := await self._pending.get()) is not None:
                name, arguments, answer = item
                try:
                    result = await client.call_tool(name, arguments)
                except MCPError as error:
                    answer.set_result(ToolOutput(f"error: {error}"[:MAX_OUTPUT], error=True))
                    continue
                texts = [getattr(part, "text", f"({part.type})") for part in result.content]
                failed = bool(result.is_error)
                answer.set_result(ToolOutput(("error: " * failed + "\n".join(texts))[:MAX_OUTPUT], error=failed))


def _reason(why: object) -> str:
    while isinstance(why, BaseExceptionGroup):
        why = why.exceptions[0]
    return f"{type(why).__name__}: {why}" if isinstance(why, BaseException) else str(why)


class McpTools(ToolSet):
    """A server's tools; the calls go to the episode's own server, which checks the arguments."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__()
        self.tools = tuple(tools)

    async def call(self, episode: Any, call: ToolCall) -> ToolOutput:
        """Pass a call on. Raises SandboxError where the server has ended."""
        if call.name not in {tool.name for tool in self.tools}:
            known = ", ".join(tool.name for tool in self.tools)
            return ToolOutput(f"error: unknown tool {call.name[:32]}; the tools are: {known}", error=True)
        return await episode.server.call(call.name, dict(call.arguments))  # type: ignore[no-any-return]


class McpEpisode(ToolEpisode):
    """One task with a server of its own."""

    def __init__(self, task: Task, tools: McpTools, server: McpServer) -> None:
        super().__init__(task, tools)
        self.server = server

    async def start(self) -> Sequence[Message]:
        """Start the server. Raises SandboxError."""
        await self.server.start()
        return self.task.prompt

    async def grade(self) -> Reward:
        """1 for exactly the expected text between the answer's tags, else 0."""
        correct = float(tagged(self.final_text) == self.task.secret["answer"])
        return Reward(correct, {"correct": correct})

    async def close(self) -> None:
        """End the server."""
        await self.server.close()


class McpReference(ScriptedPolicy):
    """Makes the calls that the task's author wrote down, and gives the expected answer."""

    def __init__(self, calls: Sequence[Mapping[str, Any]], answer: str) -> None:
        super().__init__()
        self._calls = calls
        self._answer = answer

    def script(self, prompt: str) -> Script[str]:
        """One call a turn."""
        for call in self._calls:
            yield ToolCall(call["name"], call.get("arguments", {}))
        return f"<answer>{self._answer}</answer>"


class McpEnvironment(Environment):
    """Questions to be answered with an MCP server's tools.

    command: the program that serves MCP on standard input and output, with its arguments. tasks: a file with one JSON
    object a line: prompt, answer, and optionally kind, split (train by default) and calls, those of the reference
    policy. timeout_s: seconds of one call. Raises EnvironmentOptionsError, SandboxError.
    """

    name = "mcp"
    max_turns = 20

    def __init__(self, command: Sequence[str], tasks: str, timeout_s: float = 30.0) -> None:
        if isinstance(command, str) or not command or timeout_s <= 0:
            raise ValueError(
                f"command is {command!r}; give a list of a program and its arguments, and a timeout_s above 0"
            )
        self._command, self._timeout_s = list(command), timeout_s
        self._tasks = _read(Path(tasks))
        self._tools = McpTools(_in_a_thread(self._listed()))

    async def _listed(self) -> tuple[Tool, ...]:
        try:
            import mcp  # noqa: F401
        except ImportError as error:
            raise EnvironmentOptionsError("MCP needs the package mcp: type `pip install ergon[mcp]`") from error
        server = McpServer(self._command, self._timeout_s)
        try:
            return await server.start()
        finally:
            await server.close()

    @property
    def tools(self) -> Sequence[Tool]:
        """The server's."""
        return self._tools.tools

    def task(self, split: Split, index: int) -> Task:
        """The file's task; beyond its last they begin again. Raises ValueError for a split without tasks."""
        mine = [each for each in self._tasks if each.get("split", "train") == split]
        if not mine or index < 0:
            raise ValueError(f"the file of tasks has {len(mine)} of the split {split!r}, and no index {index}")
        found = mine[index % len(mine)]
        prompt = (Message("user", f"{found['prompt']}\nAnswer with <answer>...</answer>"),)
        secret = {"answer": str(found["answer"]), "calls": found.get("calls", [])}
        return Task(self.name, split, index, found.get("kind", "mcp"), prompt, secret)

    def episode(self, task: Task) -> McpEpisode:
        """A fresh server."""
        return McpEpisode(task, self._tools, McpServer(self._command, self._timeout_s))

    def reference(self, task: Task) -> McpReference:
        """The author's calls and answer. Raises EnvironmentFailureError where there are no calls."""
        if not task.secret["calls"]:
            raise EnvironmentFailureError(f"task {task.index} has no `calls`, so there is no reference policy")
        return McpReference(task.secret["calls"], task.secret["answer"])


def _in_a_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end in an event loop of its own, whether or not there is one here."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, work).result()


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        tasks = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise EnvironmentOptionsError(f"tasks is {str(path)!r}: {error}") from error
    for number, task in enumerate(tasks, 1):
        if not isinstance(task, dict) or not isinstance(task.get("prompt"), str) or "answer" not in task:
            raise EnvironmentOptionsError(f"tasks is {str(path)!r}: line {number} needs a prompt and an answer")
    return tasks
