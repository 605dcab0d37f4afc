"""`plain`: text with the roles as headings, for a base model without chat tokens. Calls are JSON in `<tool_call>`.

    User:             for every message, and an empty line after it; a turn ends with the model's end-of-text token
    CONTENT

Such a model must be shown the form by a warm start; one that does not write its end-of-text token goes on until its
turn has no more tokens. Roles are text here, so what a message says can look like another message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from actors.formats.base import MARK, Control, Format, Piece
from actors.formats.calls import TAGGED, begin_tagged, prose_around_tagged, quote_tagged, read_tagged, write_tagged
from actors.formats.chatml import take_system
from actors.formats.chatml_json import describe_tools
from envs.interface import Message, Tool, ToolCall


class Plain(Format):
    """Headings and an end-of-text token."""

    name = "plain"
    call = TAGGED
    heading = re.compile(rf"(?:\A(?:{MARK}[^>]*>)*|(?<=\n\n))(?P<role>System|User|Tool|Assistant):\n")

    def __init__(self, end: str, begin: Sequence[str] = ()) -> None:
        """end: the token that ends a turn. begin: what the model expects before everything else."""
        self.required = (end, *begin)
        self.stop = (end,)
        self._begin = [Control(token) for token in begin]

    def open(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Piece]:
        """See Format."""
        system, rest = take_system(messages)
        told = "".join(describe_tools(tools)) if tools else None
        heading = "\n\n".join(text for text in (system, told) if text is not None)
        before = [Message("system", heading)] if system is not None or tools else []
        return [*self._begin, *self._messages([*before, *rest])]

    def observe(self, messages: Sequence[Message]) -> list[Piece]:
        """See Format."""
        return ["\n\n", *self._messages(messages)]

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

    def _messages(self, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        for message in messages:
            end = self.turn(message.content) if message.role == "assistant" else [message.content]
            pieces += [f"{message.role.capitalize()}:\n", *end, "\n\n"]
        return [*pieces, "Assistant:\n"]
