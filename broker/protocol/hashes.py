"""The weight channel's hash, and how independent pieces of work are run. Pure: no socket, no file, no thread.

The digest of at most `LEAF_BYTES` is XXH3-128 of them, big-endian; that of more bytes is XXH3-128 of the digests of
their leaves in order, where all leaves but the last have `LEAF_BYTES`. So leaves can be hashed side by side, and the
digests of a snapshot's chunks follow from those of its leaves. It finds damage, not malice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Final, Protocol, TypeVar

import xxhash

LEAF_BYTES: Final = 1 << 20
RUN_LEAVES: Final = 8  # leaves in one piece of work: fewer would be dearer to hand out than to hash

T = TypeVar("T")
R = TypeVar("R")


class Run(Protocol):
    """Does independent pieces of work: the built-in `map`, or that of some threads. Results come in order."""

    def __call__(self, work: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        """Nothing is promised to have been done before all results were taken."""
        ...


class Start(Protocol):
    """Begins a piece of work, whose result or failure the future will have."""

    def __call__(self, work: Callable[[T], R], item: T, /) -> Future[R]:
        """Does not wait for others."""
        ...


def at_once(work: Callable[[T], R], item: T, /) -> Future[R]:
    """A Start without threads: it is done before this returns."""
    future: Future[R] = Future()
    try:
        future.set_result(work(item))
    except Exception as error:  # noqa: BLE001  whatever it was, who asks for the result gets it
        future.set_exception(error)
    return future


def digest(data: memoryview, run: Run = map) -> bytes:
    """The digest of a one-dimensional view of bytes."""
    if data.nbytes <= LEAF_BYTES:
        return xxhash.xxh3_128_digest(data)
    return join(leaves(data, run))


def leaves(data: memoryview, run: Run = map) -> list[bytes]:
    """The digests of the leaves of a one-dimensional view of bytes, in order."""
    step = RUN_LEAVES * LEAF_BYTES
    pieces = (data[start : start + step] for start in range(0, data.nbytes, step))
    return [leaf for some in run(_leaves, pieces) for leaf in some]


class Leaves:
    """The digests of the leaves of some bytes, hashed range by range as these come to be what they shall be."""

    def __init__(self, data: memoryview) -> None:
        """data: one-dimensional, referred to."""
        self._data = data
        self._digests: list[bytes | None] = [None] * -(-data.nbytes // LEAF_BYTES)

    def hash(self, start: int, end: int) -> None:
        """Hash the leaves that lie wholly within these bytes, which must not change any more. Threads may hash
        different ranges side by side."""
        for index in range(-(-start // LEAF_BYTES), self._after(end)):
            self._digests[index] = self._digest(index)

    def follow(self, start: int) -> Following:
        """For one who goes through these bytes from `start` on, and hashes while they are still near the core."""
        return Following(self, start)

    def finish(self, run: Run = map) -> list[bytes]:
        """All of them, in order; those that are missing are hashed now."""
        missing = [index for index, digest in enumerate(self._digests) if digest is None]
        pieces = [missing[i : i + RUN_LEAVES] for i in range(0, len(missing), RUN_LEAVES)]
        for piece, digests in zip(pieces, run(self._all, pieces), strict=True):
            for index, digest in zip(piece, digests, strict=True):
                self._digests[index] = digest
        return [digest for digest in self._digests if digest is not None]

    def _after(self, end: int) -> int:
        """The first leaf that is not whole before this byte."""
        return len(self._digests) if end == self._data.nbytes else end // LEAF_BYTES

    def _all(self, indices: Sequence[int]) -> list[bytes]:
        return [self._digest(index) for index in indices]

    def _digest(self, index: int) -> bytes:
        return xxhash.xxh3_128_digest(self._data[index * LEAF_BYTES : (index + 1) * LEAF_BYTES])


class Following:
    """Hashes of `leaves` the bytes that one thread has gone through, as far as they are whole leaves in the end."""

    def __init__(self, leaves: Leaves, start: int) -> None:
        self._leaves = leaves
        self._leaf = xxhash.xxh3_128()
        self._at = -(-start // LEAF_BYTES) * LEAF_BYTES  # before it there is the rest of a leaf that began elsewhere

    def to(self, end: int) -> None:
        """These are as they shall be, up to this byte."""
        data, digests = self._leaves._data, self._leaves._digests
        while self._at < end:
            leaf_end = min((self._at // LEAF_BYTES + 1) * LEAF_BYTES, data.nbytes)
            stop = min(end, leaf_end)
            self._leaf.update(data[self._at : stop])
            if stop == leaf_end:
                digests[self._at // LEAF_BYTES] = self._leaf.digest()
                self._leaf.reset()
            self._at = stop


def join(digests: Sequence[bytes]) -> bytes:
    """The digest of the bytes that have these leaves, at least one."""
    return digests[0] if len(digests) == 1 else xxhash.xxh3_128_digest(b"".join(digests))


class Hasher:
    """The digest of bytes that come piece by piece."""

    def __init__(self) -> None:
        self._leaf = xxhash.xxh3_128()
        self._room = LEAF_BYTES
        self._leaves: list[bytes] = []

    def update(self, data: memoryview) -> None:
        """The next bytes, a one-dimensional view."""
        view = data
        while view.nbytes:
            if not self._room:
                self._leaves.append(self._leaf.digest())
                self._leaf.reset()
                self._room = LEAF_BYTES
            taken = view[: self._room]
            self._leaf.update(taken)
            self._room -= taken.nbytes
            view = view[taken.nbytes :]

    def digest(self) -> bytes:
        """Of all bytes so far."""
        return join([*self._leaves, self._leaf.digest()])


def _leaves(data: memoryview) -> list[bytes]:
    return [xxhash.xxh3_128_digest(data[start : start + LEAF_BYTES]) for start in range(0, data.nbytes, LEAF_BYTES)]
