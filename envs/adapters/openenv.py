"""Environments behind an OpenEnv server: a client of its WebSocket, one session an episode, one tool, `act`.

The server is somebody else's: one that runs already, or one that this starts as a process, without any wall, so choose
one that can do no harm. What it says is shown to the policy, and its rewards are added up; nothing of its package is
imported here. Knows no particular environment. The client's package is the optional extra `openenv`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from envs.adapters.gymnasium import solver_of
from envs.adapters.seeds import seed_of
from envs.interface import (
    Action,
    Environment,
    EnvironmentFailureError,
    EnvironmentOptionsError,
    ErgonEnvError,
    Message,
    Observation,
    ReferencePolicy,
    Reward,
    SandboxError,
    Split,
    Task,
    Tool,
    ToolCall,
)
from envs.sandbox.bubblewrap import find_program
from envs.tools import ToolEpisode, ToolError, ToolSet

START_S = 120.0
MAX_SHOWN = 8000
MAX_MESSAGE = 1 << 20
NOT_SHOWN = ("done", "reward", "metadata")


async def act(episode: OpenEnvEpisode, action: Annotated[dict[str, Any], "the action's fields"]) -> str:
    """Take one action."""
    return await episode.take(action)


TOOLS = ToolSet(act)


class OpenEnvServer:
    """Where the sessions are. Belongs to one event loop.

    Raises SandboxError where the server does not start or cannot be reached.
    """

    def __init__(
        self, url: str | None, command: Sequence[str], variables: Mapping[str, str], sessions: int, timeout_s: float
    ) -> None:
        self.timeout_s = timeout_s
        self.free = asyncio.Semaphore(sessions)
        self._url = url
        self._command = list(command)
        self._variables = dict(variables)
        self._lock = asyncio.Lock()
        self._client: Any = None
        self._process: asyncio.subprocess.Process | None = None
        self._folder: Path | None = None
        self._schema: dict[str, Any] = {}

    async def start(self) -> dict[str, Any]:
        """Start it, or find it; the JSON schema of its actions."""
        import aiohttp

        async with self._lock:
            if self._client is None:
                if self._command:
                    await self._launch()
                self._client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self.timeout_s))
                try:
                    self._schema = await self._reached()
                except BaseException:
                    await self._end()
                    raise
            return self._schema

    async def _launch(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="ergon-openenv-"))
        variables = {"PATH": os.defpath, "HOME": str(self._folder), "LANG": "C.UTF-8", **self._variables}
        command = [part.replace("{port}", str(port)) for part in self._command]
        self._process = await asyncio.create_subprocess_exec(
            *(find_program("setpriv"), "--pdeathsig=KILL", "--", *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=variables,
            cwd=self._folder,
            start_new_session=True,
        )

    async def _reached(self) -> dict[str, Any]:
        """Ask for the schema until it answers."""
        import aiohttp

        loop = asyncio.get_running_loop()
        deadline = loop.time() + (START_S if self._process else self.timeout_s)
        while True:
            try:
                async with self._client.get(f"{self._url}/schema") as answer:
                    answer.raise_for_status()
                    found = await answer.json()
                    return dict(found["action"])
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
                ended = self._process is not None and self._process.returncode is not None
                if ended or self._process is None or loop.time() > deadline:
                    reason = "it ended" if ended else f"{type(error).__name__}: {error}"
                    raise SandboxError(f"the OpenEnv server {self._url} cannot be reached: {reason}") from error
            await asyncio.sleep(0.1)

    async def connect(self) -> Any:
        """A new session."""
        import aiohttp

        await self.start()
        try:
            return await self._client.ws_connect(f"{self._url}/ws", max_msg_size=MAX_MESSAGE)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise SandboxError(f"the OpenEnv server {self._url} refuses a session: {error}") from error

    async def close(self) -> None:
        """End what this has started; idempotent."""
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        folder, self._folder = self._folder, None
        if folder is not None:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


class OpenEnvEpisode(ToolEpisode):
    """One session. A turn without a call ends it."""

    def __init__(self, task: Task, server: OpenEnvServer, solved_at: float | None) -> None:
        super().__init__(task, TOOLS)
        self._server = server
        self._solved_at = solved_at
        self._socket: Any = None
        self._holds = False
        self._return = 0.0
        self._over = False
        self._closed = False

    async def start(self) -> Sequence[Message]:
        """Wait for a place, begin a session, reset it with the task's seed. Raises SandboxError."""
        if self._closed:
            raise EnvironmentFailureError("the episode is closed")
        schema = await self._server.start()
        await self._server.free.acquire()
        self._holds = True
        self._socket = await self._server.connect()
        shown = await self._asked("reset", {"seed": self.task.secret["seed"]})
        first = self.task.prompt[0]
        return (Message(first.role, f"{first.content}\n{_fields(schema)}\n\n{shown}"),)

    async def take(self, action: Mapping[str, Any]) -> str:
        """One step. Raises ToolError for an action that the server refuses, or after the end."""
        if self._over:
            raise ToolError("it is over")
        return await self._asked("step", action)

    async def _asked(self, kind: str, data: Mapping[str, Any]) -> str:
        """Send a message; what the observation that answers shows."""
        try:
            await self._socket.send_json({"type": kind, "data": dict(data)})
            async with asyncio.timeout(self._server.timeout_s):
                answer = await self._socket.receive_json()
        except (TimeoutError, OSError, TypeError, ValueError, RuntimeError) as error:
            raise SandboxError(f"the OpenEnv server broke off: {type(error).__name__}: {error}") from error
        body = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(body, dict):
            raise EnvironmentFailureError(f"the OpenEnv server answered {str(answer)[:200]!r}")
        if answer.get("type") == "error":
            return self._refused(body, kind)
        reward = body.get("reward")
        if reward is not None and (not isinstance(reward, int | float) or not math.isfinite(reward)):
            raise EnvironmentFailureError(f"the OpenEnv server gave the reward {reward!r}, which is no number")
        self._return += float(reward or 0.0)
        self._over = body.get("done") is True
        parts = [_shown(body.get("observation"))]
        parts += [f"reward: {float(reward):g}"] if reward is not None and kind == "step" else []
        return "\n".join([*parts, "It is over."] if self._over else parts)

    def _refused(self, body: Mapping[str, Any], kind: str) -> str:
        """An action that does not fit is the policy's mistake, everything else the server's."""
        message = f"{body.get('message', '')} {_reasons(body.get('errors'))}".strip()[:1000]
        if body.get("code") == "VALIDATION_ERROR" and kind == "step":
            raise ToolError(message)
        if body.get("code") == "CAPACITY_REACHED":
            raise SandboxError(f"the OpenEnv server has no place ({message}): lower the option sessions")
        raise EnvironmentFailureError(f"the OpenEnv server failed: {message}")

    async def step(self, action: Action) -> Observation:
        """As any tool episode, but the end of the server's episode ends it too."""
        if self._socket is None:
            raise EnvironmentFailureError("the episode was not started")
        observation = await super().step(action)
        return Observation(observation.messages, observation.done or self._over)

    async def grade(self) -> Reward:
        """The return, the sum of all rewards; with `solved_at`, 1 for as much and 0 for less."""
        total = self._return if self._solved_at is None else float(self._return >= self._solved_at)
        return Reward(total, {"return": self._return, "ended": float(self._over)})

    async def close(self) -> None:
        """End the session; idempotent."""
        self._closed = True
        connection, self._socket = self._socket, None
        if connection is not None:
            await connection.close()
        if self._holds:
            self._holds = False
            self._server.free.release()


