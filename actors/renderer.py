"""Messages <-> tokens, append-only, in the chat format of the model (`actors/formats/`).

A conversation's tokens only ever grow: opening, sampled turn, observation, sampled turn, ... What was sampled is never
tokenised again, and supervised episodes are cut into the same pieces, so that training sees the very token boundaries
that sampling produces. Where a model's own template would rewrite what was said (Qwen3 drops earlier thinking), what
was said stays. Only the format writes special and added tokens, and it takes them from the tokenizer by name: text
inside messages can never become one. Never samples, never calls a tool.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from actors.formats.base import Control, Format, Piece
from actors.formats.choice import Speaker, check_tokens, choose_format, read_speaker
from actors.formats.tagged import Tagged
from broker.process.lifecycle import ErgonError
from broker.protocol.trajectory import Segment, VersionRun
from envs.interface import Action, Message, Tool

REFERENCE_VERSION = (0, 0)
_PROBE = " a\n\nb \n"


class Renderer:
    """Stateless; one per process. Token ids are lists of int throughout."""

    def __init__(self, tokenizer: Tokenizer, name: str = "the tokenizer", chat_format: Format | None = None) -> None:
        """chat_format: `tagged` where none is given. Raises ErgonError where the tokenizer cannot write it."""
        self.chat_format = chat_format or Tagged()
        self._tokenizer = tokenizer
        self._added = _added_tokens(tokenizer)
        self._added_names = {token_id: name for name, token_id in self._added.items()}
        check_tokens(self.chat_format, Speaker(name, frozenset(self._added)))
        self._literal = _literal(tokenizer)
        self._check_text(name)
        stop = [tokenizer.token_to_id(token) for token in self.chat_format.stop]
        self.stop_token_ids: tuple[int, ...] = tuple(token_id for token_id in stop if token_id is not None)
        """The tokens that end a turn; the first is the one that written turns end with."""

    @classmethod
    def load(cls, model: Path, tool_format: str = Tagged.name) -> Renderer:
        """The renderer of a Hugging Face model directory. tool_format: `model.tool_format`.

        Raises ErgonError where its tokenizer cannot be used, or not for that format.
        """
        path = model / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ErgonError(
                f"model.path = {model}: {path.name} cannot be read ({error}); name a complete model"
            ) from error
        speaker = read_speaker(model, frozenset(_added_tokens(tokenizer)), _begin(tokenizer))
        return cls(tokenizer, speaker.name, choose_format(tool_format, speaker))

    def open(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Tokens before the first turn: the messages, the tools where the format tells of them, the turn's header."""
        return self._tokens(self.chat_format.open(messages, tools))

    def observe(self, messages: Sequence[Message]) -> list[int]:
        """Tokens between a properly ended turn and the next one: line end, the messages, the header of the turn."""
        return self._tokens(self.chat_format.observe(messages))

    def turn(self, text: str) -> list[int]:
        """Tokens of a turn that was written, not sampled (reference episodes): its text and the token that ends it."""
        return self._tokens(self.chat_format.turn(text))

    def voice(self, text: str) -> list[int]:
        """Tokens of something the policy is made to say within a turn: `turn` without the end."""
        return self._tokens(self.chat_format.voice(text))

    def inside(self, text: str) -> list[int]:
        """Tokens of a text inside of a turn."""
        return self._encode(text)

    def tag(self, text: str) -> list[int]:
        """Tokens of a tag inside of a turn: one where the tokenizer has it as a token of its own, control or not."""
        added = self._tokenizer.get_added_tokens_decoder()
        token_id = next((number for number, token in added.items() if token.content == text), None)
        return [int(token_id)] if token_id is not None else self._encode(text)

    def text(self, sampled_ids: Sequence[int]) -> str:
        """The content of a sampled turn, without the token that ended it."""
        ids = list(sampled_ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return self.decode(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The exact text of these tokens, special ones included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text: nothing where it is only the beginning of a character, which the next one
        completes; together they are the text."""
        stream = DecodeStream(skip_special_tokens=False)
        pieces = [stream.step(self._tokenizer, token_id) or "" for token_id in ids]
        rest = self.decode(ids)[sum(map(len, pieces)) :]  # a character that was never completed
        return [*pieces[:-1], pieces[-1] + rest] if pieces else []

    def control(self, token_id: int) -> str:
        """The name of a special or added token, which text never becomes; empty for the others."""
        return self._added_names.get(token_id, "")

    def parse(self, text: str, tools: Sequence[Tool]) -> Action:
        """The action that a turn's text says, its calls checked against the tools."""
        return self.chat_format.parse(text, tools)

    def write(self, action: Action, tools: Sequence[Tool]) -> str:
        """The text that `parse` reads as this action. Raises ValueError for calls that no text says."""
        return self.chat_format.write(action, tools)

    def render_reference(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Segment:
        """A whole conversation for supervised use: the loss mask is True on assistant contents and what ends them.

        Ends after the last assistant message: what follows it, the policy never sees. Token for token what a rollout
        with the same texts produces. Raises ValueError without an assistant message.
        """
        ids: list[int] = []
        mask: list[bool] = []
        pending: list[Message] = []
        for message in messages:
            if message.role != "assistant":
                pending.append(message)
                continue
            context = self.observe(pending) if ids else self.open(pending, tools)
            turn = self.turn(message.content)
            ids += context + turn
            mask += [False] * len(context) + [True] * len(turn)
            pending = []
        if not ids:
            raise ValueError("a reference conversation needs an assistant message")
        return Segment(
            np.asarray(ids, np.int32),
            np.asarray(mask, np.bool_),
            np.zeros(len(ids), np.float32),
            (VersionRun(*REFERENCE_VERSION, sum(mask)),),
        )

    def _tokens(self, pieces: Sequence[Piece]) -> list[int]:
        """The ids of pieces. Text between two tokens is encoded as one, as it would be in a template's whole text."""
        known = [
            piece.token if isinstance(piece, Control) and piece.token not in self._added else piece for piece in pieces
        ]
        ids: list[int] = []
        for of_text, group in groupby(known, key=lambda piece: isinstance(piece, str)):
            if of_text:
                ids += self._encode("".join(piece for piece in group if isinstance(piece, str)))
            else:
                ids += [self._added[piece.token] for piece in group if isinstance(piece, Control)]
        return ids

    def _encode(self, text: str) -> list[int]:
        return list(self._literal.encode(text, add_special_tokens=False).ids)

    def _check_text(self, name: str) -> None:
        """Text must come back as it went in, and not as a token of another meaning."""
        if (back := self.decode(self._encode(_PROBE))) != _PROBE:
            raise ErgonError(
                f"{name} turns the text {_PROBE!r} into {back!r}; text can only be appended exactly with a tokenizer "
                "that keeps it as it is: choose a model with a byte-level one"
            )
        for token, token_id in self._added.items():
            if token.strip() and token_id in self._encode(token):
                raise ErgonError(f"{name} reads {token} in plain text as its token; choose another model")


def _added_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Names and ids of what was added to the vocabulary: special tokens, and others with a meaning of their own."""
    return {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer to which names of added tokens are characters. Runs of spaces, which some models add, are text."""
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] or bool(token["content"].strip())
    literal = Tokenizer.from_str(json.dumps(state))
    literal.encode_special_tokens = True
    return literal


def _begin(tokenizer: Tokenizer) -> list[str]:
    """The tokens that the tokenizer puts before a text."""
    with_specials, without = (tokenizer.encode("a", add_special_tokens=specials).tokens for specials in (True, False))
    return list(with_specials[: with_specials.index(without[0])]) if without else []
