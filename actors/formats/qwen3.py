"""`qwen3`: ChatML, tools as JSON lines in `<tools>`, calls in `<tool_call>`, results in `<tool_response>`, `<think>`.

The model's template renders a conversation whole, and drops the thinking of every turn before the last question. So
does an opening here; but what was sampled stays as it was sampled until a new segment begins. The template of Qwen2.5,
and of models that call tools as it does, differs by a system prompt of its own: bring it in the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from actors.formats.base import END_THINK, THINK, Control, Piece
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
from actors.formats.chatml import END, END_OF_TEXT, START, ChatMl
from envs.interface import Message, Tool, ToolCall

RESPONSE, END_RESPONSE = "<tool_response>", "</tool_response>"


class Qwen3(ChatMl):
    """The format of Qwen3, and of Qwen2.5 with a system message."""

    name = "qwen3"
    call = TAGGED
    stop = (END, END_OF_TEXT)
    markup = (THINK, END_THINK, OPEN, CLOSE)

    def tell(self, tools: Sequence[Tool]) -> list[Piece]:
        """See ChatMl."""
        if not tools:
            return []
        lines = "".join(f"\n{dump(tool_json(tool))}" for tool in tools)
        return [
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{lines}\n</tools>\n\n"
            "For each function call, return a json object with function name and arguments within ",
            *self.voice(f"{OPEN}{CLOSE} XML tags:\n{OPEN}\n"),
            *self.voice(f'{{"name": <function-name>, "arguments": <args-json-object>}}\n{CLOSE}'),
        ]

    def messages(self, messages: Sequence[Message]) -> list[Piece]:
        """See ChatMl: what tools answered, one after the other, is one message of the user."""
        pieces: list[Piece] = []
        for of_tools, group in groupby(self.recall(messages), key=lambda message: message.role == "tool"):
            if of_tools:
                responses = [piece for message in group for piece in _response(message.content)]
                pieces += [Control(START), "user", *responses, Control(END), "\n"]
            else:
                pieces += super().messages(list(group))
        return pieces

    def recall(self, messages: Sequence[Message]) -> list[Message]:
        """See Format: what was thought before the last question is left out, and the last turn has a thought."""
        asked = max((n for n, m in enumerate(messages) if m.role == "user"), default=len(messages) - 1)
        return [
            Message("assistant", _as_history(message.content, number, asked, len(messages)))
            if message.role == "assistant"
            else message
            for number, message in enumerate(messages)
        ]

    def role(self, heading: str, content: str) -> str:
        """See Format."""
        return "tool" if content.startswith(RESPONSE) else super().role(heading, content)

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


def _response(content: str) -> list[Piece]:
    return ["\n", Control(RESPONSE), f"\n{content}\n", Control(END_RESPONSE)]


def _as_history(text: str, number: int, asked: int, num_messages: int) -> str:
    """A turn as the template shows it later: thinking stays after the last question only; the last turn has some."""
    head, end, said = text.rpartition(END_THINK)
    thinking = head.partition(END_THINK)[0].rstrip("\n").split(THINK)[-1].strip("\n") if end else ""
    said = said.lstrip("\n") if end else said
    if number <= asked or not (thinking or number == num_messages - 1):
        return said
    return f"{THINK}\n{thinking}\n{END_THINK}\n\n{said.lstrip(chr(10))}"
