"""Calls -> segments: pure bookkeeping of token ids for one episode. Never samples, never waits, knows no HTTP.

A call brings its whole conversation. It is rendered with the very ids that were sampled for every assistant message in
it that came from here; what was sampled is never tokenised again. Where the prompt made so begins with all tokens of a
former call, it goes on where that one ended; else it begins anew. So calls grow into a tree of token ids, and its
branches are the segments: the first continuation of a call stays in its segment, every other one begins a segment of
its own, in which what it shares with another is context. Each sampled token is masked as sampled in one segment only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from actors.engine import Sample
from actors.gateway.conversation import ChatMessage, ReplyKey
from broker.protocol.trajectory import Segment, VersionRun
from envs.interface import Message, Tool


class Rendering(Protocol):
    """What is needed of actors.renderer's Renderer."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a turn."""
        ...

    def open(self, messages: Sequence[Message]) -> list[int]:
        """Tokens before the first turn."""
        ...

    def observe(self, messages: Sequence[Message]) -> list[int]:
        """Tokens between an ended turn and the next one."""
        ...

    def turn(self, text: str) -> list[int]:
        """Tokens of a turn that was written, its end included."""
        ...


class Writing(Protocol):
    """chat_format.written: a message as text."""

    def __call__(self, message: ChatMessage, tools: Sequence[Tool]) -> Message:
        """The message with its calls written out."""
        ...


@dataclass(eq=False, slots=True)
class Node:
    """One reply and what came before it, after its parent's sampled ids.

    context: ids between the parent's sampled ones and its own; the last `num_forced` of them begin the turn. said: the
    turn's text. ended: the last sampled id ends the turn. heir: the reply that goes on in this one's segment.
    """

    parent: Node | None
    context: list[int]
    num_forced: int
    sample: Sample
    said: str
    ended: bool
    call_ids: tuple[str, ...]
    heir: Node | None = None

    @property
    def turn(self) -> list[int]:
        """The ids of the assistant's turn as far as they were forced and sampled."""
        return [*self.context[len(self.context) - self.num_forced :], *self.sample.token_ids_N.tolist()]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What the engine is given: `ids`. The last of them, from `start`, come after the parent's sampled ones."""

    ids: list[int]
    parent: Node | None
    start: int
    num_forced: int


