"""Where fetched weights go: a safetensors file that appears whole or not at all, or a snapshot in memory to serve on.

A sink owns its destination from `begin` to `finish` or `abort`. It trusts no chunk order and verifies the whole at the
end; it knows no socket.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import Protocol

from broker.process.lifecycle import ErgonError
from broker.protocol.weights import Buffer, Bytes, Manifest, digest, flat, safetensors_header
from broker.weights.store import Snapshot, WeightStore


class WeightsCorruptError(Exception):
    """What arrived is not what the manifest promises, repeatedly; nothing was written to the destination."""


class Sink(Protocol):
    """Where verified chunks go. `begin` may be called again after `abort`."""

    def begin(self, manifest: Manifest) -> None:
        """Prepare the destination for this version."""
        ...

    def write(self, index: int, data: Buffer) -> None:
        """Store a verified chunk."""
        ...

    def finish(self) -> None:
        """Verify the whole and make it visible. Raises WeightsCorruptError."""
        ...

    def abort(self) -> None:
        """Leave no trace. Harmless at any time, after `finish` too."""
        ...


class FileSink:
    """A safetensors file at `destination`, replaced in one step; until then `.NAME.PID.partial` beside it.

    Raises ErgonError where the directory cannot take it. Not durable on purpose: weights can be fetched again.
    """

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self._partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
        self._fd = -1
        self._manifest: Manifest | None = None
        self._data_offset = 0

    def begin(self, manifest: Manifest) -> None:
        header = safetensors_header(manifest)
        self._manifest, self._data_offset = manifest, len(header)
        try:
            self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._fd, len(header) + manifest.total_bytes)
            self._pwrite(header, 0)
        except OSError as error:
            raise self._unusable(error) from error

    def write(self, index: int, data: Buffer) -> None:
        assert self._manifest is not None
        try:
            self._pwrite(data, self._data_offset + self._manifest.chunk_range(index)[0])
        except OSError as error:
            raise self._unusable(error) from error

    def finish(self) -> None:
        assert self._manifest is not None
        # Read back what the file holds: the hash then covers the writing, too.
        with (
            mmap.mmap(self._fd, 0, prot=mmap.PROT_READ) as mapped,
            memoryview(mapped) as whole,
            whole[self._data_offset :] as data,
        ):
            right = digest(data) == self._manifest.total_hash
        if not right:
            raise _wrong_total(self._manifest)
        try:
            self._partial.replace(self._destination)
        except OSError as error:
            raise self._unusable(error) from error
        os.close(self._fd)
        self._fd = -1

    def abort(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(FileNotFoundError):
                self._partial.unlink()

    def _pwrite(self, data: Buffer, offset: int) -> None:
        left = flat(data)
        while left.nbytes:
            num = os.pwrite(self._fd, left, offset)
            left, offset = left[num:], offset + num

    def _unusable(self, error: OSError) -> ErgonError:
        return ErgonError(
            f"weights cannot be written to {self._destination} ({error.strerror}); "
            "free space there or set actor.staging to another directory"
        )


class MemorySink:
    """A snapshot in memory that `store` accounts for; `snapshot` after `finish`. Raises OutOfBudgetError at `begin`."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._manifest: Manifest | None = None
        self._data: Bytes | None = None
        self.snapshot: Snapshot | None = None

    def begin(self, manifest: Manifest) -> None:
        self._data = self._store.allocate(manifest.total_bytes)
        self._manifest = manifest

    def write(self, index: int, data: Buffer) -> None:
        assert self._data is not None
        assert self._manifest is not None
        start, end = self._manifest.chunk_range(index)
        flat(self._data)[start:end] = flat(data)

    def finish(self) -> None:
        assert self._data is not None
        assert self._manifest is not None
        if digest(self._data) != self._manifest.total_hash:
            raise _wrong_total(self._manifest)
        self._data.setflags(write=False)
        self.snapshot = Snapshot(self._manifest, self._data)
        self._data = None

    def abort(self) -> None:
        self._data = None


def _wrong_total(manifest: Manifest) -> WeightsCorruptError:
    version = manifest.version
    return WeightsCorruptError(
        f"version ({version.lineage}, {version.version}): every chunk fits its hash and the whole does not; "
        "the manifest contradicts itself, so the publisher or a relay is damaged"
    )
