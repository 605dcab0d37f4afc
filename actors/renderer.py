"""Messages <-> tokens, append-only, in ChatML built from the tokenizer's own special tokens.

    <|im_start|>ROLE\nCONTENT<|im_end|>\n   for every message, no system prompt unless the task brings one

A conversation's tokens only ever grow: opening, sampled turn, observation, sampled turn, ... What was sampled is never
tokenised again, and supervised episodes are cut into the same pieces, so that training sees the very token boundaries
that sampling produces. Text inside messages can never become a special token. Never samples, never calls a tool.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from broker.process.lifecycle import ErgonError
from broker.protocol.trajectory import Segment, VersionRun
from envs.interface import Message

START, END = "<|im_start|>", "<|im_end|>"
REFERENCE_VERSION = (0, 0)


class Renderer:
    """Stateless; one per process. Token ids are lists of int throughout."""

    def __init__(self, tokenizer: Tokenizer, name: str = "the tokenizer") -> None:
        """`tokenizer` must know <|im_start|> and <|im_end|>; raises ErgonError otherwise. It is changed: see below."""
        self._tokenizer = tokenizer
        self._start_id, self._end_id = (self._special(token, name) for token in (START, END))
        # A task or a tool that writes <|im_end|> gets its characters, not the control token.
        tokenizer.encode_special_tokens = True
        self._newline = self._encode("\n")

    @classmethod
    def load(cls, model: Path) -> Renderer:
        """The renderer of a Hugging Face model directory. Raises ErgonError where its tokenizer cannot be used."""
        path = model / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ErgonError(
                f"model.path = {model}: {path.name} cannot be read ({error}); name a complete model"
            ) from error
        return cls(tokenizer, f"the tokenizer of model.path = {model}")

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a turn."""
        return (self._end_id,)

    def open(self, messages: Sequence[Message]) -> list[int]:
        """Tokens before the first turn: the messages and the header of the policy's turn."""
        return self._messages(messages) + self._header("assistant")

    def observe(self, messages: Sequence[Message]) -> list[int]:
        """Tokens between a properly ended turn and the next one: line end, the messages, the header of the turn."""
        return self._newline + self.open(messages)

    def turn(self, text: str) -> list[int]:
        """Tokens of a turn that was written, not sampled (reference episodes): content and <|im_end|>."""
        return [*self._encode(text), self._end_id]

    def inside(self, text: str) -> list[int]:
        """Tokens of a text inside of a turn."""
        return self._encode(text)

    def tag(self, text: str) -> list[int]:
        """Tokens of a tag inside of a turn: one where the tokenizer has it as a token, control token or not."""
        added = self._tokenizer.get_added_tokens_decoder()
        token_id = next((number for number, token in added.items() if token.content == text), None)
        return [int(token_id)] if token_id is not None else self._encode(text)

    def text(self, sampled_ids: Sequence[int]) -> str:
        """The content of a sampled turn, without the token that ended it."""
        ids = list(sampled_ids)
        if ids and ids[-1] == self._end_id:
            ids.pop()
        return self.decode(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The exact text of these tokens, special ones included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def render_reference(self, messages: Sequence[Message]) -> Segment:
        """A whole conversation for supervised use: the loss mask is True on assistant contents and their <|im_end|>.

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
            context, turn = (self.observe if ids else self.open)(pending), self.turn(message.content)
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

    def _messages(self, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = []
        for message in messages:
            # Header and content are one piece here: nobody samples these, and so the template's text tokenises alike.
            ids += [self._start_id, *self._encode(f"{message.role}\n{message.content}"), self._end_id, *self._newline]
        return ids

    def _header(self, role: str) -> list[int]:
        return [self._start_id, *self._encode(f"{role}\n")]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _special(self, token: str, name: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ErgonError(f"{name} has no token {token}; ChatML needs it: choose a model that was trained on ChatML")
        return int(token_id)
