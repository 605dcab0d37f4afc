"""What a program's calls are made of, whatever the dialect: messages, function calls, what is asked, what is replied.

Plain facts and their canonical forms. Knows no tokens and no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from actors.engine import Sample
from envs.interface import Role, Tool

FinishReason = Literal["stop", "length", "tool_calls"]


class FunctionCall(NamedTuple):
    """A tool call as it stands in a message. `arguments`: JSON text, or whatever the program has made of it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a call's conversation; only the assistant's have calls."""

    role: Role
    content: str
    calls: tuple[FunctionCall, ...] = ()

    @property
    def key(self) -> ReplyKey:
        """What an assistant message says, however its JSON is written."""
        return self.content, tuple((call.name, canonical(call.arguments)) for call in self.calls)


ReplyKey = tuple[str, tuple[tuple[str, str], ...]]


def canonical(arguments: str) -> str:
    """Equal for JSON objects that are equal; text that is no JSON is itself."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return arguments


class ToolChoice(NamedTuple):
    """May the reply call tools, must it, and which one. `name` only where it must be that one."""

    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None


AUTO = ToolChoice()


@dataclass(frozen=True, slots=True)
class Question:
    """One call of a program: what the policy is asked, and how many replies it shall give.

    max_tokens: of one reply, None for as many as the run allows. stop: texts before which a reply ends. requested:
    sampling parameters by name, as the program gave them; the run's own are what is sampled with.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = AUTO
    num_replies: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    requested: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """One reply: the message as the program gets it, and what was sampled for it."""

    message: ChatMessage
    finish: FinishReason
    sample: Sample


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """All replies to one question. num_prompt_tokens: of the prompt that the engine was given for each of them.

    overridden: parameters that were asked for and are the run's to decide.
    """

    replies: tuple[Reply, ...]
    num_prompt_tokens: int
    overridden: tuple[str, ...] = ()

    @property
    def num_sampled(self) -> int:
        """Tokens of all replies."""
        return sum(reply.sample.token_ids_N.size for reply in self.replies)
