"""The inner loops of deltas: what differs between two versions of a block, and adding it to one.

Compiled from `delta_loops.c` when the package is installed, where there is a C compiler; else numpy does the same, byte
for byte, at half the speed (`compiled` says which). Numbers travel in planes: plane k is byte k, lowest first, of every
number in turn. What they mean is in `delta_records.py`. Pure: no socket; the one file is the library.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import itertools
import mmap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from broker.protocol.weights import Bytes

ELEMENT: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}
WORD: Final = ELEMENT[8]
PASS: Final = 0xFFFF  # the gap that names no element
SCAN_BYTES: Final = 1 << 20  # of either version: both stay near the core for what follows on comparing

Elements = npt.NDArray[Any]  # the bits of elements: an unsigned type of 1, 2, 4 or 8 bytes
Positions = npt.NDArray[np.int64]  # ascending places of elements in their block
Gaps = npt.NDArray[np.uint16]


class Piece(NamedTuple):
    """What one tensor has of a block, as it was published (writable) and as it is now. `place` counts bytes in the
    block; pieces of a block follow each other without a gap."""

    place: int
    base: Bytes
    new: Bytes


class Planes(NamedTuple):
    """Numbers of one block, at least one changed element: the planes of the gaps (two) and of the differences. Valid
    until the same thread finds the next."""

    num_gaps: int
    num_values: int
    planes: Sequence[Bytes]


def find(
    pieces: Sequence[Piece], itemsize: int, num_elements: int, done: Callable[[int], None] = lambda _: None
) -> Planes | None:
    """What differs in a block of so many elements; None where nothing does. Bases equal what is new afterwards: as soon
    as they do, `done` is told up to which byte of the block."""
    if _library is None:
        return _planes_of([each for piece in pieces for each in _compare(piece, itemsize, done)], itemsize)
    room = _room.of(itemsize, num_elements)
    room.found[:] = 0
    for place, base, new in pieces:
        base_at, new_at = base.ctypes.data, new.ctypes.data
        for start in range(0, base.size, SCAN_BYTES):
            num_bytes = min(SCAN_BYTES, base.size - start)
            _library.ergon_scan(base_at + start, new_at + start, num_bytes, itemsize, *room.addresses)
            done(place + start + num_bytes)
    _, num_values, num_gaps = map(int, room.found)
    if not num_values:
        return None
    return Planes(num_gaps, num_values, [*room.gaps[:, :num_gaps], *room.values[:, :num_values]])


def measure(gaps: Bytes) -> tuple[int, int]:
    """Of the two planes of some gaps, one behind the other: how many elements they name, and the element behind the
    last one that they lead to."""
    if _library is None:
        joined = _join(gaps, 2)
        num_named = int(np.count_nonzero(joined != PASS))
        return num_named, int(joined.sum(dtype=np.int64)) + num_named
    end = ctypes.c_uint64()
    return _library.ergon_measure(gaps.ctypes.data, gaps.size // 2, ctypes.byref(end)), end.value


def add(target: Bytes, itemsize: int, gaps: Bytes, values: Bytes) -> None:
    """Add to the elements of a block (writable bytes) what these planes say, which lead to elements of it alone."""
    if _library is None:
        elements = target.view(ELEMENT[itemsize])
        positions, differences = _positions(_join(gaps, 2)), _unzigzag(_join(values, itemsize))
        differences += elements.take(positions)
        elements[positions] = differences
        return
    num_gaps, num_values = gaps.size // 2, values.size // itemsize
    order = (gaps.ctypes.data, num_gaps, values.ctypes.data, num_values)
    if _library.ergon_add(target.ctypes.data, target.size // itemsize, itemsize, *order):
        raise AssertionError("a record that was checked leads out of its block")


def negated(values: Bytes, itemsize: int) -> Bytes:
    """The planes of the opposite differences: adding them undoes adding these."""
    return np.concatenate(_split(_zigzag(np.negative(_unzigzag(_join(values, itemsize))))))


# --- compiled -------------------------------------------------------------------------------------------------------


class _Room(threading.local):
    """Memory for what is found, one for each thread. Only what was ever written to takes any."""

    def __init__(self) -> None:
        self._itemsize = self._num_elements = 0
        self.found = np.zeros(3, np.uint64)
        self.gaps = self.values = np.empty((0, 0), np.uint8)
        self.addresses: tuple[int, ...] = ()

    def of(self, itemsize: int, num_elements: int) -> _Room:
        """For a block of so many elements at most."""
        if itemsize != self._itemsize or num_elements > self._num_elements:
            self._itemsize, self._num_elements = itemsize, num_elements
            self.gaps = _lazy(2, num_elements + num_elements // PASS)
            self.values = _lazy(itemsize, num_elements)
            planes = [self.gaps[0], self.gaps[1], self.values]
            self.addresses = (self.found.ctypes.data, *(plane.ctypes.data for plane in planes), num_elements)
        return self


def _lazy(num_planes: int, num_bytes: int) -> Bytes:
    """Planes in small pages, which numpy's own memory of this size would not be in."""
    memory = mmap.mmap(-1, num_planes * num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8).reshape(num_planes, num_bytes)


