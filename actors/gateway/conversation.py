"""What a program's calls are made of, whatever the dialect: messages, function calls, what is asked, what is replied.

Plain facts and their canonical forms. Decides nothing, and knows no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from actors.engine import FinishReason as EngineFinish
from broker.protocol.trajectory import VersionRun
from envs.interface import Role, Tool

FinishReason = Literal["stop", "length", "tool_calls"]


class FunctionCall(NamedTuple):
    """A tool call as it stands in a message. `arguments`: JSON text, or whatever the program has made of it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a call's conversation; only the assistant's have calls, and a thought before its content."""

    role: Role
    content: str
    calls: tuple[FunctionCall, ...] = ()
    thought: str = ""

    @property
    def key(self) -> ReplyKey:
        """What an assistant message says, however its JSON is written."""
        return self.thought, self.content, tuple((call.name, canonical(call.arguments)) for call in self.calls)


ReplyKey = tuple[str, str, tuple[tuple[str, str], ...]]


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

    max_tokens: of one reply, its thought included; None for as many as the run allows. stop: texts before which a
    reply ends. requested: sampling parameters by name, as the program gave them; the run's own are what is sampled
    with. effort: how much it shall think (see allowance.py), None for as much as the run lets it.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = AUTO
    num_replies: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    requested: Mapping[str, float] | None = None
    effort: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Utterance:
    """A turn as it stands in the record: N token ids, mask_N True where the policy sampled them, and log-probs there.

    The others are the actor's: the first `num_lead`, with which the turn begins, and what ended its thinking.
    began_open: whether thinking was open after the lead. version_runs add up to the sampled ones. num_forced_stops: how
    often the actor ended the thinking.
    """

    ids_N: npt.NDArray[np.int32]
    mask_N: npt.NDArray[np.bool_]
    logprobs_N: npt.NDArray[np.float32]
    version_runs: tuple[VersionRun, ...]
    finish: EngineFinish
    num_lead: int = 0
    began_open: bool = False
    num_forced_stops: int = 0

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return int(self.mask_N.sum())

    def sampled(self) -> Iterator[tuple[int, float]]:
        """Id and log-prob of each of them."""
        return zip(self.ids_N[self.mask_N].tolist(), self.logprobs_N[self.mask_N].tolist(), strict=True)

    def first(self, num_tokens: int) -> Utterance:
        """The first tokens of it, as if the turn had been told to stop there."""
        mask_N = self.mask_N[:num_tokens]
        runs, left = list[VersionRun](), int(mask_N.sum())
        for run in self.version_runs:
            if left > 0:
                runs.append(run._replace(num_tokens=min(left, run.num_tokens)))
            left -= run.num_tokens
        kept = self.ids_N[:num_tokens], mask_N, self.logprobs_N[:num_tokens]
        return replace(self, ids_N=kept[0], mask_N=kept[1], logprobs_N=kept[2], version_runs=tuple(runs), finish="stop")


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """One reply: the message as the program gets it, and the turn that it was made of. num_thinking: of its tokens."""

    message: ChatMessage
    finish: FinishReason
    turn: Utterance
    num_thinking: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """All replies to one question. num_prompt_tokens: of the prompt that the engine was given for each of them, with
    what the actor began their turns with.

    overridden: parameters that were asked for and are the run's to decide.
    """

    replies: tuple[Reply, ...]
    num_prompt_tokens: int
    overridden: tuple[str, ...] = ()

    @property
    def num_sampled(self) -> int:
        """Tokens of all replies."""
        return sum(reply.turn.num_sampled for reply in self.replies)

    @property
    def num_thinking(self) -> int:
        """Those of them that were sampled while thinking."""
        return sum(reply.num_thinking for reply in self.replies)