def _shown(observation: Any) -> str:
    """An observation as lines, one for each field that says something."""
    if not isinstance(observation, dict):
        return str(observation)[:MAX_SHOWN]
    said = {key: value for key, value in observation.items() if key not in NOT_SHOWN}
    lines = (f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in said.items())
    return "\n".join(lines)[:MAX_SHOWN]


def _fields(schema: Mapping[str, Any]) -> str:
    """What an action has, from its JSON schema."""
    lines = ["An action has these fields:"]
    for name, field in schema.get("properties", {}).items():
        if name != "metadata" and isinstance(field, dict):
            told = " ".join(str(field[key]) for key in ("type", "description") if key in field)
            lines.append(f"- {name}: {told}" + ("" if name in schema.get("required", ()) else " (optional)"))
    return "\n".join(lines)


def _reasons(errors: Any) -> str:
    found = [each for each in errors if isinstance(each, dict)] if isinstance(errors, list) else []
    return "; ".join(f"{'.'.join(map(str, each.get('loc', ())))}: {each.get('msg', '')}" for each in found[:4])


class _Solving(ReferencePolicy):
    """Acts by a function from the last message's text to an action as JSON; an empty text ends."""

    def __init__(self, function: Callable[[str], str]) -> None:
        self._function = function

    def act(self, messages: Sequence[Message]) -> Action:
        """The function's action."""
        text = self._function(messages[-1].content)
        return Action("", (ToolCall("act", {"action": json.loads(text)}),)) if text else Action("Done.")


