"""The actor's one copy of the weights: a safetensors file that holds the exact bytes of the version it names.

Deltas are applied to it where it lies; an anchor is written over it. It never says that it holds a version while it may
hold anything else: from the first byte written until the total hash fits, `version` is None and the file's header is
blank, so that nobody can load it. Knows no socket; not thread-safe. Not durable on purpose: weights can be fetched
again.
"""

from __future__ import annotations

import logging
import mmap
import os
import time
from pathlib import Path

import numpy as np

from broker.process.lifecycle import ErgonError
from broker.protocol.hashes import join
from broker.protocol.proofs import Of
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Buffer, Bytes, Manifest, digest, flat, safetensors_header
from broker.weights import metrics
from broker.weights.begun import Begun
from broker.weights.sinks import DeltaBuffer, wrong_total
from broker.weights.threads import coding_run
from broker.weights.vouching import check_digest

logger = logging.getLogger(__name__)


class BaseFile:
    """A safetensors file at `path`, whose data never moves as long as the tensors stay the same. A Sink.

    Whoever reads it must be done before the next fetch begins. Methods raise ErgonError where the file cannot be
    written.
    """

    def __init__(self, path: Path) -> None:
        """`path`: in an existing directory; a file that is there is replaced by the first anchor."""
        self.path = path
        self._held: Manifest | None = None  # of the version that the file holds
        self._arriving: Manifest | None = None
        self._delta: DeltaBuffer | None = None
        self._begun: Begun | None = None  # changes to the version held, which it can be made again
        self._fd = -1
        self._data_offset = 0
        self._data: Bytes | None = None  # the mapped file behind its header

    @property
    def manifest(self) -> Manifest | None:
        """Of the version that the file holds whole and verified; None where it holds none."""
        return self._held if self._begun is None else None

    @property
    def version(self) -> PolicyVersion | None:
        """The version that the file holds whole and verified; None where it holds none."""
        return self.manifest.version if self.manifest is not None else None

    @property
    def have(self) -> PolicyVersion | None:
        """See Sink: also where a delta to it has been begun."""
        return self._held.version if self._held is not None else None

    def apply_ahead(self, data: Bytes) -> None:
        """The next bytes of the payload of a delta to what is held, the rest and the manifest of which are on their
        way: `finish` goes on with them, where they are the same, and `abort` takes them back. Raises ProtocolError
        where they are malformed."""
        assert self._held is not None
        assert self._data is not None
        if self._begun is None:
            self._pwrite(bytes(self._data_offset), 0)
            self._begun = Begun(self._held.tensors, self._data)
        self._begun.add(data)

    def begin(self, manifest: Manifest) -> None:
        """See Sink."""
        if manifest.parent is not None:
            self._delta = DeltaBuffer(manifest, self._held.tensors if self._held is not None else ())
        else:
            self._delta = self._begun = self._held = None
            header = safetensors_header(manifest)
            if self._data is None or (self._data_offset, self._data.size) != (len(header), manifest.total_bytes):
                self._create(len(header), manifest.total_bytes)
            self._pwrite(bytes(self._data_offset), 0)
        self._arriving = manifest

    def write(self, index: int, data: Buffer) -> None:
        """See Sink."""
        assert self._arriving is not None
        if self._delta is not None:
            self._delta.write(index, data)
        else:
            self._pwrite(data, self._data_offset + self._arriving.chunk_range(index)[0])

    def finish(self) -> None:
        """See Sink."""
        manifest, data = self._arriving, self._data
        assert manifest is not None
        assert data is not None
        if self._delta is not None:
            started = time.monotonic()
            self._delta.check()
            if self._begun is not None and not self._begun.begins(self._delta.data):
                self._undo()
            begun, self._begun, self._held = self._begun, None, None
            self._pwrite(bytes(self._data_offset), 0)
            leaves = self._delta.apply_to(data, begun)
            self._delta.verify(data, join(leaves.finish(coding_run())))
            metrics.apply_seconds.observe(time.monotonic() - started)
        else:
            # Read back what the file holds: the hash then covers the writing, too.
            if digest(data, coding_run()) != manifest.total_hash:
                raise wrong_total(manifest)
            check_digest(manifest, Of.SNAPSHOT, data)
        self._pwrite(safetensors_header(manifest), 0)
        self._held, self._arriving, self._delta = manifest, None, None

    def abort(self) -> None:
        """See Sink. What the file held before an unfinished delta it still holds."""
        self._arriving = self._delta = None
        if self._begun is not None:
            self._undo()

    def forget(self) -> None:
        """See Sink."""
        self._held = self._begun = None

    def close(self) -> None:
        """Remove the file. Idempotent."""
        self._held = self._data = self._begun = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.path.unlink(missing_ok=True)

    def _undo(self) -> None:
        """Hold what was held before a delta to it was begun."""
        held, begun, self._begun = self._held, self._begun, None
        assert held is not None
        assert begun is not None
        assert self._data is not None
        begun.undo()
        if digest(self._data, coding_run()) != held.total_hash:
            logger.error("base damaged version=%s next=anchor", tuple(held.version))
            metrics.verify_failures.inc()
            self._held = None
            return
        self._pwrite(safetensors_header(held), 0)

    def _create(self, header_bytes: int, data_bytes: int) -> None:
        """A new file of this size, mapped. Whoever still reads the former one keeps it until he is done."""
        self.close()
        try:
            self.path.unlink(missing_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            # Without room for all of it, writing to the map would end the process.
            os.posix_fallocate(self._fd, 0, header_bytes + data_bytes)
            mapped = mmap.mmap(self._fd, header_bytes + data_bytes)
        except OSError as error:
            self.close()
            raise self._unusable(error) from error
        self._data_offset = header_bytes
        self._data = np.frombuffer(mapped, np.uint8, offset=header_bytes)

    def _pwrite(self, data: Buffer, offset: int) -> None:
        left = flat(data)
        try:
            while left.nbytes:
                num = os.pwrite(self._fd, left, offset)
                left, offset = left[num:], offset + num
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> ErgonError:
        return ErgonError(
            f"weights cannot be written to {self.path} ({error.strerror}); "
            "free space there or set actor.staging to another directory"
        )
