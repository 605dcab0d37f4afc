"""One record of a delta: which elements of one block changed, and by how much. Packing, checking, unpacking.

A block is up to `BLOCK_BYTES` of the snapshot, all of elements of one width; tensors are nothing to it. A record is a
header (`<`: block, number of changed elements, number of gaps, packed bytes, each u32) and one zstd frame. It holds
planes: plane k is byte k, lowest first, of every number in turn. The two planes of the gaps (u16) come first, then one
for each byte of an element with the differences. A gap is how many elements stay as they are before the next changed
one; 65535 passes so many elements and names none. A difference d is new bits - old bits, modulo the element's width w;
what travels is (d << 1) ^ (d >> w - 1) with d taken as signed, so that small steps up and down are small numbers. Bits
are unsigned numbers whatever they mean, so NaN and -0.0 are as exact as anything else. Pure: no socket, no file, no
snapshot. Whoever reads a record gets ProtocolError for whatever is wrong with it, and nothing else.
"""

from __future__ import annotations

import itertools
import struct
import threading
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import zstandard

from broker.protocol.delta_loops import PASS, Planes, measure
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.weights import DTYPES, Buffer, Bytes, TensorSpec, flat

HEADER: Final = struct.Struct("<IIII")
BLOCK_BYTES: Final = 4 << 20  # smaller ones cost more time and bytes, larger ones memory where much changed
# Of zstd: what it is to find here are uneven counts of bytes, not repetition.
WINDOW_LOG, HASH_LOG, MIN_MATCH = 17, 6, 7


class Block(NamedTuple):
    """So many bytes of the snapshot, in elements of `itemsize` bytes. `number` counts the blocks before it."""

    number: int
    offset: int
    num_bytes: int
    itemsize: int

    @property
    def num_elements(self) -> int:
        """Elements in it."""
        return self.num_bytes // self.itemsize


class Blocks:
    """The blocks of a snapshot: each run of tensors whose elements have one width is cut from its first byte on."""

    def __init__(self, tensors: Sequence[TensorSpec]) -> None:
        self._runs: list[Block] = []  # `number` of the first block, offset and bytes of the whole run
        self.num_blocks = 0
        for itemsize, run in itertools.groupby(tensors, lambda spec: DTYPES[spec.dtype][1]):
            specs = list(run)
            num_bytes = specs[-1].offset + specs[-1].num_bytes - specs[0].offset
            if num_bytes:
                self._runs.append(Block(self.num_blocks, specs[0].offset, num_bytes, itemsize))
            self.num_blocks += -(-num_bytes // BLOCK_BYTES)

    def __getitem__(self, number: int) -> Block:
        """One of the `num_blocks`."""
        run = self._runs[bisect_right(self._runs, number, key=lambda run: run.number) - 1]
        start = (number - run.number) * BLOCK_BYTES
        return Block(number, run.offset + start, min(run.num_bytes - start, BLOCK_BYTES), run.itemsize)

    def around(self, offset: int) -> Block:
        """The block in which this byte of the snapshot lies."""
        run = self._runs[bisect_right(self._runs, offset, key=lambda run: run.offset) - 1]
        return self[run.number + (offset - run.offset) // BLOCK_BYTES]


class Record(NamedTuple):
    """One record whose header fits its block. `packed` is its zstd frame, not yet opened."""

    block: Block
    num_values: int
    num_gaps: int
    packed: memoryview

    @property
    def num_bytes(self) -> int:
        """What the frame holds when opened: at most 2 bytes an element more than the block has."""
        return 2 * self.num_gaps + self.block.itemsize * self.num_values


class Content(NamedTuple):
    """What a record holds, checked: the planes of the gaps, and those of the differences, each one behind the other."""

    gaps: Bytes
    values: Bytes


class _Zstd(threading.local):
    """Contexts of zstd, which are dear to make and cannot be shared: one of each kind a thread."""

    def __init__(self) -> None:
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            window_log=WINDOW_LOG,
            hash_log=HASH_LOG,
            min_match=MIN_MATCH,
            write_content_size=True,
            write_checksum=False,
        )
        self.writer = zstandard.ZstdCompressor(compression_params=parameters)
        self.reader = zstandard.ZstdDecompressor()


_zstd = _Zstd()


def pack(block: int, found: Planes) -> bytes:
    """The record of what was found in this block."""
    num_bytes = sum(plane.size for plane in found.planes)
    frame = _zstd.writer.compressobj(size=num_bytes)
    parts: list[bytes] = []
    for plane in found.planes:
        parts.append(frame.compress(plane.data))
        parts.append(frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))  # so each plane is under a code of its own
    parts.append(frame.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH))
    packed = b"".join(parts)
    return HEADER.pack(block, found.num_values, found.num_gaps, len(packed)) + packed