class OpenEnvEnvironment(Environment):
    """What an OpenEnv server serves.

    url: of one that runs. command: of one to start, with `{port}` where it takes the port; variables: its environment.
    sessions: how many episodes the server takes at once; others wait. goal: what the policy is told. solved_at: the
    return from which on an episode counts as solved, reward 1 instead of the return. solver: `module:function`, from a
    message's text to an action as JSON, for the reference policy. Seeds are given to the server, which may ignore them.
    Raises EnvironmentOptionsError and ValueError.
    """

    name = "openenv"

    def __init__(
        self,
        url: str | None = None,
        command: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        sessions: int = 1,
        goal: str = "Act so as to earn as much reward as you can.",
        solved_at: float | None = None,
        solver: str | None = None,
        max_turns: int = 50,
        timeout_s: float = 60.0,
    ) -> None:
        if bool(url) == bool(command):
            raise EnvironmentOptionsError(f"url is {url!r} and command is {list(command)}; give one of the two")
        if url is not None and not url.startswith(("http://", "https://")):
            raise EnvironmentOptionsError(f"url is {url!r}; it must begin with http:// or https://")
        if command and shutil.which(command[0]) is None:
            raise EnvironmentOptionsError(f"command is {list(command)}; there is no program {command[0]!r}")
        if sessions < 1 or timeout_s <= 0:
            raise ValueError(f"sessions is {sessions} and timeout_s {timeout_s}; both must be greater than 0")
        if importlib.util.find_spec("aiohttp") is None:
            raise EnvironmentOptionsError("an OpenEnv server needs the package aiohttp: `pip install ergon[openenv]`")
        self._goal = goal
        self._solved_at = solved_at
        self._solver = solver_of(solver) if solver else None
        self.max_turns = max_turns
        self._server = OpenEnvServer(url.rstrip("/") if url else None, command, variables or {}, sessions, timeout_s)

    @property
    def tools(self) -> Sequence[Tool]:
        """`act`."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The seed of this split and index: even ones train, odd ones are held out. Raises ValueError."""
        seed = seed_of(self.name, split, index)
        return Task(self.name, split, index, self.name, (Message("user", self._goal),), {"seed": seed})

    def episode(self, task: Task) -> OpenEnvEpisode:
        """A fresh session."""
        return OpenEnvEpisode(task, self._server, self._solved_at)

    def reference(self, task: Task) -> ReferencePolicy:
        """The solver's policy. Raises ErgonEnvError without a solver."""
        if self._solver is None:
            raise ErgonEnvError("there is no reference policy: give the option solver, `module:function`")
        return _Solving(self._solver)

    async def prepare(self) -> None:
        """Start the server, or find it. Raises SandboxError."""
        await self._server.start()

    async def close(self) -> None:
        """End the server that this has started."""
        await self._server.close()
