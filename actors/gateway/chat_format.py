"""Between a program's messages and the texts that the policy reads and writes: tool lists, tool calls, turns.

The thin adapter to the renderer's tool format; the only module of the gateway that knows how a call is written. Knows
no HTTP and keeps nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from actors.formats.tagged import END_TAG as CLOSE
from actors.formats.tagged import TAG as OPEN
from actors.formats.tagged import Tagged
from actors.gateway.conversation import ChatMessage
from envs.interface import Action, Message, Tool, ToolCall

FORMAT = Tagged()
"""The chat format whose calls this module writes and reads; programs are not run in another."""

_CALL = re.compile(f"{OPEN}.*?{CLOSE}", re.DOTALL)


class Spoken(NamedTuple):
    """A turn's text taken apart: the prose, the calls in it, and why they could not be parsed, if so."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    malformed: str | None = None


def told(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> tuple[ChatMessage, ...]:
    """The conversation with the tools told in its system message, or in one put before it."""
    if not tools:
        return tuple(messages)
    telling = "\n".join(["Tools:", *(_told(tool) for tool in tools)])
    if messages and messages[0].role == "system":
        return (ChatMessage("system", f"{messages[0].content}\n\n{telling}"), *messages[1:])
    return (ChatMessage("system", telling), *messages)


def _told(tool: Tool) -> str:
    """How the tool is called, and what its description says."""
    properties = tool.parameters.get("properties") or {}
    single = next(iter(properties)) if len(properties) == 1 else None
    if single is not None and properties[single].get("type") == "string":
        example = f"{OPEN}{tool.name} {single.upper()}{CLOSE}"
    else:
        example = (
            f"{OPEN}{tool.name} {json.dumps(tool.parameters)}{CLOSE}" if properties else f"{OPEN}{tool.name}{CLOSE}"
        )
    return f"{example} {' '.join(tool.description.split())}".rstrip()


def parse(text: str, tools: Sequence[Tool]) -> Spoken:
    """A turn's text as prose and calls. One bad call makes all of it prose: none of its calls must run."""
    action = FORMAT.parse(text, tools)
    if action.malformed is not None or not action.tool_calls:
        return Spoken(text, malformed=action.malformed)
    return Spoken(_CALL.sub("", text).strip(), action.tool_calls)


def written(message: ChatMessage, tools: Sequence[Tool]) -> Message:
    """A message as text. An assistant's calls that the program made up are written as the policy would write them."""
    if not message.calls:
        return Message(message.role, message.content)
    return Message(
        message.role, message.content + "".join(_call(name, arguments, tools) for _, name, arguments in message.calls)
    )


def _call(name: str, arguments: str, tools: Sequence[Tool]) -> str:
    try:
        parsed = json.loads(arguments)
        if isinstance(parsed, dict):
            return FORMAT.write(Action("", (ToolCall(name, parsed),)), tools)
    except (ValueError, RecursionError):
        pass
    # A call that the policy could not have made, of a tool that is gone perhaps: it is context and is told verbatim.
    return f"{OPEN}{name} {arguments}{CLOSE}"


def call_opening(name: str | None) -> str:
    """The text that a turn begins with which must call a tool: this one, or any."""
    return OPEN + (name or "")
