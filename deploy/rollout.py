"""Rolls out a policy on an environment without a run: the reference, or a model behind an OpenAI-compatible endpoint.

Measures and records; trains nothing and samples nothing itself. A failure of the environment, the machine or the
endpoint is listed as such and never counted as a reward of 0.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from broker.process.lifecycle import ErgonError
from deploy.broker_admin import table
from envs.interface import (
    Action,
    Environment,
    EnvironmentFailureError,
    Message,
    SandboxError,
    Split,
    Task,
    Tool,
    ToolCall,
)
from envs.play import Acting, play


@dataclass(frozen=True, slots=True)
class Rollout:
    """Which tasks, how many at once, and how many turns each (None: the environment's own)."""

    split: Split
    first: int
    episodes: int
    concurrency: int
    max_turns: int | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("episodes", self.episodes),
            ("concurrency", self.concurrency),
            ("max-turns", self.max_turns),
        ):
            if value is not None and value < 1:
                raise ErgonError(f"--{name} is {value}; it must be 1 or more")


@dataclass(slots=True)
class Record:
    """One episode, as it is written. outcome: completed, truncated_turns, env_failure or infra_failure."""

    env: str
    split: str
    index: int
    kind: str
    outcome: str
    reward: float | None = None
    components: dict[str, float] = field(default_factory=dict)
    num_tool_calls: int = 0
    seconds: float = 0.0
    error: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)


class EndpointError(Exception):
    """The endpoint did not answer a request."""


class EndpointPolicy:
    """One episode's conversation with an endpoint: tools as functions, calls by their ids."""

    def __init__(self, client: Any, model: str, temperature: float, tools: Sequence[Tool]) -> None:
        self._client = client
        self._settings: dict[str, Any] = {"model": model, "temperature": temperature}
        if tools:
            self._settings["tools"] = [
                {
                    "type": "function",
                    "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)},
                }
                for t in tools
            ]
        self._seen: tuple[Message, ...] = ()
        self._native: list[dict[str, Any]] = []
        self._call_ids: list[str] = []

    async def act(self, messages: Sequence[Message]) -> Action:
        """Ask the endpoint for the next turn. Raises EndpointError."""
        from openai import OpenAIError

        self._take(tuple(messages))
        try:
            answer = await self._client.chat.completions.create(messages=self._native, **self._settings)
            said = answer.choices[0].message
        except (OpenAIError, IndexError, TypeError) as error:
            raise EndpointError(f"{type(error).__name__}: {error}") from error
        action = _action(said)
        self._native.append(said.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
        self._call_ids = [call.id for call in said.tool_calls or ()]
        self._seen = (*messages, Message("assistant", action.text))
        return action

    def _take(self, messages: tuple[Message, ...]) -> None:
        """Bring the endpoint's conversation up to date; a history that was edited begins it anew."""
        if not self._seen or messages[: len(self._seen)] != self._seen:
            self._native, self._call_ids, new = [], [], messages
        else:
            new = messages[len(self._seen) :]
        answers = [message for message in new if message.role == "tool"]
        for number, call_id in enumerate(self._call_ids):
            content = answers[min(number, len(answers) - 1)].content if answers else ""
            self._native.append({"role": "tool", "tool_call_id": call_id, "content": content})
        for message in new:
            if message.role != "tool":
                self._native.append({"role": message.role, "content": message.content})
            elif not self._call_ids:
                self._native.append({"role": "user", "content": message.content})


def _action(said: Any) -> Action:
    text = said.content or ""
    calls = []
    for call in said.tool_calls or ():
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            return Action(text, malformed=f"the arguments of {call.function.name[:40]} are not a JSON object")
        calls.append(ToolCall(call.function.name, arguments))
    return Action(text, tuple(calls))


def policy_maker(environment: Environment, policy: str, model: str, temperature: float) -> Callable[[Task], Acting]:
    """What makes the policy of a task. Raises ErgonError for a policy that there is not."""
    if policy == "reference":
        return environment.reference
    if not policy.startswith(("http://", "https://")):
        raise ErgonError(f"--policy is {policy!r}; choose reference, or the URL of an OpenAI-compatible endpoint")
    if not model:
        raise ErgonError("an endpoint needs --model, the name under which it serves one")
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise ErgonError("an endpoint needs the package openai: type `pip install ergon[endpoint]`") from error
    client = AsyncOpenAI(base_url=policy, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    def make(_task: Task) -> Acting:
        return EndpointPolicy(client, model, temperature, environment.tools)

    return make


async def roll_out(environment: Environment, plan: Rollout, policy: Callable[[Task], Acting]) -> list[Record]:
    """Play the plan's tasks, one episode each; the records by index."""
    places = asyncio.Semaphore(plan.concurrency)

    async def one(index: int) -> Record:
        async with places:
            return await _episode(environment, environment.task(plan.split, index), plan, policy)

    return await asyncio.gather(*(one(plan.first + number) for number in range(plan.episodes)))


async def _episode(environment: Environment, task: Task, plan: Rollout, policy: Callable[[Task], Acting]) -> Record:
    record = Record(environment.name, task.split, task.index, task.kind, "completed")
    started = time.monotonic()
    try:
        played = await play(environment, task, policy(task), plan.max_turns)
    except EnvironmentFailureError as error:
        record.outcome, record.error = "env_failure", str(error)
    except (SandboxError, EndpointError) as error:
        record.outcome, record.error = "infra_failure", str(error)
    else:
        record.outcome = "completed" if played.done else "truncated_turns"
        record.reward, record.components = played.reward.total, dict(played.reward.components)
        record.num_tool_calls = len(played.tool_calls)
        record.messages = [{"role": message.role, "content": message.content} for message in played.messages]
    record.seconds = round(time.monotonic() - started, 3)
    return record


def write_records(path: Path, records: Sequence[Record]) -> None:
    """One JSON object a line. Raises ErgonError where the file cannot be written."""
    try:
        path.write_text("".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records), "utf-8")
    except OSError as error:
        raise ErgonError(f"--output {path} cannot be written: {error.strerror}") from error


def as_table(records: Sequence[Record]) -> str:
    """Rewards by kind, failures beside them, and why the first one failed."""
    kinds = list(dict.fromkeys(record.kind for record in records))
    rows = [_row(kind, [record for record in records if record.kind == kind]) for kind in kinds]
    if len(kinds) > 1:
        rows.append(_row("all", records))
    shown = table(("kind", "episodes", "reward", "solved", "tool calls", "truncated", "failed", "seconds"), rows)
    failed = next((record for record in records if record.error), None)
    return (
        shown if failed is None else f"{shown}\n\nfirst failure: task {failed.index}, {failed.outcome}: {failed.error}"
    )


def _row(name: str, records: Sequence[Record]) -> tuple[str, ...]:
    graded = [record for record in records if record.reward is not None]
    rewards = [record.reward for record in graded if record.reward is not None]

    def mean(values: Sequence[float]) -> str:
        return f"{sum(values) / len(values):.2f}" if values else "-"

    return (
        name,
        str(len(records)),
        mean(rewards),
        str(sum(reward >= 1 for reward in rewards)),
        mean([record.num_tool_calls for record in graded]),
        str(sum(record.outcome == "truncated_turns" for record in records)),
        str(len(records) - len(graded)),
        mean([record.seconds for record in records]),
    )
