"""What a terminal problem is, and which one stands behind which index. The same on every machine; runs nothing.

Problem `i` of a split is the first of the numbered drafts of its kind and level whose content a hash assigns to that
split, half to each. So no problem is in two splits.
"""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from envs.interface import Split
from envs.terminal.state import State

MAX_DRAFTS = 64


@dataclass(frozen=True, slots=True)
class Problem:
    """One task: what lies in /workspace at first, what is asked, what must lie there at the end.

    wanted: path -> text (compared without trailing white space), or None for a path that must be gone. executable:
    files that must be so at the end; all others must not be. Every other file must be as it was at first. background:
    a command that starts what runs besides. solution: commands that solve it.
    """

    prompt: str
    files: Mapping[str, bytes]
    wanted: Mapping[str, str | None]
    solution: Sequence[str]
    executable: frozenset[str] = frozenset()
    background: str = ""

    @property
    def content(self) -> str:
        """All that makes this problem itself."""
        return repr((self.prompt, sorted(self.files.items()), sorted(self.wanted.items(), key=str), self.background))

    @property
    def split(self) -> Split:
        """The split that it belongs to, whatever its index."""
        return "train" if hashlib.blake2b(self.content.encode(), digest_size=1).digest()[0] % 2 else "heldout"

    def archive(self) -> bytes:
        """The files as a tar archive."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for path, data in self.files.items():
                member = tarfile.TarInfo(path)
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))
        return buffer.getvalue()

    def failures(self, state: State) -> list[str]:
        """What is not as it must be: one sentence each, for people who look at an episode."""
        found = []
        for path, text in self.wanted.items():
            entry = state.get(path)
            if text is None:
                if entry is not None:
                    found.append(f"{path} is still there")
            elif entry is None or entry.data is None:
                found.append(f"{path} is no file")
            elif entry.data.decode(errors="replace").rstrip() != text.rstrip():
                found.append(f"{path} holds something else")
        for path, data in self.files.items():
            if path not in self.wanted and ((entry := state.get(path)) is None or entry.data != data):
                found.append(f"{path} is not as it was")
        if self.executable:
            now = {path for path, entry in state.items() if entry.data is not None and entry.mode & 0o100}
            if now != self.executable:
                found.append("the executable files are not the right ones")
        return found


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of problems; `draft(random, level)` makes one, level 1 the easiest of three."""

    name: str
    draft: Callable[[random.Random, int], Problem] = field(repr=False)


def problem(kind: Kind, level: int, split: Split, number: int) -> Problem:
    """The problem of this number. Raises LookupError where none of the drafts is of the split, which no number has."""
    for attempt in range(MAX_DRAFTS):
        made = kind.draft(random.Random(f"{kind.name}/{level}/{number}/{attempt}"), level)
        if made.split == split:
            return made
    raise LookupError(f"the terminal has no {split} problem {number} of kind {kind.name}")
