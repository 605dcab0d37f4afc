"""Large arrays beside the database: immutable bytes in segments, written before the commit that names them.

Owns when a blob is written, when it is durable, and that what is read is what was written: a blob is named by its
content. Never decides which blob is wanted: the journal's rows say that. A digest is XXH3-128, which finds damage, not
forgery.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from broker.protocol.frames import Frame
from broker.store.directfile import DirectWriter, open_direct, read_direct
from broker.store.segments import ALIGNMENT, Extent, Segments, padded

_ZEROS: Final = memoryview(bytes(ALIGNMENT))


class DamagedError(Exception):
    """A stored result is not what was written: missing, cut short, changed, or unreadable. The text says which."""


class Blob(msgspec.Struct, frozen=True, array_like=True):
    """A blob by its content and by its place."""

    digest: bytes
    extent: Extent

    def __str__(self) -> str:
        return (
            f"{self.digest.hex()} of {self.extent.size} bytes at {self.extent.offset} in segment {self.extent.segment}"
        )


class BlobStore:
    """The blobs in `directory`. `durable`: `settle` returns when the disk has them; else `sync` sees to it.

    For one thread at a time, as the journal is. OSErrors of the disk pass through `add`, `settle` and `sync`.
    """

    def __init__(self, directory: Path, durable: bool) -> None:
        self._durable = durable
        self._segments = Segments(directory)
        self._writer = DirectWriter()
        self._pending: list[tuple[Extent, Sequence[Frame]]] = []  # not yet written
        self._unsynced: dict[int, None] = {}  # segments; only where not durable

    def close(self) -> None:
        """What was added and not settled is discarded."""
        self._pending.clear()
        self._segments.close()

    @property
    def free_bytes(self) -> int:
        """Room for blobs that is taken from the disk already."""
        return self._segments.free_bytes

    def restore(self, blobs: Iterable[Blob]) -> int:
        """These are wanted and no others, and what was added is forgotten: at the start, and after a rollback. Returns
        how many files hold none of them."""
        self._pending.clear()
        return self._segments.restore(blob.extent for blob in blobs)

    # --- writing

    def add(self, frames: Sequence[Frame]) -> Blob:
        """Take the frames, one after the other, for a blob. `settle` writes it; until then they must not change."""
        digest = xxhash.xxh3_128()
        for frame in frames:
            digest.update(frame)
        extent = self._segments.allocate(sum(map(len, frames)))
        self._pending.append((extent, frames))
        return Blob(digest.digest(), extent)

    def settle(self) -> None:
        """Write what was added; on the disk, if the store is durable."""
        if not self._pending:
            return
        with contextlib.ExitStack() as opened:
            descriptors: dict[int, int] = {}
            for extent, frames in _runs(self._pending):
                segment = extent.segment
                if segment not in descriptors:
                    descriptors[segment] = open_direct(self._segments.path(segment), os.O_WRONLY)
                    opened.callback(os.close, descriptors[segment])
                self._writer.write(descriptors[segment], extent.offset, frames)
            if self._durable:
                for descriptor in descriptors.values():
                    os.fdatasync(descriptor)
                self._segments.sync_directory()
            else:
                self._unsynced.update(dict.fromkeys(descriptors))
        self._pending.clear()

    def sync(self) -> None:
        """Make durable what was settled without being so."""
        for segment in self._unsynced:
            with contextlib.suppress(FileNotFoundError):  # emptied and deleted meanwhile
                descriptor = os.open(self._segments.path(segment), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fdatasync(descriptor)
                finally:
                    os.close(descriptor)
        self._segments.sync_directory()
        self._unsynced.clear()

    def remove(self, blobs: Iterable[Blob]) -> None:
        """Nobody wants these, durably: their places are free."""
        for blob in blobs:
            self._segments.release(blob.extent)

    def give_back(self) -> None:
        """Return what is free to the disk, which is full."""
        self._segments.give_back()

    # --- reading

    def read(self, blob: Blob) -> memoryview:
        """The bytes of a blob, verified, in memory of their own. Raises DamagedError."""
        extent = blob.extent
        try:
            descriptor = open_direct(self._segments.path(extent.segment), os.O_RDONLY)
            try:
                view = memoryview(read_direct(descriptor, extent.offset, padded(extent.size)))[: extent.size]
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DamagedError(f"blob {blob}: {error.strerror}") from error
        if xxhash.xxh3_128_digest(view) != blob.digest:
            raise DamagedError(f"blob {blob} has other bytes than were written")
        return view.toreadonly()


def _runs(pending: Sequence[tuple[Extent, Sequence[Frame]]]) -> Iterator[tuple[Extent, Iterator[Frame]]]:
    """Neighbours as one, because a few large writes cost less than many small ones; every one with its padding."""
    start = 0
    for index, (extent, _) in enumerate(pending, 1):
        if index < len(pending):
            following = pending[index][0]
            if (following.segment, following.offset) == (extent.segment, extent.end):
                continue
        yield pending[start][0], chain.from_iterable(_padded(*one) for one in pending[start:index])
        start = index


def _padded(extent: Extent, frames: Sequence[Frame]) -> Iterator[Frame]:
    yield from frames
    yield _ZEROS[: padded(extent.size) - extent.size]
