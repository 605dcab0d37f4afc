"""The layout that many formats share.

    <|im_start|>ROLE                for every message
    CONTENT<|im_end|>

Owns the layout alone; what the policy is told of tools and how calls are written, its subclasses say. No system prompt
is added where the task brings none, but for the tools.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from actors.formats.base import MARK, Control, Format, Piece, marked
from envs.interface import Message, Tool

START, END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


class ChatMl(Format):
    """The layout; its subclasses say what they tell of tools and how calls are written."""

    required = (START, END)
    heading = re.compile(f"{marked(START)}(?P<role>[^\n{MARK}]*)\n?")

    def open(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Piece]:
        """See Format."""
        if not (told := self.tell(tools)):
            return [*self.messages(messages), *self.header("assistant")]
        system, rest = take_system(messages)
        before = [f"{system}\n\n"] if system is not None else []
        opening = [*self.header("system"), *before, *told, Control(END), "\n"]
        return [*opening, *self.messages(rest), *self.header("assistant")]

    def observe(self, messages: Sequence[Message]) -> list[Piece]:
        """See Format."""
        return ["\n", *self.messages(messages), *self.header("assistant")]

    def tell(self, tools: Sequence[Tool]) -> list[Piece]:
        """What the system message says of the tools, at its end; nothing where the policy is not told of them."""
        return []

    def messages(self, messages: Sequence[Message]) -> list[Piece]:
        """Complete messages, in order."""
        pieces: list[Piece] = []
        for message in messages:
            content = self.voice(message.content) if message.role == "assistant" else [message.content]
            pieces += [*self.header(message.role), *content, Control(END), "\n"]
        return pieces

    def header(self, role: str) -> list[Piece]:
        """What a message begins with."""
        return [Control(START), f"{role}\n"]


def take_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """The content of the system message that a conversation begins with, if it does, and the rest."""
    if messages and messages[0].role == "system":
        return messages[0].content, messages[1:]
    return None, messages
