"""How tool calls are written in the text of a turn: `<tool>NAME TEXT</tool>`, any number of them, prose around them.

TEXT binds verbatim to the single string parameter of a tool that has exactly one parameter; for any other tool it is a
JSON object. A turn without a call is a final answer. Pure text in, Action out; knows no tokens and runs no tool.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from envs.interface import Action, Tool, ToolCall

OPEN, CLOSE = "<tool>", "</tool>"
_TAG = re.compile(r"</?tool>")
_NAME = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.-]*)(?:\s(.*))?", re.DOTALL)

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


class _MalformedError(Exception):
    """The reason is told to the policy."""


def parse_action(text: str, tools: Sequence[Tool]) -> Action:
    """The action in a turn's text. One bad call makes the whole turn malformed: none of its calls must run."""
    try:
        by_name = {tool.name: tool for tool in tools}
        return Action(text, tuple(_bind(body, by_name) for body in _bodies(text)))
    except _MalformedError as reason:
        return Action(text, malformed=str(reason))


def format_call(call: ToolCall, tools: Sequence[Tool]) -> str:
    """The text that `parse_action` reads back as this call. Raises ValueError where no text can."""
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        raise ValueError(f"tool {call.name!r} is not one of {[tool.name for tool in tools]}")
    arguments = dict(call.arguments)
    parameter = _single_text(tool)
    if not _properties(tool) and not arguments:
        text = f"{OPEN}{call.name}{CLOSE}"
    else:
        body = arguments[parameter] if parameter and list(arguments) == [parameter] else json.dumps(arguments)
        text = f"{OPEN}{call.name} {body}{CLOSE}"
    parsed = parse_action(text, tools)
    if parsed.malformed or [(c.name, dict(c.arguments)) for c in parsed.tool_calls] != [(call.name, arguments)]:
        raise ValueError(f"the call {call.name} {arguments!r:.200} cannot be written as text: {parsed.malformed}")
    return text


def format_action(action: Action, tools: Sequence[Tool]) -> str:
    """The turn's text: the action's own, or its calls written out where it brings calls without a text."""
    return action.text or "".join(format_call(call, tools) for call in action.tool_calls)


def _bodies(text: str) -> list[str]:
    bodies = []
    start: int | None = None
    for tag in _TAG.finditer(text):
        if tag.group() == OPEN:
            if start is not None:
                raise _MalformedError(f"a {OPEN} inside of another one")
            start = tag.end()
        elif start is None:
            raise _MalformedError(f"a {CLOSE} without {OPEN}")
        else:
            bodies.append(text[start : tag.start()])
            start = None
    if start is not None:
        raise _MalformedError(f"a {OPEN} without {CLOSE}")
    return bodies


def _bind(body: str, tools: Mapping[str, Tool]) -> ToolCall:
    match = _NAME.fullmatch(body)
    if match is None:
        raise _MalformedError(f"a call is written {OPEN}NAME TEXT{CLOSE}")
    name, text = match.group(1), match.group(2) or ""
    if name not in tools:
        raise _MalformedError(f"unknown tool {name[:40]}; the tools are: {', '.join(tools) or 'none'}")
    tool = tools[name]
    if (parameter := _single_text(tool)) is not None:
        return ToolCall(name, {parameter: text})
    if not _properties(tool) and not text.strip():
        return ToolCall(name, {})
    return ToolCall(name, _json_arguments(tool, text))


def _json_arguments(tool: Tool, text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    properties = _properties(tool)
    if not isinstance(arguments, dict):
        raise _MalformedError(f"{tool.name} takes a JSON object with {', '.join(properties) or 'no keys'}")
    for key, value in arguments.items():
        if key not in properties:
            raise _MalformedError(f"{tool.name} has no parameter {key[:40]}; it has {', '.join(properties) or 'none'}")
        expected = properties[key].get("type")
        if expected in _TYPES and not _TYPES[expected](value):
            raise _MalformedError(f"{tool.name}: {key} must be of type {expected}")
    if missing := [key for key in tool.parameters.get("required", ()) if key not in arguments]:
        raise _MalformedError(f"{tool.name} needs {', '.join(missing)}")
    return arguments


def _properties(tool: Tool) -> Mapping[str, Any]:
    properties: Mapping[str, Any] = tool.parameters.get("properties", {})
    return properties


def _single_text(tool: Tool) -> str | None:
    """The name of the only parameter, where it is a string."""
    properties = _properties(tool)
    if len(properties) != 1:
        return None
    ((name, schema),) = properties.items()
    return name if schema.get("type") == "string" else None
