"""Writes large files around the page cache, several at a time, in threads of its own.

Owns how the bytes get into one new file: not its name, not when it is durable. A file that is written once and hardly
ever read gains nothing from the page cache, and filling that costs many times what the disk costs. Where the file
system knows no way around it, files are written through it, and the log says so.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from broker.protocol.frames import Frame

logger = logging.getLogger(__name__)

WRITE_THREADS: Final = 4
DIRECT_BYTES: Final = 256 << 10  # smaller files go through the page cache
PIECE_BYTES: Final = 1 << 20  # of memory that each thread has for good
ALIGNMENT: Final = 4096  # of memory, length and place in the file, as a write around the page cache must have it


class BlobWriter:
    """The threads. `write` is for one thread, like the store that it belongs to."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="blob")
        self._local = threading.local()

    def close(self) -> None:
        """End the threads, after what they have begun."""
        self._pool.shutdown()

    def write(self, path: Path, frames: Sequence[Frame]) -> Future[int]:
        """Begin to write the frames, one after the other, to a new file. They must not change until that has ended.

        The result is the file's descriptor, which the caller closes; or OSError, and there is no file."""
        return self._pool.submit(self._write, path, frames)

    def _write(self, path: Path, frames: Sequence[Frame]) -> int:
        descriptor, direct = _open(path, sum(map(len, frames)) >= DIRECT_BYTES)
        try:
            if direct:
                for piece in _pieces(frames, self._buffer()):
                    _write_direct(descriptor, piece)
            else:
                for frame in frames:
                    _write_plain(descriptor, memoryview(frame).cast("B"))
        except BaseException:
            os.close(descriptor)
            path.unlink()
            raise
        return descriptor

    def _buffer(self) -> mmap.mmap:
        """This thread's memory, aligned to a page."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = mmap.mmap(-1, PIECE_BYTES)
        buffer: mmap.mmap = self._local.buffer
        return buffer


def _open(path: Path, large: bool) -> tuple[int, bool]:
    """A new file, and whether it is written around the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    if large:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o644), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without O_DIRECT says
                raise
            _say_that_it_is_slower("the file system has no O_DIRECT")
    return os.open(path, flags, 0o644), False


@functools.cache  # once a process for each reason
def _say_that_it_is_slower(reason: str) -> None:
    logger.warning("large blobs pass through the page cache, which is slower reason=%r", reason)


def _pieces(frames: Sequence[Frame], buffer: mmap.mmap) -> Iterator[memoryview]:
    """The bytes of the frames in the buffer, as much of them at a time as it holds."""
    # numpy lets the other threads run while it copies.
    piece_N, filled = np.frombuffer(buffer, np.uint8), 0
    for frame in filter(len, frames):
        rest_N = np.frombuffer(frame, np.uint8)
        while rest_N.size:
            num = min(rest_N.size, piece_N.size - filled)
            piece_N[filled : filled + num] = rest_N[:num]
            rest_N, filled = rest_N[num:], filled + num
            if filled == piece_N.size:
                yield piece_N.data
                filled = 0
    if filled:
        yield piece_N[:filled].data


def _write_direct(descriptor: int, piece: memoryview) -> None:
    """Write a piece. Its end, if that fills no page, and what a nearly full disk has not taken go the plain way, and so
    does whatever follows."""
    whole, num = piece[: len(piece) // ALIGNMENT * ALIGNMENT], 0
    if whole:
        try:
            num = os.write(descriptor, whole)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _say_that_it_is_slower(f"the file system wants another alignment than {ALIGNMENT} bytes")
    if num < len(piece):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
        _write_plain(descriptor, piece[num:])


def _write_plain(descriptor: int, rest: memoryview) -> None:
    while rest:
        rest = rest[os.write(descriptor, rest) :]
