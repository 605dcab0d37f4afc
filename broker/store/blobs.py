"""Large arrays beside the database: immutable files named by their content, written before the commit that names them.

Owns the directory `blobs/` of a store: temporary names, fsync of file and directory, verified reading, removal; the
bytes are written by `blobwriter.py`, in threads. Never decides which blob is wanted: the journal's rows say that, and a
file that no row names is an orphan of a crash. A name is XXH3-128 and the length, which finds damage, not forgery.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import xxhash

from broker.protocol.frames import Frame
from broker.store.blobwriter import BlobWriter

ItemT = TypeVar("ItemT")
log = logging.getLogger(__name__)

NUM_DIRECTORIES: Final = 16  # few, so that one group commit has few directories to fsync
MAX_OPEN: Final = 64  # unsettled files held open at most
READ_BYTES: Final = 1 << 20
SYNC_THREADS: Final = 8  # concurrent fsyncs share the file system's journal commits


class DamagedError(Exception):
    """A stored result is not what was written: missing, cut short, changed, or unreadable. The text says which."""


@dataclass(frozen=True, slots=True)
class _Written:
    name: str
    temporary: Path
    descriptor: Future[int]


class BlobStore:
    """The blobs in `directory`. `durable`: `settle` returns when the disk has them; else `sync` sees to it.

    For one thread at a time, as the journal is. OSErrors of the disk pass through `add`, `settle` and `sync`.
    """

    def __init__(self, directory: Path, durable: bool) -> None:
        self._directory, self._durable = directory, durable
        self._temporary = directory / "tmp"
        self._waste = self._temporary / "waste"
        for path in (self._waste, *(directory / f"{digit:x}" for digit in range(NUM_DIRECTORIES))):
            path.mkdir(parents=True, exist_ok=True)
        for path in (directory, directory.parent):
            _sync(path)
        self._writer = BlobWriter()
        self._pool = ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="fsync")
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="unlink")
        self._pending: list[_Written] = []  # being written, not yet under their names
        self._added: list[str] = []  # since the last forget or discard
        self._unsynced: dict[str, None] = {}  # only where not durable
        self._count = 0

    def close(self) -> None:
        """End the threads; what was added and not settled is discarded."""
        self.discard(lambda _: True)
        self._writer.close()
        self._pool.shutdown()
        self._remover.shutdown()

    def path(self, name: str) -> Path:
        """Where a blob lies."""
        return self._directory / name[0] / name

    # --- writing

    def add(self, frames: Sequence[Frame]) -> str:
        """Begin to write the frames, one after the other, and return the blob's name. It exists once `settle` has
        returned; until then the frames are in use, and must not change."""
        digest = xxhash.xxh3_128()
        for frame in frames:
            digest.update(frame)
        self._count += 1
        temporary = self._temporary / f"{os.getpid()}-{self._count}"
        name = f"{digest.hexdigest()}-{sum(map(len, frames))}"
        self._pending.append(_Written(name, temporary, self._writer.write(temporary, frames)))
        self._added.append(name)
        if len(self._pending) >= MAX_OPEN:
            self.settle()
        return name

    def settle(self) -> None:
        """Put what was added under its names; durable, file before directory, if the store is."""
        if not self._pending:
            return
        wait_for([blob.descriptor for blob in self._pending])
        descriptors = [blob.descriptor.result() for blob in self._pending]  # raises what a writing has raised
        # A name that is taken is that of a durable file with the same bytes: only durable ones may take its place. For
        # the others, naming first is as safe, because no row names them yet, and lets one journal commit of the file
        # system serve file and directory.
        taken = [blob for blob in self._pending if self.path(blob.name).exists()]
        self._fsync(taken)
        for blob in self._pending:
            blob.temporary.replace(self.path(blob.name))
            if not self._durable:
                self._unsynced[blob.name] = None
        self._fsync([blob for blob in self._pending if blob not in taken])
        if self._durable:
            self._each(_sync, sorted({self.path(blob.name).parent for blob in self._pending}))
        self._pending.clear()
        for descriptor in descriptors:
            os.close(descriptor)

    def _fsync(self, blobs: Sequence[_Written]) -> None:
        if self._durable:
            self._each(os.fsync, [blob.descriptor.result() for blob in blobs])

    def keep(self) -> None:
        """What was added is named by a commit now."""
        self._added.clear()

    def discard(self, named: Callable[[str], bool]) -> None:
        """Take back what was added since the last `keep`, but for those that `named` says an earlier commit names."""
        for blob in self._pending:
            # One that has failed has taken its file with it.
            if not blob.descriptor.cancel() and blob.descriptor.exception() is None:
                os.close(blob.descriptor.result())
                blob.temporary.unlink(missing_ok=True)
        self._pending.clear()
        self.remove(name for name in self._added if not named(name))
        self._added.clear()

    def sync(self) -> None:
        """Make durable what was settled without being so."""
        names = [name for name in self._unsynced if self.path(name).exists()]
        self._each(_sync, [self.path(name) for name in names])
        self._each(_sync, sorted({self.path(name).parent for name in names}))
        self._unsynced.clear()

    def remove(self, names: Iterable[str]) -> None:
        """Delete blobs. Their names are free at once; the space is given back by a thread, because that takes the file
        system longer than writing did. One that cannot be deleted is left for `collect`."""
        for name in names:
            self._unsynced.pop(name, None)
            self._count += 1
            waste = self._waste / f"{os.getpid()}-{self._count}"
            try:
                self.path(name).replace(waste)
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("A blob that nobody needs cannot be deleted. path=%s error=%s", self.path(name), error)
            else:
                self._remover.submit(_unlink, waste)

    def collect(self, named: Callable[[str], bool]) -> int:
        """Delete what crashes have left: temporary files, and blobs that no row names. Returns how many files."""
        orphans = [
            path
            for path in self._directory.rglob("*")
            if path.is_file() and (self._temporary in path.parents or not named(path.name))
        ]
        for path in orphans:
            path.unlink()
        return len(orphans)

    # --- reading

    def read(self, name: str) -> memoryview:
        """The bytes of a blob, verified: a read-only map of the file, which costs no memory of this process.

        Raises DamagedError. The file is hashed by reading, not through the map, because a bad sector under a map is
        a signal that ends the process.
        """
        try:
            descriptor = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DamagedError(f"blob {name}: {error.strerror}") from error
        try:
            self._verify(descriptor, name)
            return memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
        except OSError as error:
            raise DamagedError(f"blob {name}: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def _verify(self, descriptor: int, name: str) -> None:
        expected, _, stated = name.partition("-")
        size = os.fstat(descriptor).st_size
        if str(size) != stated:
            raise DamagedError(f"blob {name} has {size} bytes")
        digest, buffer = xxhash.xxh3_128(), bytearray(min(READ_BYTES, size))
        view, offset = memoryview(buffer), 0
        while num := os.preadv(descriptor, [buffer], offset):
            digest.update(view[:num])
            offset += num
        if digest.hexdigest() != expected:
            raise DamagedError(f"blob {name} has other bytes than were written")

    def _each(self, function: Callable[[ItemT], object], items: Sequence[ItemT]) -> None:
        if len(items) > 1:
            list(self._pool.map(function, items))
        elif items:
            function(items[0])


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        log.warning("A file that nobody needs cannot be deleted. path=%s error=%s", path, error)


def _sync(path: Path) -> None:
    """fsync a file or directory by its path; one that is gone needs none."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
