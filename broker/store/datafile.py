"""The data file of the store as a file: made, looked at before it is mapped, and rewritten without its free pages.

Owns what must be true of the file before LMDB maps it, because what LMDB finds wrong in a map can end the process: a
page beyond the end of the file is a signal, not an exception. Every new file is written whole under another name, made
durable and renamed, so that no crash leaves half of one. Never reads or writes a row.

What cannot be caught: pages have no checksums (a trajectory has one of its own). Where something else has written into
the middle of the file, LMDB refuses most pages, which is an ErgonError; at some its own assertion ends the process with
SIGABRT, and bytes changed inside a row are found only where that row is checked. A sector that the disk cannot read
ends the process with SIGBUS. `python -m lmdb verify FILE` then says what is wrong, and the file is to be restored.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import lmdb
from lmdb import verify

from broker.process.lifecycle import ErgonError

log = logging.getLogger(__name__)

FILE_NAME: Final = "journal.mdb"
OLD_NAME: Final = "journal.db"  # of the versions that kept the store in SQLite
NEW_SUFFIX: Final = ".new"
SMALL_MAP_BYTES: Final = 1 << 20  # enough for the making of an empty store
LIB_VERSION: Final = 0  # the binding carries two engines; this is that of the format below
NUM_METAS: Final = 2
# A meta page: number, pad, flags, bounds; magic, version, address, map size; two trees, of which the first says the
# page size; the last page in use and the transaction's number.
_META: Final = struct.Struct("<QHHI" + "IIQQ" + "IHHQQQQQ" * 2 + "QQ")
_META_FLAG: Final = 0x08
_MAGIC: Final = 0xBEEFC0DE
_VERSION: Final = 1
_NO_PAGE: Final = (1 << 64) - 1

# What LMDB raises where the file is not what it wrote; everything else that it raises in a write is a lack of room, or
# of a working disk.
DAMAGE: Final = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.PageNotFoundError,
    lmdb.IncompatibleError,
    lmdb.BadDbiError,
    lmdb.BadTxnError,
    lmdb.NotFoundError,
)


class _Meta(NamedTuple):
    page_bytes: int
    roots: tuple[int, int]
    last_page: int
    transaction: int


def unusable(path: Path, reason: object) -> ErgonError:
    """The error of a file that is not the store it should be."""
    return ErgonError(f"the broker's store {path} cannot be used ({reason}); restore it, or give the run another name")


@contextlib.contextmanager
def sound(path: Path) -> Iterator[None]:
    """Raise ErgonError where LMDB cannot read what it wrote."""
    try:
        yield
    except lmdb.Error as error:
        raise unusable(path, error) from error


def refuse_old(directory: Path) -> None:
    """Raise ErgonError for the store of an earlier version."""
    if (path := directory / OLD_NAME).exists():
        raise ErgonError(
            f"the broker's store {path} was written by an earlier version of Ergon, which this one cannot read; "
            "finish the run with that version, or give the run another name"
        )


def make(path: Path, fill: Callable[[lmdb.Environment], None]) -> None:
    """Make the file at `path`, with what `fill` writes into it. OSError or lmdb.Error where the disk takes none."""

    def write(new: Path) -> None:
        with lmdb.Environment(
            str(new),
            map_size=SMALL_MAP_BYTES,
            subdir=False,
            lock=False,
            max_dbs=16,
            mode=0o644,
            lib_version=LIB_VERSION,
        ) as environment:
            fill(environment)

    _replace(path, write)


def rewrite(path: Path, environment: lmdb.Environment) -> None:
    """Put a copy of the file without its free pages in its place; `environment`, which shows the old one, is to be
    closed. OSError or lmdb.Error where the copy has no room: then the old one stays."""

    def write(new: Path) -> None:
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            environment.copyfd(descriptor, compact=True)
        finally:
            os.close(descriptor)

    _replace(path, write)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    new = path.with_name(path.name + NEW_SUFFIX)
    new.unlink(missing_ok=True)  # of a crash
    try:
        write(new)
        _sync(new)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def check(path: Path) -> None:
    """Raise ErgonError unless LMDB can map the file. A damaged tree may still be found later, as one of `DAMAGE`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        meta = _newest(path, descriptor)
        pages = size // meta.page_bytes
        if any(root != _NO_PAGE and not NUM_METAS <= root < pages for root in meta.roots):
            raise unusable(path, f"it is cut short: it has {size} bytes, and not the first page of its tables")
        if meta.last_page >= pages:
            _check_short(path, descriptor, meta, size)
    finally:
        os.close(descriptor)


def _newest(path: Path, descriptor: int) -> _Meta:
    """The newer of the two meta pages, as LMDB chooses it."""
    first = _read_meta(path, descriptor, 0)
    second = _read_meta(path, descriptor, first.page_bytes)
    if second.page_bytes != first.page_bytes:
        raise unusable(path, "its two first pages do not agree")
    return second if first.transaction < second.transaction else first


def _read_meta(path: Path, descriptor: int, offset: int) -> _Meta:
    data = os.pread(descriptor, _META.size, offset)
    if len(data) < _META.size:
        raise unusable(path, f"it is cut short: it has {offset + len(data)} bytes")
    fields = _META.unpack(data)
    flags, magic, version, page_bytes = fields[2], fields[4], fields[5], fields[8]
    if not flags & _META_FLAG or magic != _MAGIC or version != _VERSION:
        raise unusable(path, "it is no LMDB file")
    if not 512 <= page_bytes <= 32_768 or page_bytes & (page_bytes - 1):
        raise unusable(path, f"it has pages of {page_bytes} bytes")
    return _Meta(page_bytes, (fields[15], fields[23]), fields[24], fields[25])


def _check_short(path: Path, descriptor: int, meta: _Meta, size: int) -> None:
    """A file may end before the last page in use where that is a free one: then every page of the trees is looked at.

    Pages that are not there are made, as a hole: what reads beyond the end of a mapped file is killed.
    """
    log.warning("The store is shorter than its pages; all of it is read. store=%s bytes=%d", path, size)
    try:
        problems = verify.verify(str(path), subdir=False)
    except verify.VerifyError as error:
        problems = [str(error)]
    if problems:
        raise unusable(path, f"it is cut short: {problems[0]}")
    try:
        os.ftruncate(descriptor, (meta.last_page + 1) * meta.page_bytes)
    except OSError as error:
        raise unusable(path, f"it cannot be brought to its size: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