def repack(record: Record) -> bytes:
    """The bytes of a record that was read."""
    header = HEADER.pack(record.block.number, record.num_values, record.num_gaps, record.packed.nbytes)
    return header + bytes(record.packed)


def whole_bytes(payload: Buffer) -> int:
    """How many of the first bytes of a payload are whole records, as far as their headers say. Checks nothing."""
    view, start = flat(payload), 0
    while view.nbytes - start >= HEADER.size:
        end = start + HEADER.size + HEADER.unpack_from(view, start)[3]
        if end > view.nbytes:
            break
        start = end
    return start


def read_records(payload: Buffer, blocks: Blocks) -> list[Record]:
    """The records of a payload, their headers checked against the blocks; nothing is decompressed.

    Raises ProtocolError.
    """
    view, start, records = flat(payload), 0, list[Record]()
    while start < view.nbytes:
        if view.nbytes - start < HEADER.size:
            raise _bad(f"record {len(records)} has {view.nbytes - start} bytes; allowed: {HEADER.size} and its frame")
        index, num_values, num_gaps, num_packed = HEADER.unpack_from(view, start)
        start += HEADER.size
        first = records[-1].block.number + 1 if records else 0
        if not first <= index < blocks.num_blocks:
            raise _bad(f"record {len(records)} is of block {index}; allowed: {first} to {blocks.num_blocks - 1}")
        if num_packed > view.nbytes - start:
            raise _bad(f"block {index} has {num_packed} packed bytes; allowed: the {view.nbytes - start} that are left")
        record = Record(blocks[index], num_values, num_gaps, view[start : start + num_packed])
        _check_counts(record)
        _check_frame(record)
        records.append(record)
        start += num_packed
    return records


def open_record(record: Record) -> Content:
    """What a record holds, checked: its gaps lead to as many elements as it says, all of them in the block.

    Raises ProtocolError.
    """
    try:
        content = np.frombuffer(_zstd.reader.decompress(record.packed, allow_extra_data=False), np.uint8)
    except zstandard.ZstdError as error:
        raise _bad(f"block {record.block.number} does not decompress: {error}") from error
    if content.size != record.num_bytes:
        raise _bad(f"block {record.block.number} decompresses to {content.size} bytes; allowed: {record.num_bytes}")
    split = 2 * record.num_gaps
    gaps = content[:split]
    _check_gaps(record, gaps)
    return Content(gaps, content[split:])


def _check_gaps(record: Record, gaps: Bytes) -> None:
    if gaps[record.num_gaps - 1] == gaps[-1] == PASS & 0xFF:
        raise _bad(
            f"block {record.block.number} ends with a gap that names no element; allowed: a changed element at the end"
        )
    num_named, end = measure(gaps)
    if num_named != record.num_values:
        raise _bad(f"block {record.block.number} has gaps for {num_named} elements; allowed: {record.num_values}")
    if end > record.block.num_elements:
        raise _bad(f"block {record.block.number} changes element {end - 1}; allowed: below {record.block.num_elements}")


def _check_counts(record: Record) -> None:
    """Bound what a record may hold by its block."""
    num_values, num_gaps, num_elements = record.num_values, record.num_gaps, record.block.num_elements
    if not 1 <= num_values <= num_elements:
        raise _bad(f"block {record.block.number} has {num_values} changed elements; allowed: 1 to {num_elements}")
    if not 0 <= num_gaps - num_values <= num_elements // PASS:
        most = num_values + num_elements // PASS
        raise _bad(f"block {record.block.number} has {num_gaps} gaps; allowed: {num_values} to {most}")


def _check_frame(record: Record) -> None:
    """The frame must say its size itself, and truly: what opens it takes that much memory."""
    try:
        size = zstandard.frame_content_size(record.packed)
    except zstandard.ZstdError as error:
        raise _bad(f"block {record.block.number} has no zstd frame: {error}") from error
    if size != record.num_bytes:
        raise _bad(f"block {record.block.number} has a frame of {size} bytes; allowed: {record.num_bytes}")


def _bad(text: str) -> ProtocolError:
    return ProtocolError(ErrorCode.BAD_MESSAGE, f"delta: {text}")
