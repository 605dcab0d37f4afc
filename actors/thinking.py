"""What thinking looks like: how budgets are told, where thinking stands in a turn, and what the actor writes to end it.

    <think>        opened by the policy, or by the context
    tokens         sampled while thinking is open: these count against the budget, the closing tag's included
    </think>       closed by the policy, or by the actor after the stop phrase
    the answer     everything outside of the tags

Owns texts and token positions; pure. Never samples and keeps no account (sampler.py does).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from broker.process.thinking_settings import Budget, ThinkingSection
from envs.interface import Message

GAP = "\n\n"  # between the closing tag and the answer
_HEADER_TOKENS = 16  # of the context's end: where a header that opens thinking must show


class Tokens(Protocol):
    """What is needed of a renderer."""

    def inside(self, text: str) -> list[int]:
        """Tokens of a text inside of a turn."""
        ...

    def tag(self, text: str) -> list[int]:
        """Tokens of a tag, one where it is a token of its own."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The exact text of these tokens."""
        ...


Telling = Callable[[Budget, str], str]
"""(budget, per) -> what is added to the first user message; empty for nothing. `per`: `turn` or `episode`."""


def sentence(budget: Budget, per: str) -> str:
    """The budget in plain words, the same for every chat format; nothing where it is unlimited."""
    if budget is None:
        return ""
    if budget == 0:
        return "Answer without thinking."
    return f"Think for at most {budget} token{'s' * (budget != 1)} {'in each turn' if per == 'turn' else 'in all'}."


def qwen3(budget: Budget, per: str) -> str:
    """Qwen3's soft switch, and the sentence where there is a number to tell."""
    return "/no_think" if budget == 0 else f"{sentence(budget, per)} /think".strip()


TELLINGS: Mapping[str, Telling] = {"sentence": sentence, "qwen3": qwen3, "none": lambda _budget, _per: ""}
"""`thinking.tell` -> how. A chat format with a switch of its own adds an entry here."""


class Thought(NamedTuple):
    """Where thinking stands in a turn: positions of its tokens, in order, and whether it is open at the end."""

    positions: list[int]
    is_open: bool


class Split(NamedTuple):
    """A turn's text without its tags: what was thought, what was answered, and whether thinking is open at its end."""

    thought: str
    answer: str
    is_open: bool


class Thinking:
    """The tags of a run in a model's tokens. Stateless; token ids are lists of int throughout."""

    def __init__(self, settings: ThinkingSection, tokens: Tokens) -> None:
        self.settings = settings
        self._tokens = tokens
        self._open, self._close = settings.tags
        open_ids, gap_ids = tokens.tag(self._open), tokens.inside(GAP)
        self._close_ids = [*tokens.tag(self._close), *gap_ids]
        self.num_open_tokens = len(open_ids)
        self.open_ids = [*open_ids, *tokens.inside("\n")]
        self.stop_ids = [*tokens.inside(settings.stop_phrase), *self._close_ids]
        self._empty_ids = [*open_ids, *gap_ids, *self._close_ids]
        self.open_token_ids = tuple(open_ids) if len(open_ids) == 1 else ()
        """The token at which an engine can stop because thinking begins; none where the tag is several tokens."""

    def telling(self, budget: Budget) -> str:
        """What the policy is told of its budget; nothing where there is nothing to tell."""
        return TELLINGS[self.settings.tell](budget, self.settings.per)

    def told(self, messages: Sequence[Message], budget: Budget) -> tuple[Message, ...]:
        """The opening of a conversation with the budget told: at the end of its first user message, or in a new one."""
        text = self.telling(budget)
        if not text:
            return tuple(messages)
        at = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if at is None:
            return (*messages, Message("user", text))
        telling = Message("user", f"{messages[at].content}\n{text}")
        return (*messages[:at], telling, *messages[at + 1 :])

    def opened_by(self, context: Sequence[int]) -> bool:
        """Whether the header of the turn, with which the context ends, opens thinking."""
        return self._header(context).endswith(self._open)

    def closed_by(self, context: Sequence[int]) -> bool:
        """Whether it opens and closes thinking, as some chat formats do to switch it off."""
        return self._header(context).endswith(self._close)

    def closing(self, is_open: bool) -> list[int]:
        """What ends thinking before it begins, after a header that opens it or one that does not."""
        return [*self._tokens.inside(GAP), *self._close_ids] if is_open else self._empty_ids

    def find(self, ids: Sequence[int], is_open: bool) -> Thought:
        """Where thinking stands in these tokens of a turn. `is_open`: whether it is open before the first of them.

        A token belongs to it where thinking was open before it: the opening tag's do not, the closing tag's do.
        """
        text, positions = self._tokens.decode(ids), list[int]()
        at = first = 0
        while True:
            tag = self._close if is_open else self._open
            found = text.find(tag, at)
            last = len(ids) if found < 0 else self._complete(ids, first, found, tag)
            if is_open:
                positions += range(first, last)
            if found < 0:
                return Thought(positions, is_open)
            at, first, is_open = found + len(tag), last, not is_open

    def answer(self, text: str, is_open: bool) -> str:
        """What of a turn's text is outside of thinking; the text itself where there is none."""
        return self.split(text, is_open).answer

    def split(self, text: str, is_open: bool) -> Split:
        """A turn's text as what was thought and what was answered. `is_open`: whether thinking is open before it."""
        parts: dict[bool, list[str]] = {True: [], False: []}
        at, was_open = 0, is_open
        while True:
            tag = self._close if is_open else self._open
            found = text.find(tag, at)
            parts[is_open].append(text[at:] if found < 0 else text[at:found])
            if found < 0:
                break
            at, is_open = found + len(tag), not is_open
        if not parts[True] and not was_open:
            return Split("", text, False)
        thoughts = [thought.strip("\n") for thought in parts[True]]
        return Split("\n".join(filter(None, thoughts)), "".join(parts[False]).strip(), is_open)

    def join(self, thought: str, answer: str) -> str:
        """A turn's text of what was thought, if anything was, and what was answered; `split` takes it apart."""
        return f"{self._open}\n{thought}\n{self._close}{GAP}{answer}" if thought else answer

    def begins(self, text: str) -> bool:
        """Whether a turn's text begins with a thought."""
        return text.lstrip().startswith(self._open)

    def pieces(self, text: str) -> list[str]:
        """A written turn, cut where closing may cut it: at tags, and after the gap behind a closing one."""
        opening, closing = re.escape(self._open), re.escape(self._close)
        return [part for part in re.split(rf"({opening}|{closing}|(?<={closing})\s+)", text) if part]

    def _header(self, context: Sequence[int]) -> str:
        return self._tokens.decode(context[-_HEADER_TOKENS:]).rstrip()

    def _complete(self, ids: Sequence[int], first: int, found: int, tag: str) -> int:
        """How many of the tokens there are when the tag, which begins at character `found`, is complete."""

        def has_tag(count: int) -> bool:
            return self._tokens.decode(ids[:count])[found : found + len(tag)] == tag

        return bisect_left(range(len(ids)), True, lo=first, key=has_tag)
