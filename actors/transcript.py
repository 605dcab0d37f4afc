"""Episodes for people to read: tokens -> messages, in the chat format of the run. Its own process, asked over a pipe.

    python -m actors.transcript --config runs/NAME/config.toml

answers msgpack requests on its input, one after the other, on its output: `{"texts": [ids, ...]}` with the text of
each, `{"segments": [[ids, mask], ...]}` with what is said of each in `Reading`. ids: int32, mask: bool, both
little-endian bytes. `ergon report` and `ergon view` ask; they know no chat format. What a policy wrote is shown as it
wrote it: nothing here decides whether a call was well-formed. Never samples, and reads no file but the tokenizer's.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import msgpack
import numpy as np

from actors.formats.base import MARK
from actors.renderer import Renderer
from actors.thinking import Thinking
from broker.process.config import load_settings
from broker.process.lifecycle import run_main
from broker.process.settings import Settings

_HIDDEN = "\0"  # in the place of what cannot be a heading

Span = tuple[str, int, int]
"""What a stretch of a message is, its first character, and the one after its last. One of: text, thinking, tag (which
opens or closes thinking), call."""


@dataclass(frozen=True, slots=True)
class Said:
    """A message: whose it is, its tokens (its heading and its end among them), and its content as spans."""

    role: str
    first_token: int
    end_token: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """A segment: the text that each token adds, and the messages. Characters are counted in all pieces together."""

    pieces: tuple[str, ...]
    messages: tuple[Said, ...]


class Reader:
    """Reads segments in one run's chat format."""

    def __init__(self, renderer: Renderer, settings: Settings) -> None:
        self._renderer = renderer
        self._format = renderer.chat_format
        self._thinking = Thinking(settings.thinking, renderer)
        self._tags = settings.thinking.tags

    def text(self, ids: Sequence[int]) -> str:
        """The text of these tokens."""
        return self._renderer.decode(ids)

    def read(self, ids: Sequence[int], mask: Sequence[bool]) -> Reading:
        """A segment. `mask`: what the policy sampled, in which nothing begins a message."""
        pieces = self._renderer.pieces(ids)
        ends = list(itertools.accumulate(map(len, pieces)))
        skeleton = "".join(map(self._shown, ids, mask, pieces))
        headings = list(self._format.heading.finditer(skeleton))
        if not headings:
            return Reading(tuple(pieces), (Said("context", 0, len(ids), (("text", 0, len(skeleton)),)),))
        text, said = "".join(pieces), []
        firsts = [0, *(bisect.bisect_right(ends, heading.start()) for heading in headings[1:]), len(ids)]
        starts = [*(heading.start() for heading in headings[1:]), len(text)]
        for number, (heading, end) in enumerate(zip(headings, starts, strict=True)):
            content_end = self._content_end(text, heading.end(), end)
            content = text[heading.end() : content_end]
            role = self._format.role(heading["role"], content)
            parts = self._parts(content) if role == "assistant" else [("text", content)]
            said.append(Said(role, firsts[number], firsts[number + 1], tuple(_placed(parts, heading.end()))))
        return Reading(tuple(pieces), tuple(said))

    def _shown(self, token_id: int, sampled: bool, piece: str) -> str:
        """A token in the text that headings are looked for in."""
        if sampled:
            return _HIDDEN * len(piece)
        name = self._renderer.control(token_id)
        if name and piece.endswith(name):
            return f"{piece[: -len(name)]}{MARK}{name[1:]}"
        return piece.replace(MARK, _HIDDEN)

    def _content_end(self, text: str, start: int, end: int) -> int:
        content = text[start:end].rstrip("\n")
        stop = next((stop for stop in self._format.stop if content.endswith(stop)), "")
        return start + len(content) - len(stop)

    def _parts(self, turn: str) -> Iterator[tuple[str, str]]:
        """A turn's text, all of it, as what its parts are."""
        is_open = False
        for part in self._thinking.pieces(turn):
            if part in self._tags:
                is_open = part == self._tags[0]
                yield "tag", part
            elif is_open:
                yield "thinking", part
            else:
                at = 0
                for call in self._format.call.finditer(part):
                    yield "text", part[at : call.start()]
                    yield "call", call[0]
                    at = call.end()
                yield "text", part[at:]


def _placed(parts: Iterator[tuple[str, str]] | list[tuple[str, str]], start: int) -> Iterator[Span]:
    for kind, part in parts:
        if part:
            yield kind, start, start + len(part)
            start += len(part)


def answer(reader: Reader, request: dict[str, Any]) -> list[Any]:
    """What a request is answered with."""
    if "texts" in request:
        return [reader.text(_ids(packed)) for packed in request["texts"]]
    segments = [(_ids(ids), np.frombuffer(mask, "|b1").tolist()) for ids, mask in request["segments"]]
    return [asdict(reader.read(*segment)) for segment in segments]


def _ids(packed: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(packed, "<i4").tolist()
    return ids


def serve(reader: Reader, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until there are no more requests. An empty answer first says that it can."""
    answers.write(msgpack.packb([]))
    answers.flush()
    for request in msgpack.Unpacker(requests, max_buffer_size=0, read_size=1 << 16):
        answers.write(msgpack.packb(answer(reader, request)))
        answers.flush()


def main() -> None:
    """Serve a run's chat format on standard input and output."""
    parser = argparse.ArgumentParser(prog="python -m actors.transcript", description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    parser.add_argument("--model", type=Path, help="directory of the model's tokenizer, not the run's model.path")
    arguments = parser.parse_args()
    settings = load_settings(arguments.config)
    renderer = Renderer.load(arguments.model or Path(settings.model.path), settings.model.tool_format)
    with open(sys.stdin.fileno(), "rb", buffering=0) as requests:  # noqa: PTH123  what has come is not waited to be more
        serve(Reader(renderer, settings), requests, sys.stdout.buffer)


if __name__ == "__main__":
    run_main("transcript", main)
