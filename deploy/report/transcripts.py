"""What was said in trajectories: asks `python -m actors.transcript`, which knows the run's chat format and tokenizer.

Owns that process and what its answers look like on a page: a message's text in pieces of one kind, one version and one
author each, and the list of its tokens. Knows no chat format.
"""

from __future__ import annotations

import bisect
import itertools
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from broker.process.lifecycle import EXIT_USER_ERROR, ErgonError
from broker.protocol.trajectory import Segment, Trajectory


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a message. kind: text, thinking, tag or call. version: `lineage.version` of the policy that sampled
    it, empty for what nobody sampled; in a turn that is what the actor wrote. begins_version: it is another one than
    the turn's tokens before it had."""

    kind: str
    text: str
    version: str
    begins_version: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """One token: its place in the segment, id, text, log-prob (None where it was not sampled) and version."""

    place: int
    token_id: int
    text: str
    logprob: float | None
    version: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `tokens`: all of them, the heading and the end of the message included."""

    role: str
    pieces: tuple[Piece, ...]
    tokens: tuple[Token, ...]

    @property
    def versions(self) -> list[str]:
        """Which policies sampled it, in their order."""
        return list(dict.fromkeys(token.version for token in self.tokens if token.version))

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return sum(1 for token in self.tokens if token.version)


class Transcriber:
    """Starts the process when it is first asked; a context manager that ends it. May be used from several threads."""

    def __init__(self, config: Path, model: Path | None = None) -> None:
        """config: the run's TOML. model: where the tokenizer is, if not at the run's model.path."""
        self._command = [sys.executable, "-m", "actors.transcript", "--config", str(config)]
        self._command += ["--model", str(model)] if model else []
        self._process: subprocess.Popen[bytes] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the process
        self._lock = threading.Lock()
        self._refused: ErgonError | None = None

    def __enter__(self) -> Transcriber:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.stdin is not None and self._process.stdout is not None:
            with suppress(BrokenPipeError):  # it has ended by itself
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
        self._process = None
        self._said.close()

    def texts(self, trajectories: Sequence[Trajectory]) -> list[str]:
        """Everything that was said in each. Raises ErgonError where the tokenizer cannot be had."""
        segments = [(number, segment) for number, each in enumerate(trajectories) for segment in each.segments]
        answers = self._ask({"texts": [_ids(segment) for _, segment in segments]})
        texts = [""] * len(trajectories)
        for (number, _), text in zip(segments, answers, strict=True):
            texts[number] += text
        return texts

    def read(self, trajectory: Trajectory) -> list[list[Message]]:
        """The messages of each segment. Raises ErgonError where the tokenizer cannot be had."""
        asked = [(_ids(segment), segment.loss_mask_T.tobytes()) for segment in trajectory.segments]
        answers = self._ask({"segments": asked})
        return [list(messages(*each)) for each in zip(trajectory.segments, answers, strict=True)]

    def _ask(self, request: Mapping[str, Any]) -> list[Any]:
        with self._lock:
            if self._refused is not None:
                raise self._refused
            if self._process is None:
                self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(msgpack.packb(request))
                self._process.stdin.flush()
                return self._answer()
            except (OSError, EOFError) as error:
                raise self._failed() from error

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said
        )
        self._answers = msgpack.Unpacker(_Arriving(self._process.stdout), max_buffer_size=0, read_size=1 << 16)
        try:
            self._answer()  # it says that it can
        except EOFError as error:
            raise self._failed() from error

    def _answer(self) -> list[Any]:
        for answer in self._answers:
            return list(answer)
        raise EOFError

    def _failed(self) -> ErgonError:
        """Why the process has ended; it is not tried again, since it would be asked the same."""
        assert self._process is not None
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip()
        reason = said.splitlines()[-1].partition(": error: ")[2] if code == EXIT_USER_ERROR and said else ""
        self._refused = ErgonError(
            f"{reason}; or name a directory with the tokenizer: --model DIRECTORY"
            if reason
            else f"what was said cannot be read, the reader ended with exit code {code}:\n{said[-2000:]}"
        )
        return self._refused


class _Arriving:
    """A pipe that is read as far as it has something."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def read(self, num_bytes: int) -> bytes:
        """Up to so many bytes, at least one but at the end."""
        data: bytes = self._pipe.read1(num_bytes)
        return data


def messages(segment: Segment, reading: Mapping[str, Any]) -> Iterator[Message]:
    """A segment's messages, as the reader has answered."""
    texts: list[str] = reading["pieces"]
    versions = token_versions(segment)
    logprobs = segment.logprobs_T.tolist()
    tokens = [
        Token(place, token_id, text, logprobs[place] if versions[place] else None, versions[place])
        for place, (token_id, text) in enumerate(zip(segment.token_ids_T.tolist(), texts, strict=True))
    ]
    ends = list(itertools.accumulate(map(len, texts)))
    text = "".join(texts)
    for said in reading["messages"]:
        own = tokens[said["first_token"] : said["end_token"]]
        yield Message(said["role"], tuple(_pieces(said["spans"], own, ends, text)), tuple(own))


def token_versions(segment: Segment) -> list[str]:
    """The version of each token, empty where nobody sampled it."""
    versions = [""] * segment.token_ids_T.size
    sampled = np.flatnonzero(segment.loss_mask_T).tolist()
    named = (f"{run.lineage}.{run.version}" for run in segment.version_runs for _ in range(run.num_tokens))
    for place, version in zip(sampled, named, strict=True):
        versions[place] = version
    return versions


def _pieces(
    spans: Sequence[tuple[str, int, int]], tokens: Sequence[Token], ends: Sequence[int], text: str
) -> Iterator[Piece]:
    """Spans, cut where the version changes. A character belongs to the token that completes it."""
    shown = [token for token in tokens if token.text]
    stops = [ends[token.place] for token in shown]
    last = ""
    for kind, start, end in spans:
        first, after = bisect.bisect_right(stops, start), bisect.bisect_left(stops, end) + 1
        for version, group in itertools.groupby(range(first, min(after, len(stops))), lambda i: shown[i].version):
            own = list(group)
            piece = text[max(start, stops[own[0]] - len(shown[own[0]].text)) : min(end, stops[own[-1]])]
            yield Piece(kind, piece, version, begins_version=bool(version and last and version != last))
            last = version or last


def _ids(segment: Segment) -> bytes:
    return segment.token_ids_T.astype("<i4", copy=False).tobytes()