def _load() -> ctypes.CDLL | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_delta_loops{suffix}")
        if path.exists():
            library = ctypes.CDLL(str(path))
            pointer, size, width = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
            library.ergon_scan.argtypes = [pointer, pointer, size, width, pointer, pointer, pointer, pointer, size]
            library.ergon_scan.restype = None
            library.ergon_measure.argtypes = [pointer, size, pointer]
            library.ergon_measure.restype = ctypes.c_uint64
            library.ergon_add.argtypes = [pointer, size, width, pointer, size, pointer, size]
            return library
    return None


_room = _Room()
_library = _load()
compiled: Final = _library is not None


# --- numpy ----------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """What differed in a part of a block, in words or in elements: where, counted in them, and both bits."""

    places: Positions
    before: Elements
    after: Elements


def _compare(piece: Piece, itemsize: int, done: Callable[[int], None]) -> list[_Found]:
    """Most words of eight bytes are the same, so words are compared wherever they are aligned."""
    addresses = piece.place | piece.base.size | piece.base.ctypes.data | piece.new.ctypes.data
    unit = ELEMENT[itemsize] if addresses % WORD.itemsize else WORD
    found = []
    for start in range(0, piece.base.size, SCAN_BYTES):
        base, new = (side[start : start + SCAN_BYTES].view(unit) for side in (piece.base, piece.new))
        places = np.flatnonzero(base != new)
        if places.size:
            before, after = base.take(places), new.take(places)
            base[places] = after
            places += (piece.place + start) // unit.itemsize
            found.append(_Found(places, before, after))
        done(piece.place + min(start + SCAN_BYTES, piece.base.size))
    return found


def _planes_of(found: Sequence[_Found], itemsize: int) -> Planes | None:
    if not found:
        return None
    parts = [
        _changed_elements(list(alike), ELEMENT[itemsize])
        for _, alike in itertools.groupby(found, lambda each: each.before.itemsize)
    ]
    positions, differences = (np.concatenate(column) for column in zip(*parts, strict=True))
    gaps, zigzag = _gaps(positions), _zigzag(differences)
    return Planes(gaps.size, zigzag.size, [*_split(gaps), *_split(zigzag)])


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


def _gaps(positions: Positions) -> Gaps:
    """The gaps that lead to these places, the first from the block's start."""
    distances = np.empty_like(positions)
    distances[0] = positions[0]
    np.subtract(positions[1:], positions[:-1], out=distances[1:])
    distances[1:] -= 1
    if positions[-1] < PASS or distances.max() < PASS:
        return distances.astype("<u2")
    passes, rest = np.divmod(distances, PASS)
    gaps: Gaps = np.full(positions.size + int(passes.sum()), PASS, "<u2")
    gaps[np.arange(positions.size) + passes.cumsum()] = rest
    return gaps


def _positions(gaps: Gaps) -> Positions:
    """Where they lead."""
    named = gaps != PASS
    positions = gaps.astype(np.int64)
    positions += named
    np.cumsum(positions, out=positions)
    positions -= 1
    found: Positions = positions[named]
    return found


def _zigzag(differences: Elements) -> Elements:
    """Small numbers for small steps up and down."""
    signed = differences.view(f"<i{differences.itemsize}")
    zigzag: Elements = ((signed << 1) ^ (signed >> (8 * differences.itemsize - 1))).view(differences.dtype)
    return zigzag


def _unzigzag(zigzag: Elements) -> Elements:
    """The differences that these numbers stand for."""
    differences: Elements = zigzag & 1
    np.negative(differences, out=differences)
    differences ^= zigzag >> 1
    return differences


def _split(numbers: Elements) -> list[Bytes]:
    """The planes of these numbers."""
    return [(numbers >> shift).astype(np.uint8) for shift in range(0, 8 * numbers.itemsize, 8)]


def _join(planes: Bytes, itemsize: int) -> Elements:
    """The numbers whose bytes lie in planes."""
    first, *others = planes.reshape(itemsize, -1)[::-1]
    numbers: Elements = first.astype(ELEMENT[itemsize])
    for plane in others:
        numbers <<= 8
        numbers |= plane
    return numbers
