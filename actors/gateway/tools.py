"""A request's tools and tool choice, which both dialects have, as the policy's. Knows nothing of HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from actors.gateway.conversation import ToolChoice
from actors.gateway.errors import ApiError, bad_value, not_honoured
from actors.gateway.fields import Fields
from envs.interface import Tool

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_ONLY_FUNCTIONS = "the program runs its own tools; offer them as tools of type function"


def read_tool(function: Fields) -> Tool:
    """A tool from the object with its name, description and parameters."""
    name = function.string("name")
    if not _NAME.fullmatch(name):
        raise function.wrong("name", "letters, digits, `_`, `-` and `.`, not beginning with a digit")
    description = function.string("description", "")
    parameters = function.raw("parameters") or {"type": "object", "properties": {}}
    function.raw("strict")  # a call that does not fit its schema is never returned as one
    function.finish()
    return Tool(name, description, _schema(parameters, function.path("parameters")))


def _schema(schema: Any, path: str) -> Mapping[str, Any]:
    """The schema, sure to have what a chat format looks at, and otherwise as it came: the policy is told it."""
    properties = schema.get("properties", {}) if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or not all(isinstance(each, dict) for each in properties.values()):
        raise bad_value(path, schema, "a JSON schema of type object")
    required = schema.get("required") or []
    if not isinstance(required, list) or not all(isinstance(n, str) and n in properties for n in required):
        raise bad_value(f"{path}.required", required, "a list of the parameters' names")
    told = {name: each for name, each in schema.items() if each is not None}
    return told | {"type": "object", "properties": properties}


def check_kind(tool: Fields) -> None:
    """Raise ApiError for a tool that the endpoint would have to run itself."""
    if (kind := tool.raw("type")) != "function":
        raise not_honoured(tool.path("type"), kind, _ONLY_FUNCTIONS)


def check_names(tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """The tools; raises ApiError where two have one name."""
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise bad_value("tools", name, "unique: two tools have this name")
    return tuple(tools)


def read_choice(fields: Fields, tools: Sequence[Tool], *, nested: bool) -> ToolChoice:
    """`tool_choice`. nested: the name of a function stands in an object of its own (chat completions)."""
    value = fields.raw("tool_choice")
    if value is None or value == "auto":
        return ToolChoice()
    path = fields.path("tool_choice")
    if isinstance(value, str):
        if value not in ("none", "required"):
            raise fields.wrong("tool_choice", "none, auto, required, or an object that names a function")
        choice = ToolChoice("none" if value == "none" else "required")
    else:
        choice = ToolChoice("required", _named(Fields(value, path), path, nested))
    known = [tool.name for tool in tools]
    if choice.mode == "required" and not tools:
        raise ApiError(400, f"{path} asks for a call, but there are no tools; give tools", param=path)
    if choice.name is not None and choice.name not in known:
        raise bad_value(path, choice.name, f"one of the tools: {', '.join(known)}")
    return choice


def _named(chosen: Fields, path: str, nested: bool) -> str:
    if (kind := chosen.raw("type")) != "function":
        raise not_honoured(f"{path}.type", kind, "choose none, auto, required or a function")
    holder = chosen.nested("function") if nested else chosen
    if holder is None:
        raise bad_value(f"{path}.function", None, "an object with the name of a function")
    name = holder.string("name")
    holder.finish()
    chosen.finish()
    return name
