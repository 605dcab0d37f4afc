"""The files that large arrays lie in: segments of a fixed size, filled one after the other and used again when empty.

Owns where a blob's bytes go, and the files: making, finding a free one, giving back. A segment is never made for one
blob and deleted with it, because that costs a file system more than writing the bytes does; an empty one is overwritten
where it lies. Never reads or writes a blob's bytes, and never decides when a place is free: it is told.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

log = logging.getLogger(__name__)

ALIGNMENT: Final = 4096  # of a blob's place, as a write around the page cache must have it
SEGMENT_BYTES: Final = 32 << 20
KEEP_FREE_BYTES: Final = 512 << 20  # of empty segments, for what comes next
SHARE_OF_FREE: Final = 16  # on a small disk a segment is smaller: one blob that stays holds all of its segment


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """Where a blob lies: bytes [offset, offset + size) of a segment."""

    segment: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next one may begin."""
        return self.offset + padded(self.size)


@dataclass(slots=True)
class _Segment:
    size: int
    num_live: int = 0


def padded(size: int) -> int:
    """Bytes that a blob takes up."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Segments:
    """The segments in `directory`; `restore` is due before anything else. For one thread at a time.

    OSErrors of the disk pass through `allocate` and `sync_directory`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for path in (directory, directory.parent):
            _sync(path)
        self._segments: dict[int, _Segment] = {}
        self._free: list[int] = []  # empty ones, the one that was emptied last at the end
        self._current: int | None = None
        self._at = 0
        self._last = 0
        self._made = False  # since the directory was synced
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="unlink")

    def close(self) -> None:
        """End the thread that deletes."""
        self._remover.shutdown()

    def path(self, segment: int) -> Path:
        """Where a segment lies."""
        return self._directory / f"{segment:08d}.segment"

    @property
    def free_bytes(self) -> int:
        """Bytes that can be allocated without a new segment."""
        rest = 0 if self._current is None else self._segments[self._current].size - self._at
        return rest + self._empty_bytes()

    def _empty_bytes(self) -> int:
        return sum(self._segments[segment].size for segment in self._free)

    def restore(self, extents: Iterable[Extent]) -> int:
        """Take over the directory, where these blobs are wanted and no others; returns how many files were of no use.

        What is partly free stays so until all of it is: a place is found again only where a whole segment is empty."""
        self._remover.submit(lambda: None).result()  # what is being deleted is gone
        self._segments = {number: _Segment(size) for number, size in self._files()}
        for extent in extents:
            if extent.segment in self._segments:  # else its reader will say that it is damaged
                self._segments[extent.segment].num_live += 1
        self._last = max(self._last, *self._segments, 0)
        self._current, self._free = None, [n for n, segment in self._segments.items() if not segment.num_live]
        num_free = len(self._free)
        self._trim()
        return num_free

    def _files(self) -> Iterator[tuple[int, int]]:
        for path in sorted(self._directory.glob("*.segment")):
            yield int(path.stem), path.stat().st_size

    # --- places

    def allocate(self, size: int) -> Extent:
        """A place for a blob of so many bytes, 1 or more, behind the one before where it fits."""
        need = padded(size)
        if self._current is None or self._at + need > self._segments[self._current].size:
            self._leave_current()
            self._current, self._at = self._find(need), 0
        extent = Extent(self._current, self._at, size)
        self._at = extent.end
        self._segments[self._current].num_live += 1
        return extent

    def release(self, extent: Extent) -> None:
        """Nobody wants what lies there, and nobody reads or writes it."""
        segment = self._segments[extent.segment]
        segment.num_live -= 1
        if not segment.num_live:
            if extent.segment == self._current:
                self._at = 0
            else:
                self._free.append(extent.segment)
                self._trim()

    def _leave_current(self) -> None:
        if self._current is not None and not self._segments[self._current].num_live:
            self._free.append(self._current)
            self._trim()
        self._current = None

    def _find(self, need: int) -> int:
        """An empty segment that is large enough and not wastefully so, else a new one."""
        most = max(2 * need, SEGMENT_BYTES)
        for segment in reversed(self._free):
            if need <= self._segments[segment].size <= most:
                self._free.remove(segment)
                return segment
        try:
            return self._make(max(need, min(SEGMENT_BYTES, self._disk_free() // SHARE_OF_FREE)))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        self.give_back()
        return self._make(need)

    def _disk_free(self) -> int:
        return shutil.disk_usage(self._directory).free

    def _make(self, size: int) -> int:
        number, size = self._last + 1, padded(size)
        path = self.path(number)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, size)  # so that a full disk is met here, and not in the writing
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        self._last, self._made = number, True
        self._segments[number] = _Segment(size)
        return number

    # --- files

    def sync_directory(self) -> None:
        """The new segments are on the disk, by their names."""
        if self._made:
            _sync(self._directory)
            self._made = False

    def give_back(self) -> None:
        """Delete what is empty: the disk is full."""
        self._leave_current()
        free, self._free = self._free, []
        for segment in free:
            self._delete(segment)

    def _trim(self) -> None:
        """Delete the oldest of many empty segments, in a thread: it takes the file system a while."""
        while self._free and self._empty_bytes() > KEEP_FREE_BYTES:
            segment = self._free.pop(0)
            del self._segments[segment]
            self._remover.submit(_unlink, self.path(segment))

    def _delete(self, segment: int) -> None:
        del self._segments[segment]
        _unlink(self.path(segment))


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        log.warning("A file that nobody needs cannot be deleted. path=%s error=%s", path, error)


def _sync(path: Path) -> None:
    """fsync a directory; one that is gone needs none."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
