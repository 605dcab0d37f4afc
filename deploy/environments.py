"""Environments on the command line: made from a name and options, used, described. Plays none (play.py, rollout.py)."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from broker.process.lifecycle import ErgonError
from envs.interface import Environment, ErgonEnvError, Split, Tool
from envs.registry import create_environment

T = TypeVar("T")


def parsed_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` as keyword arguments; a value that is JSON is what it says, any other a text. Raises ErgonError."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise ErgonError(f"--option {pair!r} is not KEY=VALUE")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def use(name: str, pairs: Sequence[str], act: Callable[[Environment], Awaitable[T]]) -> T:
    """What `act` makes of the environment, closed afterwards. Complaints of environments become ErgonErrors."""

    async def made() -> T:
        environment = create_environment(name, parsed_options(pairs))
        try:
            return await act(environment)
        finally:
            await environment.close()

    try:
        return asyncio.run(made())
    except (ErgonEnvError, ValueError) as error:
        raise ErgonError(str(error)) from error


def described(environment: Environment, split: Split, index: int) -> str:
    """What a person wants to know of an environment, and one of its tasks."""
    parts = [f"{environment.name}: {inspect.getdoc(type(environment)) or 'no description'}"]
    parameters = inspect.signature(type(environment)).parameters.values()
    options = [f"  {each.name}" + ("" if each.default is each.empty else f" = {each.default!r}") for each in parameters]
    parts.append("\n".join(["options:", *(options or ["  none"])]))
    parts.append(
        "\n".join(["tools:", *(tool_line(tool) for tool in environment.tools)] if environment.tools else ["no tools"])
    )
    task = environment.task(split, index)
    parts.append(f"task {split} {index} ({task.kind}), up to {environment.max_turns} turns:")
    parts += [f"{message.role}: {message.content}" for message in task.prompt]
    return "\n\n".join(parts)


def tool_line(tool: Tool) -> str:
    """A tool's name, arguments and description; arguments that may be left out are in brackets."""
    required = tool.parameters.get("required", [])
    names = tool.parameters.get("properties", {})
    arguments = " ".join(name if name in required else f"[{name}]" for name in names)
    return f"  {f'{tool.name} {arguments}'.rstrip()}: {tool.description}"
