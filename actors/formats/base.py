"""What a chat format is: how messages, tools and turns are written, what ends a turn, and how a turn is read.

A format writes pieces, text and named tokens, so that nothing a message says is ever taken for a token. It knows no
tokenizer and no token ids (`actors/renderer.py` does), and samples, runs and sends nothing. Stateless.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from actors.formats.calls import MalformedError
from envs.interface import Action, Message, Tool, ToolCall

THINK, END_THINK = "<think>", "</think>"
MARK = "\x01"


@dataclass(frozen=True, slots=True)
class Control:
    """A token by its name. Where the tokenizer has none of that name, its characters, unless the format requires it."""

    token: str


Piece: TypeAlias = str | Control


class Format(ABC):
    """One chat format. What it writes only ever grows: opening, turn, observation, turn, observation, ...

    required: tokens without which a tokenizer cannot be used. stop: tokens that end a turn, as far as the tokenizer has
    them; the first ends the written ones. markup: tokens that the policy may write inside of a turn. They are tokens in
    what it wrote and in what is written for it, and characters in everybody else's messages.
    """

    name: ClassVar[str]
    heading: ClassVar[re.Pattern[str]]
    """What a message begins with, its role as the group of that name, in a text whose own tokens are `marked`. This
    and the next two are for people who look at an episode (actors/transcript.py)."""
    call: ClassVar[re.Pattern[str]]
    """A call in a turn's text, well-formed or not."""
    required: tuple[str, ...] = ()
    stop: tuple[str, ...]
    markup: tuple[str, ...] = (THINK, END_THINK)

    @abstractmethod
    def open(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Piece]:
        """Everything before the first turn: the messages, the tools where the format has a place for them, and the
        header of the policy's turn."""

    @abstractmethod
    def observe(self, messages: Sequence[Message]) -> list[Piece]:
        """Everything between the token that ended a turn and the first one of the next."""

    def turn(self, text: str) -> list[Piece]:
        """A turn that was written, not sampled: its text and the token that ends it."""
        return [*self.voice(text), Control(self.stop[0])]

    def voice(self, text: str) -> list[Piece]:
        """Text of the policy: its markup becomes tokens, nothing else does."""
        if not self.markup:
            return [text]
        parts = re.split("(" + "|".join(map(re.escape, self.markup)) + ")", text)
        return [Control(part) if number % 2 else part for number, part in enumerate(parts) if part]

    def parse(self, text: str, tools: Sequence[Tool]) -> Action:
        """The action in a turn's text. One bad call makes the whole turn malformed: none of its calls must run."""
        thinking, said = split_thinking(text)
        if thinking is None:
            return Action("", malformed=f"the thinking was not ended with {END_THINK}", thinking=said)
        try:
            return Action(said, tuple(self.read_calls(said, tools)), thinking=thinking)
        except MalformedError as reason:
            return Action(said, malformed=str(reason), thinking=thinking)

    def write(self, action: Action, tools: Sequence[Tool]) -> str:
        """The text of the turn that `parse` reads back as this action: its thinking, its text, and its calls where the
        text does not hold them already. Raises ValueError for calls that no text says."""
        said = action.text
        if action.tool_calls and not _same(self.parse(said, tools), action):
            said = self.join(said, [self.write_call(call, tools) for call in action.tool_calls])
            if not _same(read := self.parse(said, tools), action):
                raise ValueError(f"the calls {action.tool_calls!r:.200} cannot be written as text: {read.malformed}")
        return f"{THINK}\n{action.thinking}\n{END_THINK}\n\n{said}" if action.thinking else said

    @abstractmethod
    def read_calls(self, text: str, tools: Sequence[Tool]) -> list[ToolCall]:
        """The calls in a turn's text without its thinking, in order. Raises MalformedError."""

    @abstractmethod
    def write_call(self, call: ToolCall, tools: Sequence[Tool]) -> str:
        """One call. Raises ValueError where its tool is not one of these."""

    @abstractmethod
    def quote_call(self, name: str, arguments: str) -> str:
        """A call that no policy made, of a tool that may not exist, with its arguments word for word."""

    @abstractmethod
    def begin_call(self, name: str | None) -> str:
        """What a turn begins with that must call this tool, or any; the policy goes on from there."""

    @abstractmethod
    def prose(self, text: str) -> str:
        """What a turn's text says beside its calls, which must be readable; no spaces at its ends."""

    def join(self, text: str, calls: Sequence[str]) -> str:
        """A turn's text and its written calls."""
        return "\n".join([text, *calls] if text else calls)

    def recall(self, messages: Sequence[Message]) -> list[Message]:
        """A conversation that is told anew, its turns as the model's template shows them later; `open` does it itself.

        Some templates leave out what a turn had thought. Recalling twice is recalling once.
        """
        return list(messages)

    def role(self, heading: str, content: str) -> str:
        """Whose a message is, by the role in its heading and what it says."""
        return heading.strip().lower()

    def describe(self, tools: Sequence[Tool]) -> str:
        """The tools in words, for a system message, where `open` tells nothing of them; else nothing."""
        return ""


def marked(token: str) -> str:
    """The regular expression of a token that the format wrote, told apart from the same characters by its first one."""
    return re.escape(MARK + token[1:])


def split_thinking(text: str) -> tuple[str | None, str]:
    """The thinking that a turn begins with, without its tags, and the rest; (None, thinking) where it has no end.

    Line ends at the borders of both belong to neither. Where the prompt opened the thinking, hand its tag in with the
    text: a closing tag alone may as well be part of an answer.
    """
    if not text.lstrip().startswith(THINK):
        return "", text
    head, end, tail = text.partition(END_THINK)
    thinking = head.partition(THINK)[2].strip("\n")
    return (thinking, tail.lstrip("\n")) if end else (None, thinking)


def _same(read: Action, action: Action) -> bool:
    calls = [[(call.name, dict(call.arguments)) for call in each.tool_calls] for each in (read, action)]
    return read.malformed is None and calls[0] == calls[1]
