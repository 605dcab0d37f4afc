"""The durable store of tickets, results and learner sessions: a SQLite file in WAL mode, one writer, group commit.

Everything written between two `commit` calls becomes durable together, or not at all. Owns what is written and read;
never decides anything: it carries out the ledger's journal actions and answers what became of an ended ticket. What is
not written: leases and assignments, which peers name again when they reconnect (see `ledger.events.Restored`). The
trajectories are in the hands of `results.py`. Of the ended tickets the newest keep a row, for audit and for refusing a
second life; their trajectories are deleted.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NoReturn

import msgpack

from broker.ledger.events import (
    JournalAttempt,
    JournalEnd,
    JournalPurge,
    JournalRecall,
    JournalResult,
    JournalTicket,
    Restored,
    Settled,
)
from broker.ledger.letters import PURGED
from broker.protocol.commands import TicketState
from broker.protocol.frames import Frame, Message
from broker.protocol.trajectory import Mode, Ticket
from broker.store.database import FILE_NAME, RESERVE_BYTES, Reserve, open_database
from broker.store.results import Results

log = logging.getLogger(__name__)

SYNC_INTERVAL_S: Final = 1.0
KEEP_SESSIONS: Final = 1024  # newest learner sessions remembered
TRIM_BATCH: Final = 2048  # rows of ended tickets forgotten in one commit at most
VACUUM_PAGES: Final = 2048  # pages (of 4 KiB) given back to the file system in one `compact` at most

JournalAction = JournalTicket | JournalResult | JournalAttempt | JournalEnd | JournalRecall | JournalPurge


class StoreFullError(Exception):
    """The store refuses writes: no space, or an I/O error. The open transaction has been rolled back."""


class Journal:
    """The store in `directory`. Single-threaded. Raises ErgonError where it is another run's or not a store at all.

    `fsync` "always": `commit` returns when the disk has it. "interval": the caller calls `sync` every SYNC_INTERVAL_S.
    `max_pages` bounds the database, in pages of 4 KiB; None for no bound. A result whose arrays have more than
    `blob_bytes` in all is stored in a file of its own. The newest `keep_ended` ended tickets are remembered.
    """

    def __init__(
        self,
        directory: Path,
        run_id: str,
        fsync: Literal["always", "interval"] = "always",
        max_pages: int | None = None,
        blob_bytes: int = 65_536,
        keep_ended: int = 1_000_000,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / FILE_NAME
        self._always = fsync == "always"
        self._keep_ended = keep_ended
        self._db = open_database(self.path, run_id, self._always, max_pages)
        self._results = Results(self._db, directory / "blobs", self._always, blob_bytes, self._write)
        self._reserve = Reserve(directory)
        self._ends: Counter[tuple[str, str]] = Counter()  # by state and mode, in the open transaction
        self._open = False
        self._needed_bytes = 0  # of blobs, in the transactions that found the disk full
        self._next_seq, self._end_seq = self._counters()
        try:
            self._reserve.hold()
        except OSError as error:
            log.error("No room for the store's reserve. store=%s error=%s", self.path, error)

    def close(self) -> None:
        """Close the store; what was not committed is discarded."""
        self._results.close()
        self._db.close()

    @property
    def reserved(self) -> bool:
        """Whether there is room to go on; False only on a disk that is full already."""
        return self._reserve.held

    # --- writing

    def apply(self, action: JournalAction, frames: Sequence[Frame] = ()) -> None:
        """Write one action into the open transaction. `frames`: the message whose trajectory a JournalResult stores."""
        match action:
            case JournalTicket(seq, ticket):
                packed = msgpack.packb(ticket.model_dump(mode="json"))
                self._write(
                    "INSERT INTO tickets (ticket_id, seq, mode, state, ticket, attempt) VALUES (?, ?, ?, ?, ?, ?)",
                    (ticket.ticket_id, seq, ticket.mode.value, "issued", packed, ticket.attempt),
                )
                self._next_seq = max(self._next_seq, seq + 1)
            case JournalResult(seq, ticket_id, source):
                try:
                    self._results.put(ticket_id, frames)
                except OSError as error:
                    self._rollback(error)
                self._write(
                    "UPDATE tickets SET state = 'delivered', result_seq = ?, source = ? WHERE ticket_id = ?",
                    (seq, source, ticket_id),
                )
                self._next_seq = max(self._next_seq, seq + 1)
            case JournalAttempt(ticket_id, attempt, error, dead, seq):
                self._write(
                    "UPDATE tickets SET state = ?, attempt = ?, error = ?, result_seq = ? WHERE ticket_id = ?",
                    ("dead" if dead else "issued", attempt, error, seq, ticket_id),
                )
                self._next_seq = max(self._next_seq, seq + 1)
            case JournalRecall(ticket_id):
                self._results.drop(ticket_id)
                self._write(
                    "UPDATE tickets SET state = 'issued', result_seq = 0, source = '' WHERE ticket_id = ?", (ticket_id,)
                )
            case JournalPurge(ticket_id, error):
                self._write("UPDATE tickets SET source = ?, error = ? WHERE ticket_id = ?", (PURGED, error, ticket_id))
            case JournalEnd(ticket_id, state):
                self._end(ticket_id, state)

    def _end(self, ticket_id: str, state: TicketState) -> None:
        self._results.drop(ticket_id)
        self._end_seq += 1
        rows = self._write(
            "UPDATE tickets SET state = ?, ticket = NULL, ended = ?, end_seq = ? WHERE ticket_id = ? RETURNING mode",
            (state.value, time.time(), self._end_seq, ticket_id),
        )
        self._ends.update((state.value, mode) for (mode,) in rows)

    def lineage(self, session: str) -> int:
        """The lineage of this learner session: the stored one, or the next number of the durable counter."""
        row = self._db.execute("SELECT lineage FROM sessions WHERE session = ?", (session,)).fetchone()
        if row is None:
            lineage = int(self._db.execute("SELECT COALESCE(MAX(lineage), 0) FROM sessions").fetchone()[0]) + 1
            self._write("INSERT INTO sessions VALUES (?, ?)", (session, lineage))
            self._write("DELETE FROM sessions WHERE lineage <= ?", (lineage - KEEP_SESSIONS,))
            return lineage
        return int(row[0])

    def _write(self, statement: str, parameters: tuple[object, ...]) -> sqlite3.Cursor:
        try:
            if not self._open:
                self._db.execute("BEGIN IMMEDIATE")
                self._open = True
            return self._db.execute(statement, parameters)
        except sqlite3.OperationalError as error:
            self._rollback(error)

    def commit(self) -> bool:
        """Make durable what was written since the last call; whether there was anything. Raises StoreFullError."""
        if not self._open:
            return False
        self._write("UPDATE meta SET value = ? WHERE key = 'next_seq'", (str(self._next_seq),))
        for (state, mode), num in self._ends.items():
            self._write(
                "INSERT INTO ends VALUES (?, ?, ?) ON CONFLICT (state, mode) DO UPDATE SET num = num + excluded.num",
                (state, mode, num),
            )
        self._ends.clear()
        self._trim()
        try:
            self._results.settle()  # first: a row never names a file that is not there
            self._db.execute("COMMIT")
        except (sqlite3.OperationalError, OSError) as error:
            self._rollback(error)
        self._open = False
        self._results.committed()
        if self._always:
            self._results.collect()
        return True

    def _rollback(self, error: Exception) -> NoReturn:
        self._open = False
        self._ends.clear()
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._needed_bytes = max(self._needed_bytes, self._results.tried_bytes)
        self._results.rolled_back()
        self._next_seq, self._end_seq = self._counters()
        self._reserve.release()
        raise StoreFullError(f"{self.path}: {error}") from error

    def _trim(self) -> None:
        """Forget the oldest ended tickets beyond `keep_ended`, a batch at a time."""
        bound = self._end_seq - self._keep_ended
        if bound <= 0:
            return
        oldest = self._db.execute("SELECT MIN(end_seq) FROM tickets WHERE end_seq IS NOT NULL").fetchone()[0]
        if oldest is not None and oldest <= bound:
            self._write("DELETE FROM tickets WHERE end_seq <= ?", (min(bound, oldest + TRIM_BATCH - 1),))

    # --- the disk

    def probe(self) -> None:
        """Raise StoreFullError unless the store takes writes again, as large ones as those that it refused last."""
        needed_bytes = self._needed_bytes + (0 if self._reserve.held else RESERVE_BYTES)
        free_bytes = shutil.disk_usage(self.path.parent).free
        if free_bytes < needed_bytes:  # the reserve stays with the acks until there is room for all
            raise StoreFullError(f"{self.path}: {needed_bytes} bytes are needed, {free_bytes} are free")
        try:
            self._reserve.hold()
        except OSError as error:
            raise StoreFullError(f"{self.path}: {error}") from error
        self._write("INSERT INTO results VALUES ('', ?, x'', x'', NULL)", (bytes(65_536),))
        self._write("DELETE FROM results WHERE ticket_id = ''", ())
        self.commit()
        self._needed_bytes = 0

    def sync(self) -> None:
        """With fsync "interval": make durable what has been committed, blobs before the rows that name them."""
        if self._always:
            return
        wal = self.path.with_name(self.path.name + "-wal")
        self._results.sync()
        if wal.exists():
            descriptor = os.open(wal, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._results.collect()  # not before: a lost ack must find its result

    def compact(self) -> int:
        """Give free pages of the database back to the file system, a batch at a time; returns how many were free."""
        free_pages = int(self._db.execute("PRAGMA freelist_count").fetchone()[0])
        num_pages = int(self._db.execute("PRAGMA page_count").fetchone()[0])
        # What was freed will be used again soon: only a file that is mostly air is cut.
        if not self._open and free_pages > VACUUM_PAGES and free_pages > num_pages // 2:
            try:
                self._db.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES:d})").fetchall()
            except sqlite3.OperationalError as error:
                self._rollback(error)
        return free_pages

    # --- reading

    def settled(self, ticket_id: str) -> Settled | None:
        """How a ticket that is not live ended, or None for an unknown or long forgotten one."""
        row = self._db.execute("SELECT state, source FROM tickets WHERE ticket_id = ?", (ticket_id,)).fetchone()
        return None if row is None else Settled(TicketState(row[0]), row[1])

    def settled_ids(self, ticket_ids: Iterable[str]) -> frozenset[str]:
        """Those of the ids that the journal has seen."""
        return frozenset(key for key in ticket_ids if self.settled(key) is not None)

    def load(self, ticket_id: str) -> Message | None:
        """The stored TRAJECTORY of a ticket, its arrays views of one buffer or file; None where the ticket has ended.

        Raises DamagedError where it is not what was written.
        """
        return self._results.load(ticket_id)

    def live(self) -> Iterator[Restored]:
        """Every live ticket, in the order of issue."""
        rows = self._db.execute(
            "SELECT seq, ticket, state, attempt, result_seq, source, error FROM tickets"
            " WHERE end_seq IS NULL ORDER BY seq"
        )
        for seq, packed, state, attempt, result_seq, source, error in rows:
            ticket = Ticket.model_validate(msgpack.unpackb(packed) | {"attempt": attempt})
            yield Restored(seq, ticket, TicketState(state), result_seq, source, error)

    def ended(self) -> dict[tuple[TicketState, Mode], int]:
        """Number of ended tickets by state and mode, forgotten ones included."""
        rows = self._db.execute("SELECT state, mode, num FROM ends")
        return {(TicketState(state), Mode(mode)): num for state, mode, num in rows}

    def next_seq(self) -> int:
        """A number above every seq and result_seq in use."""
        return self._next_seq

    def _counters(self) -> tuple[int, int]:
        """The next free seq, and the number of the last end."""
        next_seq = self._db.execute("SELECT value FROM meta WHERE key = 'next_seq'").fetchone()[0]
        end_seq = self._db.execute("SELECT MAX(end_seq) FROM tickets WHERE end_seq IS NOT NULL").fetchone()[0]
        return int(next_seq), int(end_seq or 0)
