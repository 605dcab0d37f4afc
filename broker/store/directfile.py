"""Reads and writes places of large files around the page cache.

Owns how the bytes get there: not where that is, and not when it is durable. What is written once and hardly ever read
gains nothing from the page cache, and filling that costs many times what the disk costs. Where the file system knows no
way around it, it is gone through, and the log says so.
"""

from __future__ import annotations

import errno
import functools
import logging
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from broker.protocol.frames import Frame

logger = logging.getLogger(__name__)

PIECE_BYTES: Final = 1 << 20  # copied and written at a time


class DirectWriter:
    """A piece of memory that is aligned as such writes must have it. For one thread at a time."""

    def __init__(self) -> None:
        self._buffer = mmap.mmap(-1, PIECE_BYTES)

    def write(self, descriptor: int, offset: int, frames: Iterable[Frame]) -> None:
        """Write the frames, one after the other, from this offset on. `offset` and the frames' length in all are
        multiples of the alignment. Raises OSError."""
        for piece in self._pieces(frames):
            while piece:
                num = os.pwrite(descriptor, piece, offset)
                if num <= 0:
                    raise OSError(errno.EIO, f"nothing of {len(piece)} bytes was written")
                piece, offset = piece[num:], offset + num

    def _pieces(self, frames: Iterable[Frame]) -> Iterator[memoryview]:
        """The bytes of the frames in the buffer, as much of them at a time as it holds."""
        # numpy lets the other threads run while it copies.
        piece_N, filled = np.frombuffer(self._buffer, np.uint8), 0
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


def open_direct(path: Path, flags: int) -> int:
    """A descriptor of this file that goes around the page cache, if the file system can. Raises OSError."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what a file system without O_DIRECT says
            raise
    _say_that_it_is_slower(path.parent)
    return os.open(path, flags | os.O_CLOEXEC)


@functools.cache  # once a process for each directory
def _say_that_it_is_slower(directory: Path) -> None:
    logger.warning("The file system has no O_DIRECT: large arrays pass through the page cache. path=%s", directory)


def read_direct(descriptor: int, offset: int, padded_bytes: int) -> mmap.mmap:
    """These bytes of the file, in memory of their own; fewer where it ends before. `offset` and `padded_bytes` are
    multiples of the alignment. Raises OSError."""
    memory = mmap.mmap(-1, padded_bytes)
    view, num_read = memoryview(memory), 0
    while num_read < padded_bytes and (num := os.preadv(descriptor, [view[num_read:]], offset + num_read)):
        num_read += num
    view.release()
    return memory
