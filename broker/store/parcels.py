"""The stored trajectories, by the parcel: a row for each message, and a file beside for arrays above a size.

Owns the table `parcels` and the blobs that it names: writing, verified reading, and deleting a parcel once none of its
results is wanted. A partial is a parcel of its own. Knows in memory where the result or the partial of a live ticket
lies. Never begins or ends a transaction: the
journal does, and says here what became of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lmdb
import msgspec
import xxhash

from broker.ledger.events import TakenRow
from broker.process.lifecycle import ErgonError
from broker.protocol.frames import PREAMBLE, Frame, Message, decode
from broker.store.blobs import Blob, BlobStore, DamagedError
from broker.store.database import Database
from broker.store.rows import ParcelHead, decode_head, encode, number, pack_key

log = logging.getLogger(__name__)

DIGEST_BYTES: Final = 16
HEAD_AT: Final = DIGEST_BYTES + 4

Counts = Callable[[TakenRow, int], bool]


class Place(msgspec.Struct, frozen=True, gc=False):
    """Where the result of a live ticket lies: the index-th trajectory of a parcel."""

    parcel: int
    index: int


@dataclass(slots=True)
class _Parcel:
    source: str
    blob: Blob | None
    num_live: int


class Parcels:
    """The parcels in `db` and `directory`; `durable` as in BlobStore. `reload` is due before anything else.

    A parcel whose arrays have more than `blob_bytes` in all has them in a file.
    """

    def __init__(self, db: Database, directory: Path, durable: bool, blob_bytes: int) -> None:
        self._db, self._blob_bytes, self._directory = db, blob_bytes, directory
        self._blobs = BlobStore(directory, durable)
        self._parcels: dict[int, _Parcel] = {}
        self._places: dict[str, Place] = {}
        self._partials: dict[str, tuple[int, int]] = {}  # by ticket: its parcel, and the bytes of its arrays
        self._garbage: set[Blob] = set()  # blobs whose rows were deleted
        self._orphans: list[int] = []  # rows found of which no result is wanted
        self.last = 0
        """The number of the newest parcel."""
        self.tried_bytes = self.tried_row_bytes = self.tried_blob_bytes = 0
        """Put since the last commit or rollback: bytes in all, of the largest row, of all blobs."""

    def close(self) -> None:
        """Discard what was not committed."""
        self._blobs.close()

    def reload(self, last: int, counts: Counts) -> None:
        """Take over what is committed: `last`, the highest number used. `counts`: whether a row of a parcel is the
        result of a live ticket."""
        self._parcels.clear()
        self._places.clear()
        self._partials.clear()
        self._orphans.clear()
        self.last = last
        for parcel, head, rows in self._scan(counts):
            if not rows or head is None:
                self._orphans.append(parcel)
                continue
            self._parcels[parcel] = _Parcel(head.source, head.blob, len(rows))
            for row in rows:
                if head.partial:
                    self._partials[row.ticket_id] = parcel, sum(head.sizes[1:])
                else:
                    self._places[row.ticket_id] = Place(parcel, row.index)

    def open_blobs(self) -> None:
        """At the start: what no row names is room for others, whatever a crash has left there."""
        if num := self._blobs.restore(self._wanted()):
            log.info("Files of no result found. num=%d directory=%s", num, self._directory)

    def taken(self, counts: Counts) -> dict[int, tuple[int, str]]:
        """The results: result_seq and source by the seq of the ticket."""
        return {
            row.seq: (row.result_seq, head.source)
            for _, head, rows in self._scan(counts)
            if head is not None and not head.partial
            for row in rows
        }

    def partials(self) -> dict[str, int]:
        """The bytes of the partials, by ticket."""
        return {ticket_id: num_bytes for ticket_id, (_, num_bytes) in self._partials.items()}

    def _scan(self, counts: Counts) -> Iterator[tuple[int, ParcelHead | None, list[TakenRow]]]:
        """Every parcel with those of its rows that count; no head where that cannot be read."""
        with self._db.read(views=True) as transaction:
            for key, row in transaction.cursor(db=self._db.tables.parcels):
                parcel = number(key)
                try:
                    head = _head(memoryview(row))
                except msgspec.MsgspecError as error:
                    # Its tickets are issued: the episodes are run again.
                    log.error("A stored parcel is damaged, and is deleted. parcel=%d error=%s", parcel, error)
                    yield parcel, None, []
                    continue
                yield parcel, head, [taken for taken in head.rows if counts(taken, parcel)]

    # --- writing

    def put(self, source: str, rows: Sequence[TakenRow], frames: Sequence[Frame]) -> None:
        """Write the message in these frames, whose trajectories are these results of the session `source`. Arrays for a
        file go there from the frames, without a copy.

        Raises OSError or lmdb.Error where there is no room."""
        parcel = self._write(source, tuple(rows), frames, partial=False)
        for index, _, _, ticket_id in rows:
            self._places[ticket_id] = Place(parcel, index)
            if ticket_id in self._partials:
                self.drop_partial(ticket_id)

    def put_partial(self, seq: int, ticket_id: str, frames: Sequence[Frame]) -> None:
        """Write the message in these frames, which is the partial of this ticket in the place of the one before. Raises
        as `put`."""
        parcel = self._write("", (TakenRow(0, seq, 0, ticket_id),), frames, partial=True)
        self.drop_partial(ticket_id)
        self._partials[ticket_id] = parcel, sum(map(len, frames[2:]))

    def _write(self, source: str, rows: tuple[TakenRow, ...], frames: Sequence[Frame], *, partial: bool) -> int:
        content, blob = frames[1:], None
        sizes = tuple(map(len, content))
        num_bytes = sum(sizes)
        self.tried_bytes += num_bytes
        if num_bytes - sizes[0] > self._blob_bytes:
            self.tried_blob_bytes += num_bytes - sizes[0]
            blob = self._blobs.add(frames[2:])
            content, num_bytes = frames[1:2], sizes[0]
        self.tried_row_bytes = max(self.tried_row_bytes, num_bytes)
        head = encode(ParcelHead(source, rows, sizes, blob, partial))
        parts = (len(head).to_bytes(4, "little"), head, *content)
        digest = xxhash.xxh3_128()
        for part in parts:
            digest.update(part)
        self.last = parcel = self.last + 1
        value = b"".join((digest.digest(), *parts))
        self._db.write.put(pack_key(parcel), value, append=True, db=self._db.tables.parcels)
        self._parcels[parcel] = _Parcel(source, blob, len(rows))
        return parcel

    def drop(self, ticket_id: str) -> str | None:
        """A ticket's result is not wanted any more: whose it was, or None where there is none. Raises lmdb.Error."""
        place = self._places.pop(ticket_id, None)
        if place is None:
            return None
        return self._drop(place.parcel).source

    def drop_partial(self, ticket_id: str) -> None:
        """A ticket's partial, if it has one, is not wanted any more. Raises lmdb.Error."""
        found = self._partials.pop(ticket_id, None)
        if found is not None:
            self._drop(found[0])

    def _drop(self, number: int) -> _Parcel:
        parcel = self._parcels[number]
        parcel.num_live -= 1
        if not parcel.num_live:
            del self._parcels[number]
            self._db.write.delete(pack_key(number), db=self._db.tables.parcels)
            if parcel.blob is not None:
                self._garbage.add(parcel.blob)
        return parcel

    # --- reading

    def place(self, ticket_id: str) -> Place | None:
        """Where a live ticket's result lies; None where it has none."""
        return self._places.get(ticket_id)

    def partial(self, ticket_id: str) -> int | None:
        """The parcel of a live ticket's partial; None where it has none."""
        found = self._partials.get(ticket_id)
        return None if found is None else found[0]

    def load(self, parcel: int) -> Message:
        """The message as it came, its arrays views of one buffer or file. Raises DamagedError.

        A row is a copy of the map's, so that it stays what it is when its pages are used again.
        """
        try:
            with self._db.read() as transaction:
                row = transaction.get(pack_key(parcel), db=self._db.tables.parcels)
        except (ErgonError, lmdb.Error) as error:
            raise DamagedError(f"parcel {parcel}: {error}") from error
        if row is None:
            raise DamagedError(f"parcel {parcel} is not there")
        view = memoryview(row)
        if xxhash.xxh3_128_digest(view[DIGEST_BYTES:]) != row[:DIGEST_BYTES]:
            raise DamagedError(f"the row of parcel {parcel} has other bytes than were written")
        head, end = _head(view), _head_end(view)
        envelope, arrays = view[end : end + head.sizes[0]], view[end + head.sizes[0] :]
        if head.blob is not None:
            arrays = self._blobs.read(head.blob)
        start, frames = 0, list[Frame]((PREAMBLE, envelope))
        for size in head.sizes[1:]:
            frames.append(arrays[start : start + size])
            start += size
        return decode(frames)

    # --- what becomes of the transaction

    def delete_orphans(self) -> None:
        """In the next transaction: the rows of which no result is wanted. Raises lmdb.Error."""
        for parcel in self._orphans:
            self._db.write.delete(pack_key(parcel), db=self._db.tables.parcels)
        self._orphans.clear()

    def settle(self) -> None:
        """Before the commit: the blobs are written, durable if the store is; from any thread. Raises OSError."""
        self._blobs.settle()

    def committed(self) -> None:
        """The rows are there."""
        self.tried_bytes = self.tried_row_bytes = self.tried_blob_bytes = 0

    def rolled_back(self) -> None:
        """After `reload`: the rows are as they were at the last commit; so are the blobs."""
        self._garbage -= set(self._wanted())
        self._blobs.restore([*self._wanted(), *self._garbage])
        self.committed()

    def give_back(self) -> None:
        """The disk is full: return what is empty."""
        self._blobs.give_back()

    def collect(self) -> None:
        """The places of blobs whose rows are gone, once that is durable, are free."""
        self._blobs.remove(self._garbage)
        self._garbage.clear()

    def sync(self) -> None:
        """Make durable the blobs that were settled without being so."""
        self._blobs.sync()

    @property
    def free_blob_bytes(self) -> int:
        """Room for blobs that is taken from the disk already."""
        return self._blobs.free_bytes

    def _wanted(self) -> list[Blob]:
        return [parcel.blob for parcel in self._parcels.values() if parcel.blob is not None]


def _head(row: memoryview) -> ParcelHead:
    """The head in a row, of whose rest nothing is read. Raises msgspec.MsgspecError."""
    return decode_head(row[HEAD_AT : _head_end(row)])


def _head_end(row: memoryview) -> int:
    return HEAD_AT + int.from_bytes(row[DIGEST_BYTES:HEAD_AT], "little")
