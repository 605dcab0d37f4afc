"""Lossless differences between two versions of a snapshot: making, applying, folding them. Pure: no socket, no file, no
thread of its own, though it lets its caller's threads do what is independent (`Run`, `Start`), with the same result.

A payload is the records (`delta_records.py`) of the blocks that changed, ascending, and nothing else; no byte at all
says that nothing changed. A record adds to the bits of elements, so a payload gives its version only on exactly the
snapshot that it was made from, and once. Sums of differences are differences, so folding needs no snapshot. Knows
nothing of versions, chunks and hashes: that a delta is applied to the snapshot it belongs to is the channel's to see
to, and what came of it is for the receiver to verify, by the total hash.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Final, NamedTuple

import numpy as np

from broker.protocol.delta_loops import Piece, add, find, negated
from broker.protocol.delta_records import Block, Blocks, Content, Record, open_record, pack, read_records, repack
from broker.protocol.hashes import Leaves, Run, Start, at_once
from broker.protocol.weights import Buffer, Bytes, TensorSpec, flat

MAX_BEGUN: Final = 16  # blocks that are compared, or wait for it, at a time: what is new in them must be held
BATCH_BYTES: Final = 128 << 10  # of opened records in one piece of work
KEPT_BYTES: Final = 4 << 20  # of opened records between checking and applying; what is beyond is opened twice

OfRecord = Callable[[bytes], None]


def nothing_more(_: bytes) -> None:
    """What is to be done with a record, by default."""


class DeltaEncoder:
    """Collects the changes of one version of a snapshot of these tensors, tensor by tensor, in their order.

    Blocks are compared as soon as they are complete, several at a time where `start` is that of threads. `leaves`,
    where they are given, are the snapshot's: it is hashed by the same threads, while its bytes are still near the core.
    `made` is called with each record, in the order of the payload, by the caller's thread.
    """

    def __init__(
        self,
        tensors: Sequence[TensorSpec],
        start: Start = at_once,
        leaves: Leaves | None = None,
        made: OfRecord = nothing_more,
    ) -> None:
        self._tensors, self._blocks = tensors, Blocks(tensors)
        self._start, self._leaves, self._made = start, leaves, made
        self._num_given = 0  # tensors
        self._pieces: list[Piece] = []  # of the block that is not complete yet
        self._block: Block | None = None  # that one
        self._begun: deque[Future[_Packed]] = deque()
        self._records: list[bytes] = []
        self.num_bytes = 0  # of the records so far: the caller stops when a delta no longer pays
        self.num_changed = 0  # elements in them

    def add(self, base: Bytes, new: Buffer) -> None:
        """Keep what changed in the next tensor from `base` to `new`, and make `base` equal to `new`, before long.

        base: the tensor's bytes in the copy last published, writable. new: as many contiguous bytes, which must not
        change before `finish` or `abandon`. Beside the packed records it takes at most the memory of twice a block for
        each thread, and holds on to what is new in MAX_BEGUN blocks. Raises ValueError where the arguments do not fit
        the tensor, before anything is written.
        """
        if self._num_given >= len(self._tensors):
            raise ValueError(f"there are {len(self._tensors)} tensors, and all of them were given")
        spec, fresh = self._tensors[self._num_given], np.frombuffer(flat(new), np.uint8)
        if base.dtype != np.uint8 or base.ndim != 1 or not (base.flags.writeable and base.flags.c_contiguous):
            raise ValueError(f"tensor {spec.name!r}: the base is not a writable array of bytes")
        if not base.size == fresh.size == spec.num_bytes:
            raise ValueError(f"tensor {spec.name!r}: {base.size} and {fresh.size} bytes; allowed: {spec.num_bytes}")
        self._num_given += 1
        at = 0
        while at < spec.num_bytes:
            block = self._blocks.around(spec.offset + at)
            place = spec.offset + at - block.offset
            end = min(at + block.num_bytes - place, spec.num_bytes)
            self._block = block
            self._pieces.append(Piece(place, base[at:end], fresh[at:end]))
            if place + end - at == block.num_bytes:
                self._begin()
            at = end

    def finish(self) -> Bytes:
        """The payload: one read-only uint8 array, empty where nothing changed. No tensor can be added after that."""
        self._complete()
        return np.frombuffer(b"".join(self._records), np.uint8)

    def abandon(self) -> None:
        """Give up the payload, and make the bases of all that was added equal to what is new nevertheless."""
        self._complete()

    def wait(self) -> None:
        """Return when nothing is at work any more, be it finished or failed."""
        wait(self._begun)

    def _complete(self) -> None:
        self._num_given = len(self._tensors)
        if self._pieces:
            self._begin()
        while self._begun:
            self._keep()

    def _begin(self) -> None:
        assert self._block is not None
        block, pieces, leaves = self._block, self._pieces, self._leaves

        def work(block: Block) -> _Packed:
            following = leaves.follow(block.offset) if leaves is not None else None

            def done(place: int) -> None:
                if following is not None:
                    following.to(block.offset + place)

            found = find(pieces, block.itemsize, block.num_elements, done)
            return _Packed(pack(block.number, found), found.num_values) if found is not None else _Packed(b"", 0)

        self._pieces = []
        self._begun.append(self._start(work, block))
        while self._begun and (self._begun[0].done() or len(self._begun) >= MAX_BEGUN):
            self._keep()

    def _keep(self) -> None:
        record = self._begun.popleft().result()
        if record.data:
            self._records.append(record.data)
            self._made(record.data)
        self.num_bytes += len(record.data)
        self.num_changed += record.num_changed


class _Packed(NamedTuple):
    """A record, empty where nothing changed."""

    data: bytes
    num_changed: int


def apply_delta(
    payload: Buffer, tensors: Sequence[TensorSpec], target: Bytes, run: Run = map, leaves: Leaves | None = None
) -> int:
    """Change `target`, the writable uint8 snapshot of exactly these tensors that the delta was made from.

    Everything is checked before the first byte is written. Applied to anything else, or once more, it gives other
    bytes than it should, which only their hash tells; `leaves`, where they are given, are the target's, and those of
    blocks that were written are hashed. Returns the number of elements changed. Raises ProtocolError for a payload that
    is malformed or does not fit the tensors, ValueError for a target that is no such snapshot.
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
            block = record.block
            add(target[block.offset : block.offset + block.num_bytes], block.itemsize, *content)
            if leaves is not None:
                leaves.hash(block.offset, block.offset + block.num_bytes)

    for _ in run(write, range(len(batches))):
        pass
    return sum(record.num_values for batch in batches for record in batch)


def undo_delta(payload: Buffer, tensors: Sequence[TensorSpec], target: Bytes) -> None:
    """Take back what `apply_delta` did to this target with this payload. Raises as that does, but for the target's."""
    for record in read_records(payload, Blocks(tensors)):
        block, content = record.block, open_record(record)
        values = negated(content.values, block.itemsize)
        add(target[block.offset : block.offset + block.num_bytes], block.itemsize, content.gaps, values)


def fold(payloads: Sequence[Buffer], tensors: Sequence[TensorSpec], run: Run = map) -> Bytes:
    """One payload with the effect of these applied in order. What was changed and changed back is not in it.

    The memory is that of two blocks, and of one in all payloads, for each thread, and of the result. Raises
    ProtocolError as `apply_delta` does.
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
    sums = np.zeros(block.num_bytes, np.uint8)
    for content in contents:
        add(sums, block.itemsize, *content)
    found = find([Piece(0, np.zeros(block.num_bytes, np.uint8), sums)], block.itemsize, block.num_elements)
    return pack(block.number, found) if found is not None else b""


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