@dataclass(slots=True)
class Stitcher:
    """The record of one episode's calls."""

    renderer: Rendering
    write: Writing
    _heads: list[Node] = field(default_factory=list)  # the first reply of each segment, in the order of recording
    _by_reply: dict[ReplyKey, list[Node]] = field(default_factory=dict)
    _by_end: dict[bytes, Node] = field(default_factory=dict)  # hash of all ids up to the last sampled one -> its node
    _cut: list[Node] = field(default_factory=list)  # whose turn was not ended
    _pieces: dict[tuple[bool, tuple[Message, ...]], list[int]] = field(default_factory=dict)

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool], opening: str = "") -> Prompt:
        """The prompt of a call whose reply must begin with `opening`."""
        ids: list[int] = []
        hasher = hashlib.blake2b(digest_size=16)
        parent: Node | None = None
        start = 0
        pending: list[Message] = []
        for message in messages:
            if message.role != "assistant":
                pending.append(self.write(message, tools))
                continue
            context = self._context(not ids, pending)
            hasher.update(_bytes(context))
            turn, closing = self._turn(message, tools, hasher)
            hasher.update(_bytes(turn))
            ids += [*context, *turn]
            pending = []
            if (node := self._by_end.get(hasher.digest())) is not None:
                parent, start = node, len(ids)
            hasher.update(_bytes(closing))
            ids += closing
        forced = self.renderer.turn(opening)[:-1] if opening else []
        ids += [*self._context(not ids, pending), *forced]
        return Prompt(ids, parent, start, len(forced))

    def record(self, prompt: Prompt, sample: Sample, message: ChatMessage, said: str) -> None:
        """Keep what was sampled after a prompt, and the message that it is in the program's eyes.

        said: the whole text of the turn. Some programs put the stop text back that their reply was cut before, or
        keep calls as text; an assistant message with all that was said is that turn as well.
        """
        node = Node(
            prompt.parent,
            prompt.ids[prompt.start :],
            prompt.num_forced,
            sample,
            said,
            sample.token_ids_N.size > 0 and int(sample.token_ids_N[-1]) in self.renderer.stop_token_ids,
            tuple(call.id for call in message.calls),
        )
        if prompt.parent is not None and prompt.parent.heir is None:
            prompt.parent.heir = node
        else:
            self._heads.append(node)
        for key in {message.key, (said, ())}:
            self._by_reply.setdefault(key, []).append(node)
        if not node.ended:
            self._cut.append(node)
        hasher = hashlib.blake2b(_bytes(prompt.ids), digest_size=16)
        hasher.update(_bytes(sample.token_ids_N.tolist()))
        self._by_end.setdefault(hasher.digest(), node)

    def segments(self) -> tuple[Segment, ...]:
        """The branches, each with the mask True on what was sampled in it; empty where nothing was recorded."""
        return tuple(_segment(head) for head in self._heads)

    def _context(self, first: bool, messages: Sequence[Message]) -> list[int]:
        """Rendered once for an episode: a conversation comes back whole with every call."""
        key = (first, tuple(messages))
        if key not in self._pieces:
            self._pieces[key] = (self.renderer.open if first else self.renderer.observe)(messages)
        return self._pieces[key]

    def _turn(
        self, message: ChatMessage, tools: Sequence[Tool], before: hashlib.blake2b
    ) -> tuple[list[int], list[int]]:
        """The ids of an assistant message, and those that close its turn where what was sampled does not.

        They are those sampled for it, where there are such, else those of its text.
        """
        if found := self._by_reply.get(message.key):
            # Said somewhere, be it after other tokens: the words are the policy's own, and so are their ids.
            node = self._given_here(message, found, before) or found[0]
            return node.turn, [] if node.ended else self.renderer.turn("")
        if not message.calls:
            # Where a turn was cut, some programs add words of their own to it.
            begun = [node for node in self._cut if node.said and message.content.startswith(node.said)]
            if (cut := self._given_here(message, begun, before)) is not None:
                return cut.turn, self.renderer.turn(message.content.removeprefix(cut.said))
        return self.renderer.turn(self.write(message, tools).content), []

    def _given_here(self, message: ChatMessage, found: Sequence[Node], before: hashlib.blake2b) -> Node | None:
        """The one of these that was given after these very tokens: the one whose calls have the ids, and the longest.

        Several replies may say the same in other tokens.
        """
        call_ids = tuple(call.id for call in message.calls)
        for node in sorted(found, key=lambda node: (node.call_ids != call_ids, -len(node.said))):
            hasher = before.copy()
            hasher.update(_bytes(node.turn))
            if self._by_end.get(hasher.digest()) is node:
                return node
        return None


def _bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


class _Piece(NamedTuple):
    """Part of a segment: T ids, all of them sampled or none."""

    ids_T: npt.NDArray[np.int32]
    mask_T: npt.NDArray[np.bool_]
    logprobs_T: npt.NDArray[np.float32]

    @classmethod
    def context(cls, ids: Sequence[int]) -> _Piece:
        """Ids that are not to be trained here."""
        return cls(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.float32))

    @classmethod
    def sampled(cls, sample: Sample) -> _Piece:
        """Ids that the policy sampled here."""
        return cls(sample.token_ids_N, np.ones(sample.token_ids_N.size, np.bool_), sample.logprobs_N)


def _segment(head: Node) -> Segment:
    pieces: list[_Piece] = []
    node = head.parent
    while node is not None:  # from the end backwards
        pieces.insert(0, _Piece.context([*node.context, *node.sample.token_ids_N.tolist()]))
        node = node.parent
    runs: list[VersionRun] = []
    node = head
    while node is not None:
        pieces += [_Piece.context(node.context), _Piece.sampled(node.sample)]
        for run in node.sample.version_runs:
            if runs and runs[-1][:2] == run[:2]:
                run = run._replace(num_tokens=run.num_tokens + runs.pop().num_tokens)
            runs.append(run)
        node = node.heir
    ids_T, mask_T, logprobs_T = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return Segment(ids_T, mask_T, logprobs_T, tuple(runs))
