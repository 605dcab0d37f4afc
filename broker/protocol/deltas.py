"""Lossless differences between two versions of a snapshot: making, applying, folding them. Pure: no socket, no file, no
thread of its own, though it lets its caller's threads do what is independent (`Run`), with the same result.

A payload is the records (`delta_records.py`) of the blocks that changed, ascending, and nothing else; no byte at all
says that nothing changed. A record adds to the bits of elements, so a payload gives its version only on exactly the
snapshot that it was made from, and once. Sums of differences are differences, so folding needs no snapshot. Knows
nothing of versions, chunks and hashes: that a delta is applied to the snapshot it belongs to is the channel's to see
to, and what came of it is for the receiver to verify, by the total hash.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from broker.protocol.delta_records import (
    ELEMENT,
    Block,
    Blocks,
    Content,
    Elements,
    Positions,
    Record,
    open_record,
    pack,
    read_records,
    repack,
    unpack,
)
from broker.protocol.hashes import Run
from broker.protocol.weights import Buffer, Bytes, TensorSpec, flat

WORD: Final = np.dtype("<u8")
SCAN_BYTES: Final = 1 << 20  # of either version: both stay near the core from comparing to copying
SHARED_BYTES: Final = 16 << 20  # of a tensor: from there on threads share its blocks
BATCH_BYTES: Final = 128 << 10  # of opened records in one piece of work
KEPT_BYTES: Final = 4 << 20  # of opened records between checking and applying; what is beyond is opened twice


class DeltaEncoder:
    """Collects the changes of one version of a snapshot of these tensors, tensor by tensor, in their order.

    Where `run` is that of threads, they share the blocks of a large tensor. Small ones are not worth their trouble: in
    Python threads hand over to each other after every operation, which takes longer than operations on a little do.
    """

    def __init__(self, tensors: Sequence[TensorSpec], run: Run = map) -> None:
        self._tensors, self._blocks = tensors, Blocks(tensors)
        self._run = run
        self._num_given = 0  # tensors
        self._block: Block | None = None  # which several tensors share
        self._found: list[_Found] = []  # in it
        self._records: list[bytes] = []
        self.num_bytes = 0  # of the records so far: the caller stops when a delta no longer pays
        self.num_changed = 0  # elements in them

    def add(self, base: Bytes, new: Buffer) -> None:
        """Keep what changed in the next tensor from `base` to `new`, and make `base` equal to `new`.

        base: the tensor's bytes in the copy last published, writable. new: as many contiguous bytes, which may change
        once this returns. Beside the packed records it takes some 20 bytes for each change in a block. Raises
        ValueError where the arguments do not fit the tensor, before anything is written.
        """
        if self._num_given >= len(self._tensors):
            raise ValueError(f"there are {len(self._tensors)} tensors, and all of them were given")
        spec, fresh = self._tensors[self._num_given], np.frombuffer(flat(new), np.uint8)
        if base.dtype != np.uint8 or base.ndim != 1 or not (base.flags.writeable and base.flags.c_contiguous):
            raise ValueError(f"tensor {spec.name!r}: the base is not a writable array of bytes")
        if not base.size == fresh.size == spec.num_bytes:
            raise ValueError(f"tensor {spec.name!r}: {base.size} and {fresh.size} bytes; allowed: {spec.num_bytes}")
        self._num_given += 1
        pieces = list(self._pieces(spec, base, fresh))
        run = self._run if base.size >= SHARED_BYTES else map
        for piece, (found, record) in zip(pieces, run(_encode, pieces), strict=True):
            if piece.block != self._block:
                self._end_block()
                self._block = piece.block
            self._found += found
            self._keep(record)

    def finish(self) -> Bytes:
        """The payload: one read-only uint8 array, empty where nothing changed. No tensor can be added after that."""
        self._num_given = len(self._tensors)
        self._end_block()
        return np.frombuffer(b"".join(self._records), np.uint8)

    def _pieces(self, spec: TensorSpec, base: Bytes, new: Bytes) -> Iterator[_Piece]:
        start = 0
        while start < spec.num_bytes:
            block = self._blocks.around(spec.offset + start)
            place = spec.offset + start - block.offset
            end = min(start + block.num_bytes - place, spec.num_bytes)
            yield _Piece(block, place, base[start:end], new[start:end])
            start = end

    def _end_block(self) -> None:
        if self._block is not None:
            self._keep(_pack(self._block, self._found))
            self._found = []

    def _keep(self, record: _Packed) -> None:
        self._records.append(record.data)
        self.num_bytes += len(record.data)
        self.num_changed += record.num_changed


class _Piece(NamedTuple):
    """What one tensor has of a block, as it was published and as it is now. `place` counts bytes in the block."""

    block: Block
    place: int
    base: Bytes
    new: Bytes


class _Found(NamedTuple):
    """What differed in a part of a block, in words or in elements: where, counted in them, and both bits."""

    places: Positions
    before: Elements
    after: Elements


def apply_delta(payload: Buffer, tensors: Sequence[TensorSpec], target: Bytes, run: Run = map) -> int:
    """Change `target`, the writable uint8 snapshot of exactly these tensors that the delta was made from.

    Everything is checked before the first byte is written. Applied to anything else, or once more, it gives other
    bytes than it should, which only their hash tells. Returns the number of elements changed. Raises ProtocolError for
    a payload that is malformed or does not fit the tensors, ValueError for a target that is no such snapshot.
    """
    num_bytes = tensors[-1].offset + tensors[-1].num_bytes
    if target.dtype != np.uint8 or target.shape != (num_bytes,) or not target.flags.writeable:
        raise ValueError(f"a target of shape {target.shape} and {target.dtype}; {num_bytes} writable bytes are due")
    if not target.flags.c_contiguous:
        raise ValueError("a target that is not contiguous; give the snapshot itself")
    batches = list(_batches(read_records(payload, Blocks(tensors))))
    room = KEPT_BYTES
    kept: list[bool] = []
    for batch in batches:
        room -= sum(record.num_bytes for record in batch)
        kept.append(room >= 0)

    def check(number: int) -> list[Content] | None:
        contents = [open_record(record) for record in batches[number]]
        return contents if kept[number] else None

    opened = list(run(check, range(len(batches))))

    def write(number: int) -> None:
        contents = opened[number] or [open_record(record) for record in batches[number]]
        opened[number] = None
        for record, content in zip(batches[number], contents, strict=True):
            positions, differences = unpack(content)
            start, end = record.block.offset, record.block.offset + record.block.num_bytes
            elements = target[start:end].view(ELEMENT[record.block.itemsize])
            differences += elements.take(positions)
            elements[positions] = differences

    for _ in run(write, range(len(batches))):
        pass
    return sum(record.num_values for batch in batches for record in batch)


def fold(payloads: Sequence[Buffer], tensors: Sequence[TensorSpec], run: Run = map) -> Bytes:
    """One payload with the effect of these applied in order. What was changed and changed back is not in it.

    The memory is that of one block in all payloads for each thread, and of the result. Raises ProtocolError as
    `apply_delta` does.
    """
    blocks, by_block = Blocks(tensors), dict[int, list[Record]]()
    for payload in payloads:
        for record in read_records(payload, blocks):
            by_block.setdefault(record.block.number, []).append(record)
    return np.frombuffer(b"".join(run(_fold_one, [by_block[index] for index in sorted(by_block)])), np.uint8)


def _fold_one(records: Sequence[Record]) -> bytes:
    """One record with the effect of these, all of one block; none where they undo each other."""
    block = records[0].block
    contents = [open_record(record) for record in records]
    if len(records) == 1:
        return repack(records[0])
    sums = np.zeros(block.num_elements, ELEMENT[block.itemsize])
    for content in contents:
        positions, differences = unpack(content)
        differences += sums.take(positions)
        sums[positions] = differences
    positions = np.flatnonzero(sums != 0)
    return pack(block.number, positions, sums.take(positions)) if positions.size else b""


def _batches(records: Sequence[Record]) -> Iterator[list[Record]]:
    """These records in their order, so many together that it pays to hand them to a thread."""
    batch: list[Record] = []
    num_bytes = 0
    for record in records:
        batch.append(record)
        num_bytes += record.num_bytes
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


class _Packed(NamedTuple):
    """A record, empty where nothing changed."""

    data: bytes
    num_changed: int


def _encode(piece: _Piece) -> tuple[list[_Found], _Packed]:
    """What differs in a piece, packed where it is all of its block. Its base equals what is new afterwards."""
    found = _compare(piece)
    if piece.base.size == piece.block.num_bytes:
        return [], _pack(piece.block, found)
    return found, _Packed(b"", 0)


def _compare(piece: _Piece) -> list[_Found]:
    """Most words of eight bytes are the same, so words are compared wherever they are aligned."""
    addresses = piece.place | piece.base.size | piece.base.ctypes.data | piece.new.ctypes.data
    unit = ELEMENT[piece.block.itemsize] if addresses % WORD.itemsize else WORD
    found = []
    for start in range(0, piece.base.size, SCAN_BYTES):
        base, new = (side[start : start + SCAN_BYTES].view(unit) for side in (piece.base, piece.new))
        places = np.flatnonzero(base != new)
        if places.size:
            before, after = base.take(places), new.take(places)
            base[places] = after
            places += (piece.place + start) // unit.itemsize
            found.append(_Found(places, before, after))
    return found


def _pack(block: Block, found: Sequence[_Found]) -> _Packed:
    if not found:
        return _Packed(b"", 0)
    element = ELEMENT[block.itemsize]
    parts = [
        _changed_elements(list(alike), element)
        for _, alike in itertools.groupby(found, lambda each: each.before.itemsize)
    ]
    positions, differences = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Packed(pack(block.number, positions, differences), positions.size)


def _changed_elements(found: Sequence[_Found], element: np.dtype[Any]) -> tuple[Positions, Elements]:
    """Places and differences of the elements that changed in words, or elements, that did."""
    places, before, after = (np.concatenate(column) for column in zip(*found, strict=True))
    differences: Elements = after.view(element) - before.view(element)
    changed = np.flatnonzero(differences != 0)
    shift = (after.itemsize // element.itemsize).bit_length() - 1
    positions = places.take(changed >> shift)
    positions <<= shift
    positions += changed & (1 << shift) - 1
    return positions, differences.take(changed)
