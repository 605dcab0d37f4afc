"""`llama3`: Llama 3.1 and 3.2: header ids, tools as JSON in the first question, calls as JSON, results from `ipython`.

A turn is calls where it begins with `<|python_tag|>`, or with an object that has a "name": JSON objects one after the
other, `;` between them; the template knows turns of one call, and of nothing else beside it. Every other turn is an
answer. The date in the system message is the template's own, so that no run depends on the day it is made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from actors.formats.base import END_THINK, MARK, THINK, Control, Format, Piece, marked
from actors.formats.calls import (
    MalformedError,
    begin_json,
    bind,
    dump,
    load,
    quote_json,
    tool_json,
    write_json,
)
from actors.formats.chatml import take_system
from envs.interface import Message, Tool, ToolCall

BEGIN, HEADER, END_HEADER = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"
END_OF_TURN, END_OF_MESSAGE, END_OF_TEXT = "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"
PYTHON = "<|python_tag|>"
_SEPARATOR = re.compile(r"\s*;?\s*")

_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_FORM = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
_IN_QUESTION = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\n"
)
_IN_SYSTEM = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
)


class Llama3(Format):
    """The format of Llama 3.1 and 3.2."""

    name = "llama3"
    heading = re.compile(f"{marked(HEADER)}(?P<role>[^{MARK}]*){marked(END_HEADER)}(?:\n\n)?")
    call = re.compile(rf"\A\s*(?:{re.escape(PYTHON)}.*|\{{.*\"name\".*)\Z", re.DOTALL)
    required = (BEGIN, HEADER, END_HEADER, END_OF_TURN)
    stop = (END_OF_TURN, END_OF_MESSAGE, END_OF_TEXT)
    markup = (THINK, END_THINK, PYTHON)

    def open(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Piece]:
        """See Format. Without a question to put them in, the tools are in the system message, as the template can."""
        system, rest = take_system(messages)
        told = _FORM + "".join(f"{dump(tool_json(tool), indent=4)}\n\n" for tool in tools)
        asked = bool(rest) and rest[0].role == "user"
        content = "Environment: ipython\n" if tools else ""
        content += _DATES + (_IN_SYSTEM + told if tools and not asked else "") + (system or "").strip()
        pieces: list[Piece] = [Control(BEGIN), *_header("system"), content, Control(END_OF_TURN)]
        if tools and asked:
            question = _IN_QUESTION + told + rest[0].content.strip()
            pieces += [*_header("user"), question, Control(END_OF_TURN)]
            rest = rest[1:]
        return [*pieces, *self.observe(rest)]

    def observe(self, messages: Sequence[Message]) -> list[Piece]:
        """See Format."""
        pieces: list[Piece] = []
        for message in messages:
            role = "ipython" if message.role == "tool" else message.role
            pieces += [*_header(role), *self._content(message), Control(END_OF_TURN)]
        return [*pieces, *_header("assistant")]

    def _content(self, message: Message) -> list[Piece]:
        """A result is a JSON string; of everything else the template takes the spaces at its ends away."""
        if message.role == "tool":
            return [dump(message.content)]
        text = message.content.strip()
        return self.voice(text) if message.role == "assistant" else [text]

    def role(self, heading: str, content: str) -> str:
        """See Format."""
        return "tool" if heading == "ipython" else super().role(heading, content)

    def read_calls(self, text: str, tools: Sequence[Tool]) -> list[ToolCall]:
        """See Format."""
        said = text.strip()
        if said.startswith(PYTHON):
            said = said.removeprefix(PYTHON)
        elif not (said.startswith("{") and '"name"' in said):
            return []
        calls, at = [], 0
        while at < len(said):
            try:
                value, at = load(said, at)
            except ValueError:
                raise MalformedError(
                    "a turn that calls is JSON objects and nothing else, with ; between them"
                ) from None
            calls.append(bind(value, tools, "parameters", "arguments"))
            separator = _SEPARATOR.match(said, at)
            at = separator.end() if separator else at
        if not calls:
            raise MalformedError(f"{PYTHON} without a call")
        return calls

    def write_call(self, call: ToolCall, tools: Sequence[Tool]) -> str:
        """See Format."""
        return write_json(call, tools, "parameters", self.markup)

    def quote_call(self, name: str, arguments: str) -> str:
        """See Format."""
        return quote_json(name, "parameters", arguments)

    def begin_call(self, name: str | None) -> str:
        """See Format."""
        return begin_json(name, "parameters")

    def prose(self, text: str) -> str:
        """See Format. Nothing is said beside a call."""
        return ""

    def recall(self, messages: Sequence[Message]) -> list[Message]:
        """See Format: spaces at the ends of a turn are left out."""
        return [Message(m.role, m.content.strip()) if m.role == "assistant" else m for m in messages]

    def join(self, text: str, calls: Sequence[str]) -> str:
        """See Format. The calls alone: the template leaves out what was said beside them."""
        return "; ".join(calls)


def _header(role: str) -> list[Piece]:
    return [Control(HEADER), role, Control(END_HEADER), "\n\n"]
