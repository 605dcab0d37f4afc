"""A person plays an episode in the terminal: tools are commands, `answer TEXT` a turn without a call. No training."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TextIO

from broker.process.lifecycle import ErgonError
from deploy.environments import tool_line
from envs.interface import Action, Environment, Episode, Message, Task, Tool, ToolCall

HELP = """commands:
{tools}
  answer TEXT: a turn without a tool call, which usually ends the episode
  help: this list    quit: give up; the state reached so far is graded
Arguments: in their order, as name=value, or as one JSON object. One line is one turn."""


class CommandError(Exception):
    """What is wrong with a line; the person may try again."""


def parse_command(line: str, tools: Sequence[Tool]) -> Action:
    """The action that a line means. Raises CommandError."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name == "answer":
        return Action(rest)
    tool = next((each for each in tools if each.name == name), None)
    if tool is None:
        raise CommandError(f"{name!r} is no command; type help")
    return Action("", (ToolCall(name, _arguments(tool, rest)),))


def _arguments(tool: Tool, text: str) -> dict[str, Any]:
    properties: Mapping[str, Any] = tool.parameters.get("properties", {})
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise CommandError(f"not JSON: {error}") from error
        return dict(found)
    if len(properties) == 1 and text:
        ((name, schema),) = properties.items()
        return {name: _value(schema, text.removeprefix(f"{name}="))}
    arguments: dict[str, Any] = {}
    free = list(properties)
    for key, value in _words(text, properties):
        if not key and not free:
            raise CommandError(f"{tool.name} has the arguments {', '.join(properties) or 'none'}")
        name = key or free[0]
        arguments[name] = _value(properties[name], value) if isinstance(value, str) else value
        if name in free:
            free.remove(name)
    return arguments


def _words(text: str, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The words of a line, each with its name, or none: JSON objects and lists whole, texts in quotes, the rest."""
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        named = re.match(r"(\w+)=", text[position:])
        name = named[1] if named and named[1] in names else ""
        position += len(name) + 1 if name else 0
        if text[position : position + 1] in ("{", "["):
            try:
                value, position = json.JSONDecoder().raw_decode(text, position)
            except ValueError as error:
                raise CommandError(f"not JSON: {error}") from error
            yield name, value
            continue
        word = re.match(r"\"[^\"]*\"|'[^']*'|\S*", text[position:])
        found = word[0] if word else ""
        position += len(found)
        yield name, found[1:-1] if found[:1] in ("'", '"') and len(found) > 1 and found[-1] == found[0] else found


def _value(schema: Mapping[str, Any], text: str) -> Any:
    """A text stays one where a text is wanted; anything else is read as JSON, if it is JSON."""
    if schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


async def play_in_terminal(environment: Environment, task: Task, lines: TextIO, out: TextIO) -> float:
    """Play one episode with commands from `lines`; the reward's total. The end of the input is `quit`."""
    help_text = HELP.format(tools="\n".join(map(tool_line, environment.tools)) or "  (no tools)")
    episode = environment.episode(task)
    if not isinstance(episode, Episode):
        raise ErgonError(f"episodes of {environment.name!r} drive themselves; there is nothing for a person to play")
    try:
        _show(out, await episode.start())
        out.write(f"\n{help_text}\n")
        num_turns = 0
        while num_turns < environment.max_turns:
            action = _next_action(environment, lines, out, help_text)
            if action is None:
                break
            num_turns += 1
            if await _turn(episode, action, out):
                break
        reward = await episode.grade()
        parts = ", ".join(f"{name} {value:g}" for name, value in reward.components.items())
        out.write(f"\nreward {reward.total:g} after {num_turns} turns ({parts})\n")
        return reward.total
    finally:
        await episode.close()


def _next_action(environment: Environment, lines: TextIO, out: TextIO, help_text: str) -> Action | None:
    """What the person wants next; None for quit."""
    while True:
        out.write("> ")
        out.flush()
        line = lines.readline()
        if not line or line.strip() == "quit":
            return None
        if line.strip() == "help":
            out.write(f"{help_text}\n")
        elif line.strip():
            try:
                return parse_command(line, environment.tools)
            except CommandError as error:
                out.write(f"{error}\n")


async def _turn(episode: Episode, action: Action, out: TextIO) -> bool:
    observation = await episode.step(action)
    if observation.history is not None:
        out.write("\n(everything before this is forgotten)\n")
        _show(out, observation.history)
    _show(out, observation.messages)
    return observation.done


def _show(out: TextIO, messages: Sequence[Message]) -> None:
    for message in messages:
        out.write(f"{message.role}: {message.content}\n")
