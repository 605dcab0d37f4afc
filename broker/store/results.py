"""The stored trajectories: a row each, and a file beside the database for arrays above a size.

Owns the `results` table and the blobs that it names: writing, verified reading, and deleting a blob once no row names
it. Never opens or ends a transaction: the journal does, and says here what became of it.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import msgpack
import xxhash

from broker.protocol.frames import PREAMBLE, Frame, Message, decode
from broker.store.blobs import BlobStore, DamagedError

log = logging.getLogger(__name__)

Write = Callable[[str, tuple[object, ...]], sqlite3.Cursor]


class Results:
    """The results in `db` and `directory`. `write` executes a statement in the journal's transaction.

    A result whose arrays have more than `blob_bytes` in all is stored in a file. `durable` as in BlobStore.
    """

    def __init__(self, db: sqlite3.Connection, directory: Path, durable: bool, blob_bytes: int, write: Write) -> None:
        self._db, self._write, self._blob_bytes = db, write, blob_bytes
        self._blobs = BlobStore(directory, durable)
        self._garbage: set[str] = set()  # blobs whose rows were deleted
        self.tried_bytes = 0
        """Bytes of blobs written since the last commit or rollback."""
        if num := self._blobs.collect(self._names):
            log.info("Files of no result deleted. num=%d directory=%s", num, directory)

    def close(self) -> None:
        """Discard what was not committed."""
        self._blobs.close()

    def put(self, ticket_id: str, frames: Sequence[Frame]) -> None:
        """Write the TRAJECTORY in these frames. Its arrays go from the frames to the file without a copy.

        Raises OSError where the file takes no more."""
        envelope, arrays = bytes(frames[1]), frames[2:]
        num_bytes = sum(len(frame) for frame in arrays)
        inline, blob = b"", None
        if num_bytes > self._blob_bytes:
            self.tried_bytes += num_bytes
            blob = self._blobs.add(arrays)
        else:
            inline = b"".join(arrays)
        row = (ticket_id, envelope, inline, _digest(envelope, inline), blob)
        self._write("INSERT INTO results VALUES (?, ?, ?, ?, ?)", row)

    def drop(self, ticket_id: str) -> None:
        """Delete a ticket's result, if it has one."""
        rows = self._write("DELETE FROM results WHERE ticket_id = ? RETURNING blob", (ticket_id,))
        self._garbage.update(blob for (blob,) in rows if blob is not None)

    def load(self, ticket_id: str) -> Message | None:
        """The stored TRAJECTORY, its arrays views of one buffer or file; None where there is none.

        Raises DamagedError where it is not what was written.
        """
        row = self._db.execute(
            "SELECT envelope, arrays, digest, blob FROM results WHERE ticket_id = ?", (ticket_id,)
        ).fetchone()
        if row is None:
            return None
        envelope, inline, digest, blob = row
        if _digest(envelope, inline) != digest:
            raise DamagedError(f"the row of ticket {ticket_id} has other bytes than were written")
        arrays = memoryview(inline) if blob is None else self._blobs.read(blob)
        return decode([PREAMBLE, envelope, *_split(envelope, arrays)])

    # --- what becomes of the transaction

    def settle(self) -> None:
        """Before the commit: the blobs under their names, durable if the store is. Raises OSError."""
        self._blobs.settle()

    def committed(self) -> None:
        """The rows are there; the blobs that they name stay."""
        self._blobs.keep()
        self.tried_bytes = 0

    def rolled_back(self) -> None:
        """The rows are as they were at the last commit; so are the blobs."""
        self._blobs.discard(lambda name: name in self._garbage or self._names(name))
        self._garbage = {name for name in self._garbage if not self._names(name)}
        self.tried_bytes = 0

    def collect(self) -> None:
        """Delete the blobs whose rows are gone, once that is durable."""
        if self._garbage:
            self._blobs.remove([name for name in self._garbage if not self._names(name)])
            self._garbage.clear()

    def sync(self) -> None:
        """Make durable the blobs that were settled without being so."""
        self._blobs.sync()

    def _names(self, blob: str) -> bool:
        """Whether a result names this blob."""
        return self._db.execute("SELECT 1 FROM results WHERE blob = ?", (blob,)).fetchone() is not None


def _digest(envelope: bytes, inline: bytes) -> bytes:
    digest = xxhash.xxh3_128(envelope)
    digest.update(inline)
    return digest.digest()


def _split(envelope: bytes, arrays: memoryview) -> list[memoryview]:
    """The stored buffer as one frame per array, by the shapes in the envelope."""
    frames, offset = [], 0
    for dtype, shape in msgpack.unpackb(envelope)["a"]:
        num_bytes = int(dtype[2:])
        for extent in shape:
            num_bytes *= extent
        frames.append(arrays[offset : offset + num_bytes])
        offset += num_bytes
    return frames
