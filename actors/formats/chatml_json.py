"""`chatml_json`: ChatML whose calls are JSON in `<tool_call>`, for models whose own template knows no tools (SmolLM2).

The format brings a description of the tools of its own, at the end of the system message.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.formats.base import END_THINK, THINK, Piece
from actors.formats.calls import (
    CLOSE,
    OPEN,
    TAGGED,
    begin_tagged,
    dump,
    prose_around_tagged,
    quote_tagged,
    read_tagged,
    tool_json,
    write_tagged,
)
from actors.formats.chatml import END, END_OF_TEXT, ChatMl
from envs.interface import Tool, ToolCall


class ChatMlJson(ChatMl):
    """ChatML whose calls are JSON in `<tool_call>`, for models whose own template knows no tools."""

    name = "chatml_json"
    call = TAGGED
    stop = (END, END_OF_TEXT)
    markup = (THINK, END_THINK, OPEN, CLOSE)

    def tell(self, tools: Sequence[Tool]) -> list[Piece]:
        """See ChatMl."""
        if not tools:
            return []
        tools_told, calls_told = describe_tools(tools)
        return [tools_told, *self.voice(calls_told)]

    def read_calls(self, text: str, tools: Sequence[Tool]) -> list[ToolCall]:
        """See Format."""
        return read_tagged(text, tools)

    def write_call(self, call: ToolCall, tools: Sequence[Tool]) -> str:
        """See Format."""
        return write_tagged(call, tools, self.markup)

    def quote_call(self, name: str, arguments: str) -> str:
        """See Format."""
        return quote_tagged(name, arguments)

    def begin_call(self, name: str | None) -> str:
        """See Format."""
        return begin_tagged(name)

    def prose(self, text: str) -> str:
        """See Format."""
        return prose_around_tagged(text)


def describe_tools(tools: Sequence[Tool]) -> tuple[str, str]:
    """What a policy is told that must be told everything: the tools, and then how a call is written."""
    lines = "\n".join(dump(tool_json(tool)) for tool in tools)
    tools_told = "You can call tools. Each of these lines describes one, with the JSON schema of its arguments:\n"
    calls_told = (
        "A call is written like this:\n"
        f'{OPEN}\n{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}\n{CLOSE}\n'
        "Several calls may follow each other; they are answered in order. A turn without a call is the final answer."
    )
    return f"{tools_told}{lines}\n", calls_told
