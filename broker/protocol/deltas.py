"""Lossless differences between two versions of a snapshot: making, applying, folding them. Pure: no socket, no file.

A payload is the records (`delta_records.py`) of the tensors that changed, in ascending order of their index, and
nothing else; no byte at all says that nothing changed. A record names places and new values, never differences of
values, so applying a payload twice is as good as once, and folding needs no snapshot. Knows nothing of versions, chunks
and hashes: that a delta fits the snapshot it is applied to is for the receiver to verify, by the total hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import zstandard

from broker.protocol.delta_records import (
    ELEMENT,
    HEADER,
    Elements,
    Gaps,
    Mode,
    Positions,
    Record,
    gaps_between,
    pack_dense,
    pack_sparse,
    read_records,
    unpack,
)
from broker.protocol.weights import Buffer, Bytes, TensorSpec, flat

LEVEL: Final = 1  # of zstd; measured on real versions, level 3 is slower and no smaller
BLOCK_BYTES: Final = 1 << 20  # of either version: both stay in the cache while they are compared
WORD: Final = np.dtype("<u8")
DENSE_FRACTION: Final = 0.75  # of changed elements: from there on a record of all of them is about as small, and faster


class DeltaEncoder:
    """Collects the changes of one version, tensor by tensor, in the manifest's order."""

    def __init__(self, level: int = LEVEL) -> None:
        """level: of zstd."""
        self._zstd = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
        self._records: list[bytes] = []
        self._num_bytes = 0
        self._last_index = -1

    @property
    def num_bytes(self) -> int:
        """Of all records so far: the caller stops when a delta no longer pays."""
        return self._num_bytes

    def add(self, index: int, itemsize: int, base: Bytes, new: Buffer) -> int:
        """Keep what changed in one tensor from `base` to `new`, and make `base` equal to `new`.

        index: of the tensor in the manifest, ascending from call to call. itemsize: of an element, 1, 2, 4 or 8 bytes.
        base: the tensor's bytes in the copy last published, writable. new: as many contiguous bytes. Returns the number
        of changed elements. Beside the packed record it takes a few bytes for each change and 1 MiB or so.
        Raises ValueError where the arguments do not fit each other, before anything is written.
        """
        fresh = np.frombuffer(flat(new), np.uint8)
        if index <= self._last_index:
            raise ValueError(f"tensor {index} after tensor {self._last_index}; give them in the manifest's order")
        if itemsize not in ELEMENT or base.size != fresh.size or base.size % itemsize:
            raise ValueError(f"tensor {index}: {base.size} and {fresh.size} bytes in elements of {itemsize} bytes")
        if not base.flags.writeable or base.dtype != np.uint8 or base.ndim != 1 or not base.flags.c_contiguous:
            raise ValueError(f"tensor {index}: the base is not a writable array of bytes")
        self._last_index = index
        gaps, values, num_changed = _changes(itemsize, base, fresh)
        if values is None:
            self._keep(pack_dense(self._zstd, index, fresh.view(ELEMENT[itemsize])))
        elif num_changed:
            self._keep(pack_sparse(self._zstd, index, gaps, values))
        return num_changed

    def finish(self) -> Bytes:
        """The payload: one read-only uint8 array, empty where nothing changed."""
        return np.frombuffer(b"".join(self._records), np.uint8)

    def _keep(self, record: bytes) -> None:
        self._records.append(record)
        self._num_bytes += len(record)


def apply_delta(payload: Buffer, tensors: Sequence[TensorSpec], target: Bytes) -> int:
    """Overwrite the changed elements in `target`, a writable uint8 snapshot of exactly these tensors.

    Everything is checked before the first byte is written. Every record is therefore opened twice, so that the memory
    is that of one tensor's changes. Returns the number of elements written. Raises ProtocolError for a payload that is
    malformed or does not fit the tensors, ValueError for a target that is no such snapshot.
    """
    num_bytes = tensors[-1].offset + tensors[-1].num_bytes
    if target.dtype != np.uint8 or target.shape != (num_bytes,) or not target.flags.writeable:
        raise ValueError(f"a target of shape {target.shape} and {target.dtype}; {num_bytes} writable bytes are due")
    if not target.flags.c_contiguous:
        raise ValueError("a target that is not contiguous; give the snapshot itself")
    zstd = zstandard.ZstdDecompressor()
    records = read_records(payload, tensors)
    for record in records:
        unpack(zstd, record)
    for record in records:
        positions, values = unpack(zstd, record)
        spec = tensors[record.tensor]
        elements = target[spec.offset : spec.offset + spec.num_bytes].view(ELEMENT[record.itemsize])
        elements[... if positions is None else positions] = values
    return sum(record.num_values for record in records)


