"""Tool calls as JSON: reading and writing them, and what a call's arguments must be. Pure; runs no tool.

The reason of a MalformedError is told to the policy, so it is short, and says what would have been right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from envs.interface import Tool, ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TAGGED = re.compile(f"{OPEN}.*?{CLOSE}", re.DOTALL)
MAX_SHOWN = 40  # characters of the policy's own text in a reason
_SPACE = re.compile(r"[ \t\r\n]*")

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


class MalformedError(Exception):
    """A call that cannot be read; the reason is told to the policy."""


def tool_json(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates show it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def dump(value: Any, indent: int | None = None) -> str:
    """JSON as chat templates write it: every character as it is."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def load(text: str, start: int) -> tuple[Any, int]:
    """The JSON value at `start`, spaces before it skipped, and where it ends. Raises ValueError for what is none."""
    try:
        value, end = _DECODER.raw_decode(text, _after_space(text, start))
        dump(value).encode()  # half of a surrogate pair is no text, though JSON can spell it
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value, end


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _after_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None
    return match.end()


def find_tool(name: str, tools: Sequence[Tool]) -> Tool:
    """The tool that a call names. Raises MalformedError."""
    for tool in tools:
        if tool.name == name:
            return tool
    known = ", ".join(tool.name for tool in tools)
    raise MalformedError(f"unknown tool {name[:MAX_SHOWN]}; the tools are: {known or 'none'}")


def properties(tool: Tool) -> Mapping[str, Any]:
    """The schemas of a tool's parameters by name."""
    found: Mapping[str, Any] = tool.parameters.get("properties", {})
    return found


def check_arguments(tool: Tool, arguments: Any) -> dict[str, Any]:
    """The arguments of a call, if they are an object of what the tool takes. Raises MalformedError."""
    known = properties(tool)
    if not isinstance(arguments, dict):
        raise MalformedError(f"{tool.name} takes a JSON object with {', '.join(known) or 'no keys'}")
    for key, value in arguments.items():
        if key not in known:
            has = ", ".join(known) or "none"
            raise MalformedError(f"{tool.name} has no parameter {key[:MAX_SHOWN]}; it has {has}")
        expected = known[key].get("type")
        if isinstance(expected, str) and expected in _TYPES and not _TYPES[expected](value):
            raise MalformedError(f"{tool.name}: {key} must be of type {expected}")
    if missing := [key for key in tool.parameters.get("required", ()) if key not in arguments]:
        raise MalformedError(f"{tool.name} needs {', '.join(missing)}")
    return arguments


def bind(value: Any, tools: Sequence[Tool], *keys: str) -> ToolCall:
    """The call that a JSON value says: {"name": ..., KEY: {...}}, with one of `keys`. Raises MalformedError."""
    key = next((key for key in keys if isinstance(value, dict) and key in value), None)
    if key is None or not isinstance(value.get("name"), str):
        raise MalformedError(f'a call is a JSON object {{"name": TOOL, "{keys[0]}": {{...}}}}')
    tool = find_tool(value["name"], tools)
    return ToolCall(tool.name, check_arguments(tool, value[key]))


def tool_of(call: ToolCall, tools: Sequence[Tool]) -> Tool:
    """The tool of a call that is to be written. Raises ValueError where it is not one of these."""
    try:
        return find_tool(call.name, tools)
    except MalformedError as reason:
        raise ValueError(f"the call {call!r:.200} cannot be written: {reason}") from reason


def write_json(call: ToolCall, tools: Sequence[Tool], key: str, markup: Sequence[str]) -> str:
    """A call as JSON. What would be markup inside of a string is escaped, as JSON allows. Raises ValueError."""
    tool_of(call, tools)
    text = dump({"name": call.name, key: dict(call.arguments)})
    for token in markup:
        text = text.replace(token, f"\\u{ord(token[0]):04x}{token[1:]}")
    return text


def read_tagged(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """The calls in a text, each `<tool_call>{JSON}</tool_call>`, with anything around them. Raises MalformedError."""
    return [bind(value, tools, "arguments") for value in _take_tagged(text)[0]]


def prose_around_tagged(text: str) -> str:
    """The text without such calls. Raises MalformedError where they cannot be read."""
    return "".join(_take_tagged(text)[1]).strip()


def _take_tagged(text: str) -> tuple[list[Any], list[str]]:
    """The JSON values of the calls in a text, and what stands around them."""
    values, prose = [], []
    at = 0
    while (start := text.find(OPEN, at)) >= 0:
        if CLOSE in text[at:start]:
            raise MalformedError(f"a {CLOSE} without {OPEN}")
        try:
            value, end = load(text, start + len(OPEN))
        except ValueError:
            raise MalformedError(f"what follows {OPEN} is not JSON") from None
        end = _after_space(text, end)
        if not text.startswith(CLOSE, end):
            raise MalformedError(f"the JSON object of a call must be followed by {CLOSE}")
        values.append(value)
        prose.append(text[at:start])
        at = end + len(CLOSE)
    if CLOSE in text[at:]:
        raise MalformedError(f"a {CLOSE} without {OPEN}")
    return values, [*prose, text[at:]]


def write_tagged(call: ToolCall, tools: Sequence[Tool], markup: Sequence[str]) -> str:
    """A call as `read_tagged` reads it, in the layout that models learn. Raises ValueError for an unknown tool."""
    return f"{OPEN}\n{write_json(call, tools, 'arguments', markup)}\n{CLOSE}"


def quote_json(name: str, key: str, arguments: str) -> str:
    """A call as JSON would say it, its arguments word for word; what they say may be no JSON."""
    return f'{{"name": {dump(name)}, "{key}": {arguments}}}'


def begin_json(name: str | None, key: str) -> str:
    """How a call as JSON begins, for this tool or for any."""
    return '{"name":' if name is None else f'{{"name": {dump(name)}, "{key}":'


def quote_tagged(name: str, arguments: str) -> str:
    """A call as `write_tagged` lays it out, word for word."""
    return f"{OPEN}\n{quote_json(name, 'arguments', arguments)}\n{CLOSE}"


def begin_tagged(name: str | None) -> str:
    """How a call in tags begins."""
    return OPEN if name is None else f"{OPEN}\n{begin_json(name, 'arguments')}"
