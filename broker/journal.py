"""The durable store of tickets, results and learner sessions: one SQLite file in WAL mode, one writer, group commit.

Everything written between two `commit` calls becomes durable together, or not at all. Owns the file and its format;
never decides anything: it carries out the ledger's journal actions and answers what became of an ended ticket. What is
not written: leases and assignments, which peers name again when they reconnect (see `ledger_types.Restored`). Ended
tickets keep a row with their end and its time, for audit and for refusing a second life; their trajectory is deleted.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import msgpack

from broker.ledger_types import JournalAttempt, JournalEnd, JournalResult, JournalTicket, Restored, Settled
from broker.process.lifecycle import ErgonError
from broker.protocol.commands import TicketState
from broker.protocol.frames import PREAMBLE, Frame, Message, decode
from broker.protocol.trajectory import Mode, Ticket

log = logging.getLogger(__name__)

FORMAT: Final = 1
FILE_NAME: Final = "journal.db"
SYNC_INTERVAL_S: Final = 1.0
LOCK_TIMEOUT_S: Final = 1.0
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sessions (session TEXT PRIMARY KEY, lineage INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tickets (
    ticket_id TEXT PRIMARY KEY, seq INTEGER NOT NULL, mode TEXT NOT NULL, state TEXT NOT NULL,
    ticket BLOB, attempt INTEGER NOT NULL, result_seq INTEGER NOT NULL DEFAULT 0,
    source TEXT NOT NULL DEFAULT '', error TEXT NOT NULL DEFAULT '', ended REAL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS live ON tickets (seq) WHERE ended IS NULL;
CREATE TABLE IF NOT EXISTS results (ticket_id TEXT PRIMARY KEY, envelope BLOB NOT NULL, arrays BLOB NOT NULL);
"""

JournalAction = JournalTicket | JournalResult | JournalAttempt | JournalEnd


class StoreFullError(Exception):
    """The store refuses writes: no space, or an I/O error. The open transaction has been rolled back."""