def fold(payloads: Sequence[Buffer], tensors: Sequence[TensorSpec]) -> Bytes:
    """One payload with the effect of these applied in order; later values win.

    The memory is that of one tensor's changes in all payloads, and of the result. Raises ProtocolError as `apply_delta`
    does.
    """
    by_tensor: dict[int, list[Record]] = {}
    for payload in payloads:
        for record in read_records(payload, tensors):
            by_tensor.setdefault(record.tensor, []).append(record)
    reader = zstandard.ZstdDecompressor()
    writer = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False, write_content_size=True)
    return np.frombuffer(b"".join(_fold_one(reader, writer, by_tensor[i]) for i in sorted(by_tensor)), np.uint8)


def _fold_one(reader: zstandard.ZstdDecompressor, writer: zstandard.ZstdCompressor, records: Sequence[Record]) -> bytes:
    """One record with the effect of these, all of one tensor, oldest first."""
    dense = [i for i, record in enumerate(records) if record.mode is Mode.DENSE]
    last_dense = dense[-1] if dense else 0
    for record in records[:last_dense]:  # superseded, but what is wrong with them is said all the same
        unpack(reader, record)
    opened = [unpack(reader, record) for record in records[last_dense:]]
    first = records[last_dense]
    if len(opened) == 1:
        header = HEADER.pack(first.tensor, first.mode, first.num_values, first.num_gaps, first.packed.nbytes)
        return header + bytes(first.packed)
    sparse = [(positions, values) for positions, values in opened if positions is not None]
    if first.mode is Mode.DENSE:
        everything = opened[0][1]
        for positions, values in sparse:
            everything[positions] = values
        return pack_dense(writer, first.tensor, everything)
    positions, values = _merge(sparse)
    if positions.size == first.num_elements:
        return pack_dense(writer, first.tensor, values)
    return pack_sparse(writer, first.tensor, gaps_between(positions), values)


def _merge(changes: Sequence[tuple[Positions, Elements]]) -> tuple[Positions, Elements]:
    """All places once, ascending, each with its latest value."""
    places = np.concatenate([positions for positions, _ in changes])
    values = np.concatenate([values for _, values in changes])
    order = np.argsort(places, kind="stable")  # merges runs that are sorted already
    places = places[order]
    latest = np.append(places[1:] != places[:-1], True)
    return places[latest], values[order[latest]]


def _changes(itemsize: int, base: Bytes, new: Bytes) -> tuple[Gaps, Elements | None, int]:
    """Gaps, values and number of the changed elements, block by block; no values where a dense record is due.

    `base` equals `new` afterwards.
    """
    gaps, values = [np.empty(0, "<u2")], [np.empty(0, ELEMENT[itemsize])]
    most, num_changed, before = DENSE_FRACTION * (base.size // itemsize), 0, -1
    for start in range(0, base.size, BLOCK_BYTES):
        block, fresh = base[start : start + BLOCK_BYTES], new[start : start + BLOCK_BYTES]
        if num_changed > most:
            num_changed += int(np.count_nonzero(block.view(ELEMENT[itemsize]) != fresh.view(ELEMENT[itemsize])))
            block[:] = fresh
            continue
        positions, changed = _changes_of_block(itemsize, block, fresh)
        if not positions.size:
            continue
        positions += start // itemsize
        gaps.append(gaps_between(positions, before))
        values.append(changed)
        num_changed += positions.size
        before = int(positions[-1])
    if num_changed > most:
        return gaps[0], None, num_changed
    return np.concatenate(gaps), np.concatenate(values), num_changed


def _changes_of_block(itemsize: int, base: Bytes, new: Bytes) -> tuple[Positions, Elements]:
    """Places, from the block's start, and values of what changed; `base` equals `new` afterwards.

    Most words of eight bytes are the same, so words are compared first and elements only within those that differ.
    """
    if base.size % WORD.itemsize or base.ctypes.data % WORD.itemsize or new.ctypes.data % WORD.itemsize:
        old, fresh = base.view(ELEMENT[itemsize]), new.view(ELEMENT[itemsize])
        places = np.flatnonzero(old != fresh)
        values = fresh[places]
        old[places] = values
        return places, values
    old_words, new_words = base.view(WORD), new.view(WORD)
    words = np.flatnonzero(old_words != new_words)
    fresh_words = new_words[words]
    fresh = fresh_words.view(ELEMENT[itemsize])
    differs = np.flatnonzero(old_words[words].view(ELEMENT[itemsize]) != fresh)
    old_words[words] = fresh_words
    per_word = WORD.itemsize // itemsize
    which, within = np.divmod(differs, per_word)
    return words[which] * per_word + within, fresh[differs]
