"""`tagged`: ChatML whose calls are `<tool>NAME TEXT</tool>`, any number of them, prose around them.

TEXT binds verbatim to the single string parameter of a tool that has exactly one parameter; for any other tool it is a
JSON object. The policy is told of no tools: it learns them from a warm start, or the task's prompt says what there is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from actors.formats.calls import MalformedError, check_arguments, find_tool, load, properties, tool_of
from actors.formats.chatml import END, ChatMl
from envs.interface import Tool, ToolCall

TAG, END_TAG = "<tool>", "</tool>"
_TAGS = re.compile(r"</?tool>")
_WHOLE_CALL = re.compile(f"{TAG}.*?{END_TAG}", re.DOTALL)
_CALL = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.-]*)(?:\s(.*))?", re.DOTALL)


class Tagged(ChatMl):
    """ChatML whose calls are `<tool>NAME TEXT</tool>`."""

    name = "tagged"
    call = _WHOLE_CALL
    stop = (END,)

    def read_calls(self, text: str, tools: Sequence[Tool]) -> list[ToolCall]:
        """See Format."""
        return [_bind(body, tools) for body in _bodies(text)]

    def write_call(self, call: ToolCall, tools: Sequence[Tool]) -> str:
        """See Format."""
        tool, arguments = tool_of(call, tools), dict(call.arguments)
        if not properties(tool) and not arguments:
            return f"{TAG}{call.name}{END_TAG}"
        parameter = _single_text(tool)
        body = arguments[parameter] if parameter and list(arguments) == [parameter] else json.dumps(arguments)
        return f"{TAG}{call.name} {body}{END_TAG}"

    def quote_call(self, name: str, arguments: str) -> str:
        """See Format."""
        return f"{TAG}{name} {arguments}{END_TAG}"

    def begin_call(self, name: str | None) -> str:
        """See Format."""
        return TAG + (name or "")

    def prose(self, text: str) -> str:
        """See Format."""
        return _WHOLE_CALL.sub("", text).strip()

    def join(self, text: str, calls: Sequence[str]) -> str:
        """See Format."""
        return "".join([text, *calls])

    def describe(self, tools: Sequence[Tool]) -> str:
        """See Format: how each tool is called, and what its description says."""
        return "\n".join(["Tools:", *(_described(tool) for tool in tools)]) if tools else ""


def _described(tool: Tool) -> str:
    known = properties(tool)
    if (single := _single_text(tool)) is not None:
        example = f"{TAG}{tool.name} {single.upper()}{END_TAG}"
    elif known:
        example = f"{TAG}{tool.name} {json.dumps(dict(tool.parameters))}{END_TAG}"
    else:
        example = f"{TAG}{tool.name}{END_TAG}"
    return f"{example} {' '.join(tool.description.split())}".rstrip()


def _bodies(text: str) -> list[str]:
    bodies = []
    start: int | None = None
    for tag in _TAGS.finditer(text):
        if tag.group() == TAG:
            if start is not None:
                raise MalformedError(f"a {TAG} inside of another one")
            start = tag.end()
        elif start is None:
            raise MalformedError(f"a {END_TAG} without {TAG}")
        else:
            bodies.append(text[start : tag.start()])
            start = None
    if start is not None:
        raise MalformedError(f"a {TAG} without {END_TAG}")
    return bodies


def _bind(body: str, tools: Sequence[Tool]) -> ToolCall:
    match = _CALL.fullmatch(body)
    if match is None:
        raise MalformedError(f"a call is written {TAG}NAME TEXT{END_TAG}")
    name, text = match.group(1), match.group(2) or ""
    tool = find_tool(name, tools)
    if (parameter := _single_text(tool)) is not None:
        return ToolCall(name, {parameter: text})
    if not properties(tool) and not text.strip():
        return ToolCall(name, {})
    try:
        value, end = load(text, 0)
    except ValueError:
        value, end = None, len(text)
    return ToolCall(name, check_arguments(tool, None if text[end:].strip() else value))


def _single_text(tool: Tool) -> str | None:
    """The name of the only parameter, where it is a string."""
    if len(properties(tool)) != 1:
        return None
    ((name, schema),) = properties(tool).items()
    return name if schema.get("type") == "string" else None
