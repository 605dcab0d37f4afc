"""The trajectories that a run keeps for people to look at, within a bound of bytes: the folder `trajectories`.

Files of records (`broker.protocol.kept`), named NUMBER-LEVEL, which are written one after the other. Where all
together become too many bytes, the oldest of the files that were thinned least is thinned once more: a file of level L
has one in 2**L of its groups, chosen by the group's name, so that groups stay whole. What remains is a sample of the
whole run that is as dense everywhere, and everything of its newest quarter. Not durable: a crash may cost the last
ones. Training does not know of it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from broker.protocol.errors import ProtocolError
from broker.protocol.kept import (
    FOLDER,
    Kept,
    KeptFacts,
    file_name,
    pack_kept,
    parse_file_name,
    read_records,
    unpack_kept,
)
from broker.protocol.trajectory import PolicyVersion, Trajectory

logger = logging.getLogger(__name__)

NUM_FILES = 16  # of full size within the bound
NUM_NEWEST = 4  # full files that are not thinned
_MAX_LEVEL = 40


@dataclass(frozen=True, slots=True)
class KeptFile:
    """One closed file."""

    path: Path
    number: int
    level: int
    num_bytes: int


class Keeper:
    """Writes them; `max_bytes` of 0: none. Files of an earlier process stay, and count."""

    def __init__(self, run_dir: Path, max_bytes: int, place: Callable[[], tuple[int, PolicyVersion]]) -> None:
        """place: the learner's step and version at this moment."""
        self._directory = run_dir / FOLDER
        self._max_bytes = max_bytes
        self._place = place
        self._file_bytes = max_bytes // NUM_FILES
        self._closed = closed_files(self._directory)
        self._number = self._closed[-1].number if self._closed else 0  # of the newest file
        self._open: BinaryIO | None = None
        self._open_bytes = 0
        self.num_too_large = 0
        if max_bytes:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._bound()

    def keep(self, trajectory: Trajectory, fate: str, evaluation: str = "") -> None:
        """Keep one, as `KeptFacts` has it; readers see it when this returns. One larger than a file is not kept."""
        if not self._max_bytes:
            return
        step, (lineage, version) = self._place()
        facts = KeptFacts(step=step, lineage=lineage, version=version, fate=fate, evaluation=evaluation)
        try:
            packed = pack_kept(Kept(facts, trajectory))
        except ProtocolError as error:  # none that the broker lets through; such a one is in the quarantine
            logger.warning("a trajectory is not well-formed and is not kept error=%s", error)
            return
        if len(packed) <= self._file_bytes:
            self._write(packed)
            return
        if not self.num_too_large:
            name, limit = trajectory.ticket.ticket_id, self._file_bytes
            logger.warning("a trajectory is too large to be kept ticket=%s bytes=%d limit=%d", name, len(packed), limit)
        self.num_too_large += 1

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _write(self, packed: bytes) -> None:
        if self._open is not None and self._open_bytes + len(packed) > self._file_bytes:
            self._end_file()
        if self._open is None:
            self._number += 1
            self._open = self._path(self._number, 0).open("wb")
            self._open_bytes = 0
        self._open.write(packed)
        self._open.flush()
        self._open_bytes += len(packed)

    def _end_file(self) -> None:
        self.close()
        self._closed.append(KeptFile(self._path(self._number, 0), self._number, 0, self._open_bytes))
        self._bound()

    def _bound(self) -> None:
        """Thin until another full file has room beside the closed ones."""
        while sum(file.num_bytes for file in self._closed) > self._max_bytes - self._file_bytes:
            old = self._closed[:-NUM_NEWEST] or self._closed
            chosen = min(old, key=lambda file: (file.level, file.number))
            place = self._closed.index(chosen)
            self._closed[place : place + 1] = self._thinned(chosen)

    def _thinned(self, file: KeptFile) -> list[KeptFile]:
        """The file with half of its groups, in its place; none where none is left."""
        level = file.level + 1
        left = _of_level(file.path, level) if level <= _MAX_LEVEL else []
        made = []
        if left:
            path = self._path(file.number, level)
            draft = path.with_name(path.name + ".tmp")
            draft.write_bytes(b"".join(left))
            draft.replace(path)
            made.append(KeptFile(path, file.number, level, sum(map(len, left))))
        file.path.unlink()
        return made

    def _path(self, number: int, level: int) -> Path:
        return self._directory / file_name(number, level)


def closed_files(directory: Path) -> list[KeptFile]:
    """The files of a folder, in the order of their numbers. Of two with one number the less thinned is removed: a
    process died before it had done so."""
    found: dict[int, KeptFile] = {}
    for path in directory.glob("*") if directory.is_dir() else ():
        if (name := parse_file_name(path.name)) is None:
            continue
        file, other = KeptFile(path, *name, path.stat().st_size), found.get(name[0])
        if other is not None:
            less, file = sorted((file, other), key=lambda each: each.level)
            less.path.unlink()
        found[file.number] = file
    return [found[number] for number in sorted(found)]


def is_of_level(group_id: str, level: int) -> bool:
    """Whether a group is among the one in 2**level that stay."""
    digest = hashlib.blake2b(group_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % (1 << level) == 0


def _of_level(path: Path, level: int) -> list[bytes]:
    """The records of a file whose groups stay; none of a file that is damaged."""
    data = path.read_bytes()
    try:
        return [
            data[start : start + length]
            for start, length, record in read_records(data)[0]
            if is_of_level(unpack_kept(record).trajectory.ticket.group_id, level)
        ]
    except ProtocolError as error:
        logger.warning("kept trajectories are damaged and given up file=%s error=%s", path, error)
        return []
