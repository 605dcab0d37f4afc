"""The journal's SQLite file: how it is opened, its format, and the reserve of disk space that lets it shrink when full.

Owns the schema, the pragmas and the refusal of a store that is another run's, another format's or no store. Never
writes a ticket: `journal.py` does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path
from typing import Final

from broker.process.lifecycle import ErgonError

log = logging.getLogger(__name__)

FORMAT: Final = 2
FILE_NAME: Final = "journal.db"
RESERVE_NAME: Final = "reserve"
RESERVE_BYTES: Final = 8 << 20  # two write-ahead logs between checkpoints
LOCK_TIMEOUT_S: Final = 1.0
AUTO_VACUUM_INCREMENTAL: Final = 2
WAL_LIMIT_BYTES: Final = 64 << 20  # a larger write-ahead log is cut back at the next checkpoint
_META: Final = "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS sessions (session TEXT PRIMARY KEY, lineage INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tickets (
    ticket_id TEXT PRIMARY KEY, seq INTEGER NOT NULL, mode TEXT NOT NULL, state TEXT NOT NULL,
    ticket BLOB, attempt INTEGER NOT NULL, result_seq INTEGER NOT NULL DEFAULT 0,
    source TEXT NOT NULL DEFAULT '', error TEXT NOT NULL DEFAULT '', ended REAL, end_seq INTEGER) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS live ON tickets (seq) WHERE end_seq IS NULL;
CREATE INDEX IF NOT EXISTS past ON tickets (end_seq) WHERE end_seq IS NOT NULL;
CREATE TABLE IF NOT EXISTS ends (
    state TEXT NOT NULL, mode TEXT NOT NULL, num INTEGER NOT NULL, PRIMARY KEY (state, mode)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS results (
    ticket_id TEXT PRIMARY KEY, envelope BLOB NOT NULL, arrays BLOB NOT NULL, digest BLOB NOT NULL, blob TEXT);
CREATE INDEX IF NOT EXISTS blobs ON results (blob) WHERE blob IS NOT NULL;
"""


def open_database(path: Path, run_id: str, full_sync: bool, max_pages: int | None) -> sqlite3.Connection:
    """The store's file, made where there is none, locked for this process.

    `full_sync`: every commit is on the disk when it returns. Raises ErgonError where it is another run's or format's,
    in use by another process, or not a store.
    """
    try:
        db = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            _prepare(db, full_sync, max_pages)
            _check_identity(db, path, run_id)
        except BaseException:
            db.close()
            raise
    except sqlite3.DatabaseError as error:
        raise ErgonError(
            f"the broker's store {path} cannot be opened ({error}); "
            "end the other broker of this run, restore the file, or give the run another name"
        ) from error
    return db


def _prepare(db: sqlite3.Connection, full_sync: bool, max_pages: int | None) -> None:
    db.execute("PRAGMA locking_mode=EXCLUSIVE")  # a second broker on the same store is refused at once
    if db.execute("PRAGMA auto_vacuum").fetchone()[0] != AUTO_VACUUM_INCREMENTAL:
        # Before the first table, or without effect. It writes: a store on a full disk must be opened without it.
        db.execute(f"PRAGMA auto_vacuum={AUTO_VACUUM_INCREMENTAL}")
    db.execute("PRAGMA journal_mode=WAL")
    db.execute(f"PRAGMA synchronous={'FULL' if full_sync else 'NORMAL'}")
    db.execute(f"PRAGMA journal_size_limit={WAL_LIMIT_BYTES:d}")
    if max_pages is not None:
        db.execute(f"PRAGMA max_page_count={max_pages:d}")


def _check_identity(db: sqlite3.Connection, path: Path, run_id: str) -> None:
    db.execute(_META)
    db.execute("BEGIN IMMEDIATE")
    for key, value in (("format", str(FORMAT)), ("run_id", run_id)):
        db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))
        found = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0]
        if found != value:
            db.execute("ROLLBACK")
            raise ErgonError(f"the broker's store {path} has {key} {found!r}, not {value!r}; give the run another name")
    db.execute("INSERT OR IGNORE INTO meta VALUES ('next_seq', '1')")
    db.execute("COMMIT")
    db.executescript(_SCHEMA)  # after the check: another format's tables are left as they are


class Reserve:
    """Disk space held back, so that acks, which make room, can still be written when the disk is full."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / RESERVE_NAME

    @property
    def held(self) -> bool:
        """Whether the space is held."""
        return self._path.exists() and self._path.stat().st_size == RESERVE_BYTES

    def release(self) -> None:
        """Give the space to whoever writes next."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
            log.info("The reserve was released. path=%s mb=%d", self._path, RESERVE_BYTES >> 20)

    def hold(self) -> None:
        """Hold the space, if it is not held yet. OSError where there is not enough."""
        if self.held:
            return
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
        except OSError:
            self._path.unlink()
            raise
        finally:
            os.close(descriptor)
