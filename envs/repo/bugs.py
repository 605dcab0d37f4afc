"""The bugs: made ahead of time, each known to fail the package's own tests, and how a policy is told of one.

`bugs.jsonl` has one a line and `calls.json` the calls that every repair is held to; `python -m envs.repo.make` wrote
both. A bug belongs to the split that a hash assigns to its function, so that no function has bugs in both.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.interface import Split

HERE = Path(__file__).parent
BUGS = HERE / "bugs.jsonl"
CALLS = HERE / "calls.json"


@dataclass(frozen=True, slots=True)
class Bug:
    """One bug. In the file `path` of the right package the characters from `start` to `end` become `new`.

    sha256: of the file with the bug in it. kind: what went wrong. function: where. test, traceback: the first of the
    package's tests that fails, and how. call, got, wanted: a recorded call with another outcome, as a person writes it.
    """

    package: str
    path: str
    function: str
    kind: str
    start: int
    end: int
    new: str
    sha256: str
    test: str
    traceback: str
    call: str
    got: str
    wanted: str

    @property
    def split(self) -> Split:
        """The one that its function belongs to."""
        return split_of(self.package, self.path, self.function)

    def applied(self, right: bytes) -> bytes:
        """The file with the bug in it. Raises ValueError for another file than the bug was made for."""
        text = right.decode()
        broken = (text[: self.start] + self.new + text[self.end :]).encode()
        if hashlib.sha256(broken).hexdigest() != self.sha256:
            raise ValueError(f"{self.path} of {self.package} is not the file that this bug was made for")
        return broken


def split_of(package: str, path: str, function: str) -> Split:
    """Half of the functions to each split."""
    name = f"bugs/{package}/{path}/{function}".encode()  # so begun, the halves are about equal
    return "train" if hashlib.blake2b(name, digest_size=1).digest()[0] % 2 else "heldout"


@functools.cache
def all_bugs() -> tuple[Bug, ...]:
    """All there are, in an order that mixes the packages and is the same everywhere."""
    read = [Bug(**json.loads(line)) for line in BUGS.read_text().splitlines()]
    return tuple(sorted(read, key=lambda bug: hashlib.blake2b(f"{bug.package}{bug.sha256}".encode()).digest()))


@functools.cache
def _all_calls() -> Mapping[str, Sequence[Any]]:
    found: dict[str, Sequence[Any]] = json.loads(CALLS.read_text())
    return found


def recorded_calls(package: str) -> Sequence[Any]:
    """The calls that are made of a package, as runner.py wants them."""
    return _all_calls()[package]


LEVELS = (1, 2, 3)
INTRODUCTION = (
    "The source of the Python package {package} lies in /workspace, a git repository. A bug got into it. Find it and "
    "repair it there: what counts is the package's own Python files, and that its tests pass, which are not in the "
    "repository. There is a shell and an editor, python3 but no pytest and no network. When you are done, answer "
    "without calling a tool."
)


def report(bug: Bug, level: int) -> str:
    """What a policy is told: at level 1 a failing test's traceback, at 2 what a call does, at 3 next to nothing."""
    told = {
        1: f"One of the tests fails, {bug.test}:\n\n{bug.traceback}",
        2: f"A user reports:\n\n{bug.call}\n\ngives {bug.got}\nand should give {bug.wanted}",
        3: f"Since the last change some of the tests of {bug.package} fail.",
    }[level]
    return f"{INTRODUCTION.format(package=bug.package)}\n\n{told}"
