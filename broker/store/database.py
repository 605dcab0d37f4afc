"""The journal's LMDB environment: its lock, its identity, its tables, its transactions.

Owns how the store is opened and refused: another run's, another format's, in use, or damaged. Never writes a ticket:
`journal.py` and the rooms it is made of do. One process has the store: LMDB's own lock file, which would let several
in, is not used, and so a killed process leaves nothing to clear away.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import lmdb

from broker.process.lifecycle import ErgonError
from broker.store.datafile import DAMAGE, FILE_NAME, LIB_VERSION, check, make, refuse_old, rewrite, sound, unusable

log = logging.getLogger(__name__)

FORMAT: Final = 4
LOCK_NAME: Final = "lock"
MAP_BYTES: Final = 256 << 30  # of addresses: neither memory nor disk is reserved
COMPACT_BYTES: Final = 64 << 20  # a smaller file is not worth rewriting at the start


class Tables(NamedTuple):
    """The handles of LMDB's named databases; see `rows.py` for what is in them."""

    meta: Any
    sessions: Any
    tickets: Any
    states: Any
    parcels: Any
    ended: Any
    past: Any


class Database:
    """The store's file in `directory`, made where there is none, locked for this process.

    `metasync`: every commit is on the disk when it returns; else it may be forgotten in a power cut until the next
    commit or `sync`, and the store is whole all the same. `max_bytes` bounds the file; None for MAP_BYTES. Raises
    ErgonError.
    """

    def __init__(self, directory: Path, run_id: str, metasync: bool, max_bytes: int | None) -> None:
        self.path = directory / FILE_NAME
        self._metasync, self.max_bytes = metasync, max_bytes or MAP_BYTES
        self._transaction: lmdb.Transaction[bytes] | None = None
        self._closed: lmdb.Transaction[bytes] | None = None  # and not yet durable
        self._environment: Any = None
        self._lock = _lock(directory)
        try:
            refuse_old(directory)
            if not self.path.exists():
                self._make(run_id)
            self.reopen()
            self._check_identity(run_id)
            self.shrink(COMPACT_BYTES)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Discard the open transaction, close the file and give it free."""
        self._close_environment()
        os.close(self._lock)

    def reopen(self, spare_bytes: int = 0) -> None:
        """Open the file, anew where it is open, to grow to `max_bytes` and `spare_bytes`. Raises ErgonError."""
        self._close_environment()
        check(self.path)
        map_bytes = self.max_bytes + spare_bytes
        try:
            # Not writemap: a write to a hole of a full disk would be a signal. Not readahead: pages are read singly.
            self._environment = lmdb.Environment(
                str(self.path),
                map_size=map_bytes,
                subdir=False,
                metasync=self._metasync,
                readahead=False,
                create=False,
                lock=False,
                max_dbs=len(Tables._fields),
                lib_version=LIB_VERSION,
            )
        except lmdb.MemoryError as error:
            raise ErgonError(
                f"{map_bytes >> 30} GiB of addresses for a map of the broker's store {self.path} were refused "
                f"({error}); lift the limit on the address space of the broker (ulimit -v unlimited, RLIMIT_AS)"
            ) from error
        except lmdb.Error as error:
            raise unusable(self.path, error) from error
        try:
            self.tables = Tables(*(self._environment.open_db(name.encode(), create=False) for name in Tables._fields))
        except lmdb.Error as error:
            raise unusable(self.path, error) from error

    def _close_environment(self) -> None:
        self.abort()
        environment, self._environment = self._environment, None
        if environment is not None:
            environment.close()

    def _make(self, run_id: str) -> None:
        def fill(environment: lmdb.Environment) -> None:
            tables = {name: environment.open_db(name.encode()) for name in Tables._fields}
            with environment.begin(write=True) as transaction:
                for key, value in (("format", str(FORMAT)), ("run_id", run_id)):
                    transaction.put(key.encode(), value.encode(), db=tables["meta"])

        try:
            make(self.path, fill)
        except (lmdb.Error, OSError) as error:
            raise ErgonError(
                f"the broker's store {self.path} cannot be made ({error}); make room on its disk, and let it be written"
            ) from error

    def _check_identity(self, run_id: str) -> None:
        for key, value in (("format", str(FORMAT)), ("run_id", run_id)):
            with self.read() as transaction:
                found = (transaction.get(key.encode(), b"", db=self.tables.meta)).decode(errors="replace")
            if found != value:
                raise ErgonError(
                    f"the broker's store {self.path} has {key} {found!r}, not {value!r}; give the run another name"
                )

    # --- transactions

    @property
    def open(self) -> bool:
        """Whether something was written since the last commit."""
        return self._transaction is not None

    @property
    def write(self) -> Any:
        """The open transaction, begun where there is none. Raises lmdb.Error."""
        if self._transaction is None:
            assert self._closed is None, "nothing is written beside a commit"
            self._transaction = self._environment.begin(write=True)
        return self._transaction

    @contextlib.contextmanager
    def read(self, views: bool = False) -> Iterator[Any]:
        """The open transaction, or one for reading. What it gives out are copies or, with `views` where none is open,
        views that end with it. Raises ErgonError."""
        with sound(self.path):
            if self._transaction is not None:
                yield self._transaction
                return
            with self._environment.begin(None, None, False, views) as transaction:
                yield transaction

    def commit(self) -> None:
        """End the open transaction. Raises lmdb.Error; then `abort` is due."""
        self.close_transaction()
        self.flush()

    def close_transaction(self) -> None:
        """The open transaction is complete: `flush` makes it durable. Until that has returned, `read` gives what was
        committed before, and nothing may be written."""
        assert self._closed is None, "a transaction at a time"
        self._closed, self._transaction = self._transaction, None

    def flush(self) -> None:
        """Make the closed transaction durable; from any thread. Raises lmdb.Error; then `abort` is due."""
        if self._closed is not None:
            self._closed.commit()
            self._closed = None

    def abort(self) -> None:
        """Forget what was written since the last commit."""
        transactions, self._transaction, self._closed = (self._transaction, self._closed), None, None
        for transaction in transactions:
            if transaction is not None:
                transaction.abort()

    def sync(self) -> None:
        """Make the last commit durable. Raises lmdb.Error."""
        self._environment.sync(True)

    # --- room

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that hold something."""
        with self.read() as transaction:
            stats = [transaction.stat(db=table) for table in self.tables]
            pages = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in stats)
        return int(pages * stats[0]["psize"])

    @property
    def file_bytes(self) -> int:
        """Bytes of all pages, free ones included."""
        return int((self._environment.info()["last_pgno"] + 1) * self._environment.stat()["psize"])

    def shrink(self, least_bytes: int) -> bool:
        """Give free pages back to the file system, where more than half of the file and `least_bytes` are free; whether
        it was done. The file is rewritten: to be called where nothing waits."""
        used_bytes, file_bytes = self.used_bytes, self.file_bytes
        free_bytes = file_bytes - used_bytes
        if self.open or free_bytes <= max(least_bytes, file_bytes // 2):
            return False
        if shutil.disk_usage(self.path.parent).free < used_bytes:
            log.warning("No room to rewrite the store. store=%s used_bytes=%d", self.path, used_bytes)
            return False
        try:
            rewrite(self.path, self._environment)
        except DAMAGE as error:
            raise unusable(self.path, error) from error
        except (lmdb.Error, OSError) as error:
            log.warning("The store could not be rewritten and stays as it is. store=%s error=%s", self.path, error)
            return False
        self.reopen()
        log.info("The store was rewritten. store=%s mb=%d before_mb=%d", self.path, used_bytes >> 20, file_bytes >> 20)
        return True


def _lock(directory: Path) -> int:
    """The lock on a store; it is the process's own, and goes with it. Raises ErgonError."""
    path = directory / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ErgonError(
            f"the broker's store {directory} is locked by another process ({error.strerror}); "
            "end the other broker of this run, or give the run another name"
        ) from error
    return descriptor
