"""Calls -> segments: pure bookkeeping of token ids for one episode. Never samples, never waits, knows no HTTP.

A call brings its whole conversation. It is rendered with the very ids of the turn for every assistant message in it
that came from here, where it stands after the very tokens that the turn was sampled after; what was sampled is never
tokenised again. Where the prompt made so begins with all tokens of a former call, it goes on where that one ended; else
it begins anew. So calls grow into a tree of token ids, and its branches are the segments: the first continuation of a
call stays in its segment, every other one begins a segment of its own, in which what it shares with another is context.
Each sampled token is masked as sampled in one segment only.

A turn that does not stand where it was sampled is told anew, as the chat format tells turns later, some without what
they had thought. What a recorded prompt has told once stays as it was told in what goes on from it, also where the
format would leave a thought out by now: appending wins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from actors.formats.calls import dump, tool_json
from actors.gateway.conversation import ChatMessage, ReplyKey, Utterance
from broker.protocol.trajectory import Segment, VersionRun
from envs.interface import Message, Tool


class Rendering(Protocol):
    """What is needed of actors.renderer's Renderer."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a turn."""
        ...

    def open(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """Tokens before the first turn."""
        ...

    def observe(self, messages: Sequence[Message]) -> list[int]:
        """Tokens between an ended turn and the next one."""
        ...

    def turn(self, text: str) -> list[int]:
        """Tokens of a turn that was written, its end included."""
        ...

    def text(self, sampled_ids: Sequence[int]) -> str:
        """The text of a turn, without the token that ended it."""
        ...


class Writing(Protocol):
    """What is needed of chat_format's Interpreter."""

    def written(self, message: ChatMessage, tools: Sequence[Tool]) -> Message:
        """A message as text, its thought and its calls written out."""
        ...

    def recalled(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[Message]:
        """A conversation as text, as it is told anew."""
        ...

    def thinks(self, text: str) -> bool:
        """Whether a turn's text begins with a thought, be it an empty one."""
        ...


@dataclass(eq=False, slots=True)
class Node:
    """One reply and what came before it, after its parent's turn.

    context: ids between the parent's turn and this one. said: the turn's text without its thought. ended: its last id
    ends the turn. heir: the reply that goes on in this one's segment.
    """

    parent: Node | None
    context: list[int]
    turn: Utterance
    thought: str
    said: str
    ended: bool
    call_ids: tuple[str, ...]
    heir: Node | None = None

    @property
    def ids(self) -> list[int]:
        """The ids of the turn."""
        return self.turn.ids_N.tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What the engine is given: `ids`. The last of them, from `start`, come after the parent's turn. ends: hashes of
    the ids up to the end of each turn in it."""

    ids: list[int]
    parent: Node | None
    start: int
    ends: tuple[bytes, ...] = ()


@dataclass(slots=True)
class Stitcher:
    """The record of one episode's calls."""

    renderer: Rendering
    writing: Writing
    _heads: list[Node] = field(default_factory=list)  # the first reply of each segment, in the order of recording
    _by_reply: dict[ReplyKey, list[Node]] = field(default_factory=dict)
    _by_end: dict[bytes, Node] = field(default_factory=dict)  # hash of all ids up to the end of its turn -> its node
    _ends: set[bytes] = field(default_factory=set)  # of the turns in recorded prompts
    _cut: list[Node] = field(default_factory=list)  # whose turn was not ended
    _pieces: dict[tuple[str | None, tuple[Message, ...]], list[int]] = field(default_factory=dict)

    @property
    def num_segments(self) -> int:
        """Segments so far."""
        return len(self._heads)

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool], shown: Sequence[Tool]) -> Prompt:
        """The prompt of a call. tools: those of the call. shown: those that the format tells the policy of."""
        ids: list[int] = []
        hasher = hashlib.blake2b(digest_size=16)
        parent: Node | None = None
        start = 0
        ends: list[bytes] = []
        pending: list[Message] = []
        for message, recalled in zip(messages, self.writing.recalled(messages, tools), strict=True):
            if message.role != "assistant":
                pending.append(recalled)
                continue
            context = self._context(not ids, pending, shown)
            hasher.update(_bytes(context))
            turn, closing = self._turn(message, recalled, tools, hasher)
            hasher.update(_bytes(turn))
            ids += [*context, *turn]
            pending = []
            if (node := self._by_end.get(hasher.digest())) is not None:
                parent, start = node, len(ids)
            hasher.update(_bytes(closing))
            ids += closing
            ends.append(hasher.digest())
        ids += self._context(not ids, pending, shown)
        return Prompt(ids, parent, start, tuple(ends))

    def record(self, prompt: Prompt, turn: Utterance, message: ChatMessage, said: str) -> None:
        """Keep a turn that was sampled after a prompt, and the message that it is in the program's eyes.

        said: the whole text of the turn without its thought. Some programs put the stop text back that their reply was
        cut before, or keep calls as text; an assistant message with all that was said is that turn as well.
        """
        ids = turn.ids_N.tolist()
        node = Node(
            prompt.parent,
            prompt.ids[prompt.start :],
            turn,
            message.thought,
            said,
            bool(ids) and ids[-1] in self.renderer.stop_token_ids,
            tuple(call.id for call in message.calls),
        )
        if prompt.parent is not None and prompt.parent.heir is None:
            prompt.parent.heir = node
        else:
            self._heads.append(node)
        for key in {message.key, (message.thought, said, ())}:
            self._by_reply.setdefault(key, []).append(node)
        if not node.ended:
            self._cut.append(node)
        hasher = hashlib.blake2b(_bytes(prompt.ids), digest_size=16)
        hasher.update(_bytes(ids))
        self._by_end.setdefault(hasher.digest(), node)
        self._ends.update(prompt.ends)

    def segments(self) -> tuple[Segment, ...]:
        """The branches, each with the mask True on what was sampled in it; empty where nothing was recorded."""
        return tuple(_segment(head) for head in self._heads)

    def _context(self, first: bool, messages: Sequence[Message], shown: Sequence[Tool]) -> list[int]:
        """Rendered once for an episode: a conversation comes back whole with every call."""
        key = (dump([tool_json(tool) for tool in shown]) if first else None, tuple(messages))
        if key not in self._pieces:
            self._pieces[key] = self.renderer.open(messages, shown) if first else self.renderer.observe(messages)
        return self._pieces[key]

    def _turn(
        self, message: ChatMessage, recalled: Message, tools: Sequence[Tool], before: hashlib.blake2b
    ) -> tuple[list[int], list[int]]:
        """The ids of an assistant message, and those that close its turn where it was not ended.

        They are those of the turn where it was sampled after these very tokens, else as it is told anew.
        """
        found = self._by_reply.get(message.key, ())
        if (node := self._given_here(message, found, before)) is not None:
            return node.ids, self._closing(node)
        if not message.calls:
            # Where a turn was cut, some programs add words of their own to it.
            begun = [
                node
                for node in self._cut
                if node.said and node.thought == message.thought and message.content.startswith(node.said)
            ]
            if (cut := self._given_here(message, begun, before)) is not None:
                return cut.ids, self.renderer.turn(message.content.removeprefix(cut.said))
        # The words are the policy's own, and so are their ids, be it after other tokens.
        if found:
            text, whole = self.renderer.text(found[0].ids), (found[0].ids, self._closing(found[0]))
        else:
            text = self.writing.written(message, tools).content
            whole = self.renderer.turn(text), []
        anew = self.renderer.turn(recalled.content), list[int]()
        if self.writing.thinks(text) == self.writing.thinks(recalled.content):
            return whole if found else anew
        return next((way for way in (anew, whole) if self._is_told(before, *way)), anew)

    def _closing(self, node: Node) -> list[int]:
        return [] if node.ended else self.renderer.turn("")

    def _is_told(self, before: hashlib.blake2b, turn: Sequence[int], closing: Sequence[int]) -> bool:
        """Whether a recorded prompt has this turn after these very tokens."""
        hasher = before.copy()
        hasher.update(_bytes([*turn, *closing]))
        return hasher.digest() in self._ends

    def _given_here(self, message: ChatMessage, found: Sequence[Node], before: hashlib.blake2b) -> Node | None:
        """The one of these that was given after these very tokens: the one whose calls have the ids, and the longest.

        Several replies may say the same in other tokens.
        """
        call_ids = tuple(call.id for call in message.calls)
        for node in sorted(found, key=lambda node: (node.call_ids != call_ids, -len(node.said))):
            hasher = before.copy()
            hasher.update(_bytes(node.ids))
            if self._by_end.get(hasher.digest()) is node:
                return node
        return None


def _bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


class _Piece(NamedTuple):
    """Part of a segment: T ids, and which of them are trained here."""

    ids_T: npt.NDArray[np.int32]
    mask_T: npt.NDArray[np.bool_]
    logprobs_T: npt.NDArray[np.float32]

    @classmethod
    def context(cls, ids: Sequence[int]) -> _Piece:
        """Ids that are not to be trained here."""
        return cls(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.float32))


def _segment(head: Node) -> Segment:
    pieces: list[_Piece] = []
    node = head.parent
    while node is not None:  # from the end backwards
        pieces.insert(0, _Piece.context([*node.context, *node.ids]))
        node = node.parent
    runs: list[VersionRun] = []
    node = head
    while node is not None:
        pieces += [_Piece.context(node.context), _Piece(node.turn.ids_N, node.turn.mask_N, node.turn.logprobs_N)]
        for run in node.turn.version_runs:
            if runs and runs[-1][:2] == run[:2]:
                run = run._replace(num_tokens=run.num_tokens + runs.pop().num_tokens)
            runs.append(run)
        node = node.heir
    ids_T, mask_T, logprobs_T = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return Segment(ids_T, mask_T, logprobs_T, tuple(runs))