class Journal:
    """The store in `directory`. Single-threaded. Raises ErgonError where it is another run's or not a store at all.

    `fsync` "always": `commit` returns when the disk has it. "interval": the caller calls `sync` every SYNC_INTERVAL_S.
    `max_pages` bounds the file, in SQLite pages (4 KiB); None for no bound.
    """

    def __init__(
        self,
        directory: Path,
        run_id: str,
        fsync: Literal["always", "interval"] = "always",
        max_pages: int | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / FILE_NAME
        self._always = fsync == "always"
        try:
            self._db = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            self._prepare(run_id, max_pages)
        except sqlite3.DatabaseError as error:
            raise ErgonError(
                f"the broker's store {self.path} cannot be opened ({error}); "
                "end the other broker of this run, restore the file, or give the run another name"
            ) from error
        self._open = False

    def _prepare(self, run_id: str, max_pages: int | None) -> None:
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")  # a second broker on the same store is refused at once
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(f"PRAGMA synchronous={'FULL' if self._always else 'NORMAL'}")
        self._db.execute("PRAGMA journal_size_limit=67108864")
        if max_pages is not None:
            self._db.execute(f"PRAGMA max_page_count={max_pages:d}")
        self._db.executescript(_SCHEMA)
        self._db.execute("BEGIN IMMEDIATE")
        for key, value in (("format", str(FORMAT)), ("run_id", run_id)):
            self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))
            found = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0]
            if found != value:
                self._db.execute("ROLLBACK")
                raise ErgonError(
                    f"the broker's store {self.path} has {key} {found!r}, not {value!r}; give the run another name"
                )
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the store; what was not committed is discarded."""
        self._db.close()

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
            case JournalResult(seq, ticket_id, source):
                arrays = b"".join(frames[2:])
                self._write("INSERT INTO results VALUES (?, ?, ?)", (ticket_id, bytes(frames[1]), arrays))
                self._write(
                    "UPDATE tickets SET state = 'delivered', result_seq = ?, source = ? WHERE ticket_id = ?",
                    (seq, source, ticket_id),
                )
            case JournalAttempt(ticket_id, attempt, error, dead, seq):
                self._write(
                    "UPDATE tickets SET state = ?, attempt = ?, error = ?, result_seq = ? WHERE ticket_id = ?",
                    ("dead" if dead else "issued", attempt, error, seq, ticket_id),
                )
            case JournalEnd(ticket_id, state):
                self._write("DELETE FROM results WHERE ticket_id = ?", (ticket_id,))
                self._write(
                    "UPDATE tickets SET state = ?, ticket = NULL, ended = ? WHERE ticket_id = ?",
                    (state.value, time.time(), ticket_id),
                )

    def lineage(self, session: str) -> int:
        """The lineage of this learner session: the stored one, or the next number of the durable counter."""
        row = self._db.execute("SELECT lineage FROM sessions WHERE session = ?", (session,)).fetchone()
        if row is None:
            highest = self._db.execute("SELECT COALESCE(MAX(lineage), 0) FROM sessions").fetchone()[0]
            self._write("INSERT INTO sessions VALUES (?, ?)", (session, highest + 1))
            return int(highest) + 1
        return int(row[0])

    def _write(self, statement: str, parameters: tuple[object, ...]) -> None:
        try:
            if not self._open:
                self._db.execute("BEGIN IMMEDIATE")
                self._open = True
            self._db.execute(statement, parameters)
        except sqlite3.OperationalError as error:
            self._rollback(error)

    def commit(self) -> bool:
        """Make durable what was written since the last call; whether there was anything. Raises StoreFullError."""
        if not self._open:
            return False
        try:
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self._rollback(error)
        self._open = False
        return True

    def _rollback(self, error: sqlite3.OperationalError) -> None:
        self._open = False
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        raise StoreFullError(f"{self.path}: {error}") from error

    def probe(self) -> None:
        """Write 64 KiB, durably, and take them back. Raises StoreFullError while the store is full."""
        self._write("INSERT INTO results VALUES ('', ?, x'')", (bytes(65_536),))
        self._write("DELETE FROM results WHERE ticket_id = ''", ())
        self.commit()

    def sync(self) -> None:
        """With fsync "interval": make durable what has been committed."""
        wal = self.path.with_name(self.path.name + "-wal")
        if not self._always and wal.exists():
            descriptor = os.open(wal, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    # --- reading

    def settled(self, ticket_id: str) -> Settled | None:
        """How a ticket that is not live ended, or None for an unknown one."""
        row = self._db.execute("SELECT state, source FROM tickets WHERE ticket_id = ?", (ticket_id,)).fetchone()
        return None if row is None else Settled(TicketState(row[0]), row[1])

    def settled_ids(self, ticket_ids: Iterable[str]) -> frozenset[str]:
        """Those of the ids that the journal has seen."""
        return frozenset(key for key in ticket_ids if self.settled(key) is not None)

    def load(self, ticket_id: str) -> Message | None:
        """The stored TRAJECTORY of a ticket, its arrays views of one buffer; None where the ticket has ended."""
        row = self._db.execute("SELECT envelope, arrays FROM results WHERE ticket_id = ?", (ticket_id,)).fetchone()
        if row is None:
            return None
        envelope, arrays = row
        return decode([PREAMBLE, envelope, *_split(envelope, memoryview(arrays))])

    def live(self) -> Iterator[Restored]:
        """Every live ticket, in the order of issue."""
        rows = self._db.execute(
            "SELECT seq, ticket, state, attempt, result_seq, source, error FROM tickets"
            " WHERE ended IS NULL ORDER BY seq"
        )
        for seq, packed, state, attempt, result_seq, source, error in rows:
            ticket = Ticket.model_validate(msgpack.unpackb(packed) | {"attempt": attempt})
            yield Restored(seq, ticket, TicketState(state), result_seq, source, error)

    def ended(self) -> dict[tuple[TicketState, Mode], int]:
        """Number of ended tickets by state and mode."""
        rows = self._db.execute(
            "SELECT state, mode, COUNT(*) FROM tickets WHERE ended IS NOT NULL GROUP BY state, mode"
        )
        return {(TicketState(state), Mode(mode)): num for state, mode, num in rows}

    def next_seq(self) -> int:
        """A number above every seq and result_seq in use."""
        highest = self._db.execute("SELECT MAX(MAX(seq, result_seq)) FROM tickets").fetchone()[0]
        return int(highest or 0) + 1


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
