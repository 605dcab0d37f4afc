"""Room on the disk: the reserve that acks live on when it is full, and whether there is enough to go on.

Acks make room, but need some first: LMDB writes a changed page to a free place before the old one is free. So space is
kept that nothing else may take: a file that is deleted when the disk is full or, where the disk has no room for it any
more because the data file has filled it, free pages of the data file. Never writes a row.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Final

from broker.store.database import Database

log = logging.getLogger(__name__)

RESERVE_NAME: Final = "reserve"
RESERVE_BYTES: Final = 8 << 20  # pages that a round of acks may need before those that it frees can be used


class Refused:
    """What a full disk has refused since the last probe that succeeded: at most so many bytes in one commit."""

    def __init__(self) -> None:
        self.num_bytes = self.blob_bytes = self.largest_row_bytes = 0

    def add(self, num_bytes: int, blob_bytes: int, largest_row_bytes: int) -> None:
        """A commit of so many bytes was refused, those in files and the largest row among them."""
        self.num_bytes = max(self.num_bytes, num_bytes)
        self.blob_bytes = max(self.blob_bytes, blob_bytes)
        self.largest_row_bytes = max(self.largest_row_bytes, largest_row_bytes)

    @property
    def rows_bytes(self) -> int:
        """Bytes for the data file."""
        return self.num_bytes - self.blob_bytes


class Room:
    """The room of the store in `directory`, whose data file `db` has."""

    def __init__(self, directory: Path, db: Database) -> None:
        self._db, self._directory = db, directory
        self._path = directory / RESERVE_NAME
        self._in_file = False
        self.held = False
        """Whether a reserve is held, in one way or the other."""
        try:
            self.hold()
        except OSError as error:
            self._in_file = self.held = self._free_pages_bytes() >= RESERVE_BYTES
            log.error("No room for the store's reserve. store=%s error=%s", db.path, error)

    def _has_file(self) -> bool:
        return self._path.exists() and self._path.stat().st_size == RESERVE_BYTES

    @property
    def free_bytes(self) -> int:
        """Bytes that rows can still have: of the disk, and of the free pages of the data file, which never go back to
        the disk while it is open."""
        return shutil.disk_usage(self._directory).free + self._free_pages_bytes()

    def _free_pages_bytes(self) -> int:
        return self._db.file_bytes - self._db.used_bytes

    def release(self) -> None:
        """Give the reserve to whoever writes next."""
        self._in_file = self.held = False
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
            log.info("The reserve was released. path=%s mb=%d", self._path, RESERVE_BYTES >> 20)

    def hold(self) -> None:
        """Hold the reserve as a file, if it is not held yet. OSError where there is not enough room."""
        if not self._has_file():
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            except OSError:
                self._path.unlink()
                raise
            finally:
                os.close(descriptor)
        self._in_file, self.held = False, True

    def spare(self) -> None:
        """Before a commit of new rows. Raises OSError where they take the pages that are kept for acks."""
        if not self._in_file:
            return
        if shutil.disk_usage(self._directory).free >= 2 * RESERVE_BYTES:
            self.hold()
        elif self._free_pages_bytes() < RESERVE_BYTES:
            raise OSError(errno.ENOSPC, "the disk is full, and the free pages of the file are kept for acks")

    def regain(self, refused: Refused) -> None:
        """Hold a reserve beside what was refused. Raises OSError where there is no room for both.

        A data file that fills the disk is rewritten without its free pages if the copy has room.
        """
        self._db.shrink(RESERVE_BYTES)
        num_free = shutil.disk_usage(self._directory).free
        needed = refused.num_bytes + (0 if self._has_file() else RESERVE_BYTES)
        if self._db.used_bytes + refused.rows_bytes > self._db.max_bytes:
            raise OSError(errno.ENOSPC, f"the data file may have {self._db.max_bytes} bytes, and they are in use")
        if num_free >= needed:
            self.hold()
        elif num_free >= refused.blob_bytes and self._free_pages_bytes() >= RESERVE_BYTES + refused.rows_bytes:
            self._in_file = self.held = True
        else:
            raise OSError(errno.ENOSPC, f"{needed} bytes are needed, {num_free} are free")
