"""One record of a delta: which elements of one tensor changed, and to what. Packing, checking, unpacking.

A record is a header (`<`: tensor index u32, mode u8, number of values u64, number of gaps u64, packed bytes u64) and
one zstd frame. It holds planes: plane k is byte k, lowest first, of every number in turn. A sparse record has the
two planes of its gaps (u16), then one plane for each byte of an element with the new values. A gap is how many elements
stay as they are before the next changed one; 65535 passes so many elements and names none. A dense record has no gaps
and a value for every element. Values are bits, so NaN and -0.0 are as exact as anything else. Pure: no socket, no file,
no snapshot. Whoever reads a record gets ProtocolError for whatever is wrong with it, and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.weights import DTYPES, Buffer, Bytes, TensorSpec, flat

HEADER: Final = struct.Struct("<IBQQQ")
ELEMENT: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}
PASS: Final = 0xFFFF  # the gap that names no element

Elements = npt.NDArray[Any]  # the bits of elements: an unsigned type of 1, 2, 4 or 8 bytes
Positions = npt.NDArray[np.int64]  # ascending places of elements in their tensor
Gaps = npt.NDArray[np.uint16]


class Mode(IntEnum):
    """How a record says which elements it holds."""

    SPARSE = 0
    DENSE = 1


class Record(NamedTuple):
    """One record whose header fits its tensor. `packed` is its zstd frame, not yet opened."""

    tensor: int  # its index in the manifest
    mode: Mode
    num_values: int
    num_gaps: int
    packed: memoryview
    itemsize: int
    num_elements: int

    @property
    def num_bytes(self) -> int:
        """What the frame holds when opened: at most 2 bytes an element more than the tensor, and some for passes."""
        return 2 * self.num_gaps + self.itemsize * self.num_values


def gaps_between(positions: Positions, before: int = -1) -> Gaps:
    """The gaps that lead to these elements from the changed one `before` them (-1: from the tensor's start)."""
    distances = np.diff(positions, prepend=before) - 1
    if not distances.size or distances.max() < PASS:
        return distances.astype("<u2")
    passes, rest = np.divmod(distances, PASS)
    gaps = np.full(positions.size + int(passes.sum()), PASS, "<u2")
    gaps[np.arange(positions.size) + passes.cumsum()] = rest
    return gaps


def pack_sparse(zstd: zstandard.ZstdCompressor, index: int, gaps: Gaps, values: Elements) -> bytes:
    """The record of the elements that these gaps lead to."""
    packed = _pack(zstd, (gaps, values))
    return HEADER.pack(index, Mode.SPARSE, values.size, gaps.size, len(packed)) + packed


def pack_dense(zstd: zstandard.ZstdCompressor, index: int, values: Elements) -> bytes:
    """The record of a tensor that changed nearly everywhere: all of its elements."""
    packed = _pack(zstd, (values,))
    return HEADER.pack(index, Mode.DENSE, values.size, 0, len(packed)) + packed


def read_records(payload: Buffer, tensors: Sequence[TensorSpec]) -> list[Record]:
    """The records of a payload, their headers checked against the tensors; nothing is decompressed.

    Raises ProtocolError.
    """
    view, start, records = flat(payload), 0, list[Record]()
    while start < view.nbytes:
        if view.nbytes - start < HEADER.size:
            raise _bad(f"record {len(records)} has {view.nbytes - start} bytes; allowed: {HEADER.size} and its frame")
        index, mode, num_values, num_gaps, num_packed = HEADER.unpack_from(view, start)
        start += HEADER.size
        first = records[-1].tensor + 1 if records else 0
        if not first <= index < len(tensors):
            raise _bad(f"record {len(records)} is of tensor {index}; allowed: {first} to {len(tensors) - 1}")
        if num_packed > view.nbytes - start:
            raise _bad(
                f"tensor {index} has {num_packed} packed bytes; allowed: the {view.nbytes - start} that are left"
            )
        itemsize = DTYPES[tensors[index].dtype][1]
        num_elements = tensors[index].num_bytes // itemsize
        _check_counts(index, mode, num_values, num_gaps, num_elements)
        packed = view[start : start + num_packed]
        record = Record(index, Mode(mode), num_values, num_gaps, packed, itemsize, num_elements)
        _check_frame(record)
        records.append(record)
        start += num_packed
    return records


def unpack(zstd: zstandard.ZstdDecompressor, record: Record) -> tuple[Positions | None, Elements]:
    """Places and new values of one record; the places are None where all elements have a value (a dense record).

    Raises ProtocolError. Takes some 20 bytes for each change, and for a dense record twice its tensor.
    """
    try:
        content = np.frombuffer(zstd.decompress(record.packed, allow_extra_data=False), np.uint8)
    except zstandard.ZstdError as error:
        raise _bad(f"tensor {record.tensor} does not decompress: {error}") from error
    if content.size != record.num_bytes:
        raise _bad(f"tensor {record.tensor} decompresses to {content.size} bytes; allowed: {record.num_bytes}")
    values = _join(content[2 * record.num_gaps :], record.itemsize)
    if record.mode is Mode.DENSE:
        return None, values
    return _positions(record, _join(content[: 2 * record.num_gaps], 2)), values


def _positions(record: Record, gaps: Gaps) -> Positions:
    steps = gaps.astype(np.int64)
    named = gaps != PASS
    steps += named
    positions = np.cumsum(steps, out=steps)
    positions -= 1
    if not named[-1]:
        raise _bad(
            f"tensor {record.tensor} ends with a gap that names no element; allowed: a changed element at the end"
        )
    if positions[-1] >= record.num_elements:
        raise _bad(f"tensor {record.tensor} changes element {positions[-1]}; allowed: below {record.num_elements}")
    if record.num_gaps != record.num_values or not named.all():
        positions = positions[named]
    if positions.size != record.num_values:
        raise _bad(f"tensor {record.tensor} has gaps for {positions.size} elements; allowed: {record.num_values}")
    return positions


def _check_counts(index: int, mode: int, num_values: int, num_gaps: int, num_elements: int) -> None:
    """Bound what a record may hold by its tensor."""
    if mode == Mode.DENSE:
        if num_values != num_elements or num_gaps or not num_values:
            raise _bad(
                f"tensor {index}, dense, has {num_values} values and {num_gaps} gaps; allowed: {num_elements}, 0"
            )
    elif mode == Mode.SPARSE:
        if not 1 <= num_values <= num_elements:
            raise _bad(f"tensor {index} has {num_values} changed elements; allowed: 1 to {num_elements}")
        if not 0 <= num_gaps - num_values <= num_elements // PASS:
            most = num_values + num_elements // PASS
            raise _bad(f"tensor {index} has {num_gaps} gaps; allowed: {num_values} to {most}")
    else:
        raise _bad(f"tensor {index} has mode {mode}; allowed: {Mode.SPARSE} (sparse) and {Mode.DENSE} (dense)")


def _check_frame(record: Record) -> None:
    """The frame must say its size itself, and truly: what opens it takes that much memory."""
    try:
        size = zstandard.frame_content_size(record.packed)
    except zstandard.ZstdError as error:
        raise _bad(f"tensor {record.tensor} has no zstd frame: {error}") from error
    if size != record.num_bytes:
        raise _bad(f"tensor {record.tensor} has a frame of {size} bytes; allowed: {record.num_bytes}")


def _pack(zstd: zstandard.ZstdCompressor, columns: Sequence[Elements]) -> bytes:
    """One frame with the planes of these numbers, each plane in blocks, and so under a code, of its own."""
    frame = zstd.compressobj(size=sum(numbers.nbytes for numbers in columns))
    parts: list[bytes] = []
    for numbers in columns:
        for plane in np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, numbers.itemsize).T):
            parts.append(frame.compress(plane.data))
            parts.append(frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    parts.append(frame.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH))
    return b"".join(parts)


def _join(planes: Bytes, itemsize: int) -> Elements:
    """The numbers whose bytes lie in planes."""
    by_number = np.empty((planes.size // itemsize, itemsize), np.uint8)
    by_number[:] = planes.reshape(itemsize, -1).T
    numbers: Elements = by_number.reshape(-1).view(ELEMENT[itemsize])
    return numbers


def _bad(text: str) -> ProtocolError:
    return ProtocolError(ErrorCode.BAD_MESSAGE, f"delta: {text}")
