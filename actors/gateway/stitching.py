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
    """One reply and what came before it, after its parent's turn.

    context: ids between the parent's turn and the sampled ones; the last `num_forced` of them begin the turn. closing:
    what ends the turn where the sample does not, before anything can follow. heir: the reply that goes on in this
    one's segment.
    """

    parent: Node | None
    context: list[int]
    num_forced: int
    sample: Sample
    closing: list[int]
    call_ids: tuple[str, ...]
    heir: Node | None = None

    @property
    def turn(self) -> list[int]:
        """All ids of the assistant's turn."""
        forced = self.context[len(self.context) - self.num_forced :]
        return [*forced, *self.sample.token_ids_N.tolist(), *self.closing]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What the engine is given: `ids`. The last of them, from `start`, come after the parent's turn."""

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
    _by_end: dict[bytes, Node] = field(default_factory=dict)  # hash of all ids up to the end of a turn -> its node
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
            turn = self._turn(message, tools, hasher)
            hasher.update(_bytes(turn))
            ids += [*context, *turn]
            pending = []
            if (node := self._by_end.get(hasher.digest())) is not None:
                parent, start = node, len(ids)
        forced = self.renderer.turn(opening)[:-1] if opening else []
        ids += [*self._context(not ids, pending), *forced]
        return Prompt(ids, parent, start, len(forced))

    def record(self, prompt: Prompt, sample: Sample, message: ChatMessage) -> None:
        """Keep what was sampled after a prompt, and the message that it is in the program's eyes."""
        ended = sample.token_ids_N.size > 0 and int(sample.token_ids_N[-1]) in self.renderer.stop_token_ids
        node = Node(
            prompt.parent,
            prompt.ids[prompt.start :],
            prompt.num_forced,
            sample,
            [] if ended else self.renderer.turn(""),
            tuple(call.id for call in message.calls),
        )
        if prompt.parent is not None and prompt.parent.heir is None:
            prompt.parent.heir = node
        else:
            self._heads.append(node)
        self._by_reply.setdefault(message.key, []).append(node)
        hasher = hashlib.blake2b(_bytes(prompt.ids), digest_size=16)
        hasher.update(_bytes([*sample.token_ids_N.tolist(), *node.closing]))
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

    def _turn(self, message: ChatMessage, tools: Sequence[Tool], before: hashlib.blake2b) -> list[int]:
        """The ids of an assistant message: those sampled for it, else those of its text."""
        found = self._by_reply.get(message.key)
        if not found:
            return self.renderer.turn(self.write(message, tools).content)
        # Several replies may say the same in other tokens. The one that was given after these very tokens is meant,
        # and of those the one whose calls have the ids.
        call_ids = tuple(call.id for call in message.calls)
        candidates = sorted(found, key=lambda node: node.call_ids != call_ids)
        for node in candidates:
            hasher = before.copy()
            hasher.update(_bytes(node.turn))
            if self._by_end.get(hasher.digest()) is node:
                return node.turn
        return candidates[0].turn


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
        ids = [*node.context, *node.sample.token_ids_N.tolist(), *node.closing]
        pieces.insert(0, _Piece.context(ids))
        node = node.parent
    runs: list[VersionRun] = []
    node = head
    while node is not None:
        pieces += [_Piece.context(node.context), _Piece.sampled(node.sample)]
        for run in node.sample.version_runs:
            if runs and runs[-1][:2] == run[:2]:
                run = run._replace(num_tokens=run.num_tokens + runs.pop().num_tokens)
            runs.append(run)
        if node.heir is not None:  # else nothing follows that the turn must be closed for
            pieces.append(_Piece.context(node.closing))
        node = node.heir
    ids_T, mask_T, logprobs_T = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return Segment(ids_T, mask_T, logprobs_T, tuple(runs))
