"""The durable store of tickets, trajectories and learner sessions: an LMDB file, one writer, group commit.

Everything written between two `commit` calls becomes durable together, or not at all. Owns the order in which the
tables are written, the counters, and what happens on a full disk; never decides anything: it carries out the ledger's
journal actions and answers what became of an ended ticket. What is not written: leases and assignments, which peers
name again when they reconnect (see `ledger.events.Restored`). The trajectories are in the hands of `parcels.py`.
What is held in memory besides is taken from the file again after every rollback.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NoReturn

import lmdb
import msgspec

from broker.ledger.events import (
    EndedRow,
    JournalAttempt,
    JournalEnds,
    JournalPartial,
    JournalPurge,
    JournalRecall,
    JournalResults,
    JournalTickets,
    Restored,
    Settled,
)
from broker.ledger.letters import PURGED
from broker.protocol.commands import TicketState
from broker.protocol.frames import Frame, Message
from broker.protocol.trajectory import Mode
from broker.store.database import Database
from broker.store.datafile import DAMAGE, unusable
from broker.store.parcels import Parcels, Place
from broker.store.room import RESERVE_BYTES, Refused, Room
from broker.store.rows import COUNTERS_KEY, Counters, decode_counters, encode, number, pack_key
from broker.store.tickets import EndedTickets, LiveTickets

SYNC_INTERVAL_S: Final = 1.0
KEEP_SESSIONS: Final = 1024  # newest learner sessions remembered
PROBE_BYTES: Final = 65_536
FULL_BATCH: Final = 128  # ends in one commit of a full store: some 400 pages, a fifth of the reserve
_PROBE_KEY: Final = b"probe"

JournalAction = (
    JournalTickets | JournalResults | JournalPartial | JournalAttempt | JournalEnds | JournalRecall | JournalPurge
)


class StoreFullError(Exception):
    """The store refuses writes: no space, or an I/O error. The open transaction has been rolled back."""


class Journal:
    """The store in `directory`. Single-threaded. Raises ErgonError where it is another run's or not a store at all, and
    from any call that finds it damaged.

    `fsync` "always": `commit` returns when the disk has it. "interval": the caller calls `sync` every SYNC_INTERVAL_S.
    `max_bytes` bounds the data file; None for no bound to speak of. A parcel whose arrays have more than `blob_bytes`
    in all has them in a file of its own. The newest `keep_ended` ended tickets are remembered.
    """

    def __init__(
        self,
        directory: Path,
        run_id: str,
        fsync: Literal["always", "interval"] = "always",
        max_bytes: int | None = None,
        blob_bytes: int = 64 << 10,
        keep_ended: int = 1_000_000,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._always = fsync == "always"
        self._db = Database(directory, run_id, self._always, max_bytes)
        self.path = self._db.path
        self._tickets, self._ended = LiveTickets(self._db), EndedTickets(self._db, keep_ended)
        self._grew = self._unsynced = False  # the open transaction; the last commits
        self._refused = Refused()
        try:
            self._parcels = Parcels(self._db, directory / "blobs", self._always, blob_bytes)
            self._reload()
            self._parcels.open_blobs()
            self._room = Room(directory, self._db)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the store; what was not committed is discarded."""
        self._parcels.close()
        self._db.close()

    @property
    def reserved(self) -> bool:
        """Whether there is room to go on; False only on a disk that is full already."""
        return self._room.held

    @property
    def free_bytes(self) -> int:
        """Room that is left: on the disk, and within the files of the store."""
        return self._room.free_bytes + self._parcels.free_blob_bytes

    def _reload(self) -> None:
        """Take over what is committed."""
        with self._db.read() as transaction:
            packed = transaction.get(COUNTERS_KEY, db=self._db.tables.meta)
            rows = [(key, value) for key, value in transaction.cursor(db=self._db.tables.sessions)]
        try:
            self._counters = Counters() if packed is None else decode_counters(packed)
            self._sessions = {session.decode(): number(lineage) for lineage, session in rows}
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise unusable(self.path, f"its counters and sessions cannot be read: {error}") from error
        self._lineage = max(self._sessions.values(), default=0)
        self._tickets.reload()
        self._parcels.reload(self._counters.parcel, self._tickets.counts())

    # --- writing

    def apply(self, action: JournalAction, frames: Sequence[Frame] = ()) -> None:
        """Write one action into the open transaction. `frames`: the message whose trajectories a JournalResults stores,
        or the partial of a JournalPartial; they must not change until the commit has ended. Raises StoreFullError.

        While the disk is full, ends are committed at once and a few at a time: the reserve is small, and what the first
        ones free serves the next."""
        try:
            match action:
                case JournalTickets(rows) if rows:
                    self._grew = True
                    self._tickets.add(rows)
                    self._seen(max(seq for seq, _ in rows))
                case JournalResults(_, rows) if rows:
                    self._grew = True
                    self._parcels.put(action.source, rows, frames)
                    self._seen(max(row.result_seq for row in rows))
                case JournalPartial():
                    self._partial(action, frames)
                case JournalEnds(rows) if self.reserved:
                    self._end(rows)
                case JournalEnds(rows):
                    for start in range(0, len(rows), FULL_BATCH):
                        self._end(rows[start : start + FULL_BATCH])
                        self.commit()
                case JournalAttempt():
                    self._tickets.attempt(action)
                    self._parcels.drop_partial(action.ticket_id)
                    self._seen(action.result_seq)
                case JournalRecall(seq, ticket_id):
                    self._parcels.drop(ticket_id)
                    self._tickets.recall(seq, self._parcels.last)
                case JournalPurge(seq, _, error):
                    self._tickets.purge(seq, PURGED, error)
        except (lmdb.Error, OSError) as error:
            self._rollback(error)

    def _seen(self, seq: int) -> None:
        self._counters.next_seq = max(self._counters.next_seq, seq + 1)

    def _partial(self, action: JournalPartial, frames: Sequence[Frame]) -> None:
        if action.lost:
            self._parcels.drop_partial(action.ticket_id)
        else:
            self._grew = True
            self._parcels.put_partial(action.seq, action.ticket_id, frames)

    def _end(self, rows: Sequence[EndedRow]) -> None:
        if not rows:
            return
        drop, source_of, ended = self._parcels.drop, self._tickets.source, []
        for row in rows:
            source = drop(row.ticket_id)
            self._parcels.drop_partial(row.ticket_id)
            ended.append((row.ticket_id, row.state, source_of(row.seq) if source is None else source))
        self._tickets.remove(rows)
        self._counters.end = self._ended.add(ended, self._counters.end)
        for (state, mode), num in Counter((row.state, row.mode) for row in rows).items():
            ends = self._counters.ends.setdefault(state.value, {})
            ends[mode.value] = ends.get(mode.value, 0) + num

    def lineage(self, session: str) -> int:
        """The lineage of this learner session: the stored one, or the next number of the durable counter. Raises
        StoreFullError."""
        if session not in self._sessions:
            self._lineage += 1
            self._sessions[session] = self._lineage
            self._sessions = {key: num for key, num in self._sessions.items() if num > self._lineage - KEEP_SESSIONS}
            try:
                table = self._db.tables.sessions
                self._db.write.put(pack_key(self._lineage), session.encode(), db=table)
                if self._lineage > KEEP_SESSIONS:
                    self._db.write.delete(pack_key(self._lineage - KEEP_SESSIONS), db=table)
            except lmdb.Error as error:
                self._rollback(error)
        return self._sessions[session]

    def commit(self) -> bool:
        """Make durable what was written since the last call; whether there was anything. Raises StoreFullError."""
        if not self.prepare():
            return False
        try:
            self.flush()
        except (lmdb.Error, OSError) as error:
            self.fail(error)
        self.finish()
        return True

    def prepare(self) -> bool:
        """The first of the three parts of a commit, of which the second may run in another thread: `flush`, and then
        `finish`, or `fail` where `flush` raised. In between nothing may be written; what is read is what was durable
        before. False where there is nothing to commit. Raises StoreFullError."""
        if not self._db.open:
            return False
        try:
            if self.reserved:
                self._ended.trim(self._counters.end)
            self._parcels.delete_orphans()
            self._counters.parcel = self._parcels.last
            self._db.write.put(COUNTERS_KEY, encode(self._counters), db=self._db.tables.meta)
            if self._grew:
                self._room.spare()
            self._db.close_transaction()
        except (lmdb.Error, OSError) as error:
            self._rollback(error)
        return True

    def flush(self) -> None:
        """Wait for the disk. Raises lmdb.Error or OSError."""
        self._parcels.settle()  # before the commit: a row never names a file that is not there
        self._db.flush()

    def finish(self) -> None:
        """What was prepared is durable."""
        self._grew, self._unsynced = False, True
        self._parcels.committed()
        if self._always:
            self._parcels.collect()

    def fail(self, error: Exception) -> NoReturn:
        """What was prepared could not be made durable. Raises StoreFullError, or what is no matter of room."""
        if not isinstance(error, lmdb.Error | OSError):
            raise error
        self._rollback(error)

    def _rollback(self, error: Exception) -> NoReturn:
        self._grew = False
        self._db.abort()
        if isinstance(error, DAMAGE):
            raise unusable(self.path, error) from error
        parcels = self._parcels
        self._refused.add(parcels.tried_bytes, parcels.tried_blob_bytes, parcels.tried_row_bytes)
        self._room.release()
        self._db.reopen(RESERVE_BYTES)  # also where a failed sync has made LMDB refuse everything
        self._reload()
        parcels.rolled_back()
        # LMDB calls a write that a full disk cut short an input/output error.
        num_free = shutil.disk_usage(self.path.parent).free
        raise StoreFullError(f"{self.path}: {error}; its disk has {num_free} bytes free") from error

    # --- the disk

    def probe(self) -> None:
        """Raise StoreFullError unless the store takes writes again, as large ones as those that it refused last."""
        self._parcels.give_back()
        try:
            self._room.regain(self._refused)
        except OSError as error:  # whatever is left of the reserve stays with the acks
            raise StoreFullError(f"{self.path}: {error}") from error
        try:
            self._db.reopen()
            value = bytes(max(PROBE_BYTES, self._refused.largest_row_bytes))
            self._db.write.put(_PROBE_KEY, value, db=self._db.tables.meta)
            self._db.commit()
            self._db.write.delete(_PROBE_KEY, db=self._db.tables.meta)
            self._db.commit()
        except (lmdb.Error, OSError) as error:
            self._rollback(error)
        self._refused = Refused()

    def sync(self) -> None:
        """With fsync "interval": make durable what has been committed, blobs before the rows that name them. Raises
        StoreFullError."""
        if self._always or not self._unsynced:
            return
        try:
            self._parcels.sync()
            self._db.sync()
        except (lmdb.Error, OSError) as error:
            self._rollback(error)
        self._unsynced = False
        self._parcels.collect()  # not before: a lost ack must find its result

    # --- reading

    def settled(self, ticket_id: str) -> Settled | None:
        """How a ticket that is not live ended, or None for an unknown or long forgotten one."""
        return self._ended.settled(ticket_id)

    def settled_ids(self, ticket_ids: Iterable[str]) -> frozenset[str]:
        """Those of the ids that have ended and are remembered."""
        return self._ended.settled_ids(ticket_ids)

    def place(self, ticket_id: str) -> Place | None:
        """Where a live ticket's result lies; None where it has none."""
        return self._parcels.place(ticket_id)

    def partial(self, ticket_id: str) -> int | None:
        """The parcel that holds a live ticket's partial; None where it has none."""
        return self._parcels.partial(ticket_id)

    def load(self, parcel: int) -> Message:
        """The stored TRAJECTORY of the results in this parcel, or the HANDOVER of a partial, its arrays views of one
        buffer or file.

        Raises DamagedError where it is not what was written.
        """
        return self._parcels.load(parcel)

    def live(self) -> Iterator[Restored]:
        """Every live ticket, in the order of issue."""
        return self._tickets.live(self._parcels.taken(self._tickets.counts()), self._parcels.partials())

    def ended(self) -> dict[tuple[TicketState, Mode], int]:
        """Number of ended tickets by state and mode, forgotten ones included."""
        ends = self._counters.ends
        return {(TicketState(state), Mode(mode)): num for state in ends for mode, num in ends[state].items()}

    def next_seq(self) -> int:
        """A number above every seq and result_seq in use."""
        return self._counters.next_seq
