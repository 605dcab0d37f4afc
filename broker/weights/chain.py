"""The deltas that lead to the newest version, and folds of consecutive ones. Owns which are kept within a byte budget.

Holds payloads only: never a snapshot, a socket or a lock (the store's guards it). It makes no fold either: it says
which deltas one is made of, and keeps what it is given.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from broker.protocol.deltas import fold
from broker.protocol.proofs import Proof
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Bytes, Manifest, describe_delta

KEPT_SHARE: Final = 4  # of the snapshot, deltas that are kept have one part in so many at most

Key = tuple[PolicyVersion, PolicyVersion | None]  # of a payload: its version and its parent


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """A version as it travels, complete and verified: its manifest and its bytes (uint8, read-only, [payload_bytes]).
    Of an anchor these are the snapshot, of a delta the packed changes."""

    manifest: Manifest
    data: Bytes

    @property
    def version(self) -> PolicyVersion:
        """The version these weights are."""
        return self.manifest.version

    @property
    def key(self) -> Key:
        """What names it on the wire."""
        return self.manifest.version, self.manifest.parent

    def chunk(self, index: int) -> Bytes:
        """A view of one chunk. Raises IndexError."""
        start, end = self.manifest.chunk_range(index)
        return self.data[start:end]


@dataclass(frozen=True, slots=True)
class FoldJob:
    """Consecutive deltas, of which one is to be made. `run` may take long and needs no lock."""

    deltas: tuple[Payload, ...]
    proof: Proof | None = None  # of the snapshot that they lead to

    @property
    def key(self) -> Key:
        """Of what it makes."""
        return self.deltas[-1].version, self.deltas[0].manifest.parent

    def run(self) -> Payload:
        """One delta with the effect of all. Raises ProtocolError where memory that holds one was damaged."""
        first, last = self.deltas[0].manifest, self.deltas[-1].manifest
        assert first.parent is not None
        data = fold([delta.data for delta in self.deltas], last.tensors)
        return Payload(replace(describe_delta(last, first.parent, data), proof=self.proof), data)


class DeltaChain:
    """Deltas of one lineage and layout, each the child of the one before, and the folds made of them.

    `max_bytes` bounds the deltas, and again the folds, and so does a KEPT_SHARE of the snapshot, but for the newest of
    each: the oldest are forgotten first, of the folds only those that nobody fetches. What was forgotten and is still
    on its way to a slow peer counts among the deltas until nothing refers to it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._links: list[Payload] = []
        self._folds: OrderedDict[Key, Payload | None] = OrderedDict()  # None: not worth it, or it could not be made
        self._forgotten: list[weakref.ref[Bytes]] = []  # who owns the memory of what was forgotten

    @property
    def num_bytes(self) -> int:
        """Memory of all deltas and folds, those included that are forgotten and still on their way to a peer."""
        return self._fold_bytes + self._link_bytes + self._forgotten_bytes()

    @property
    def _link_bytes(self) -> int:
        return sum(link.data.size for link in self._links)

    @property
    def _fold_bytes(self) -> int:
        return sum(held.data.size for held in self._folds.values() if held is not None)

    @property
    def versions(self) -> set[PolicyVersion]:
        """What the deltas lead to."""
        return {link.version for link in self._links}

    @property
    def num_deltas(self) -> int:
        """Deltas held, without the folds."""
        return len(self._links)

    def clear(self) -> None:
        """Forget everything: what comes next is an anchor, or does not continue what is held."""
        for held in (*self._links, *self._folds.values()):
            self._forget(held)
        self._links.clear()
        self._folds.clear()

    def append(self, delta: Payload, in_use: Collection[Key]) -> None:
        """The newest version's delta; its parent is the version that was the newest. Folds to older versions are
        forgotten, but for those being fetched."""
        if self._links and self._links[-1].version != delta.manifest.parent:
            raise ValueError(f"a delta to {delta.manifest.parent} does not continue {self._links[-1].version}")
        self._links.append(delta)
        for key in [key for key in self._folds if key not in in_use]:
            self._forget(self._folds.pop(key))
        enough = delta.manifest.total_bytes // KEPT_SHARE
        while self._links and (
            self._link_bytes + self._forgotten_bytes() > self._max_bytes
            or (len(self._links) > 1 and self._link_bytes > enough)
        ):
            self._forget(self._links.pop(0))

    def add_fold(self, key: Key, made: Payload | None, in_use: Collection[Key]) -> None:
        """Keep what a FoldJob made; None where the anchor is to be served instead, as it is where the fold does not fit
        beside those being fetched: to forget one of these would only have it made again."""
        self._folds[key] = made
        for other in [other for other in self._folds if other != key and other not in in_use]:
            if made is None or self._fold_bytes <= min(self._max_bytes, made.manifest.total_bytes // KEPT_SHARE):
                return
            self._forget(self._folds.pop(other))
        if self._fold_bytes > self._max_bytes:
            self._folds[key] = None

    def held(self, key: Key) -> Payload | None:
        """The delta or fold of this name."""
        if (found := self._folds.get(key)) is not None:
            self._folds.move_to_end(key)
            return found
        return next((link for link in self._links if link.key == key), None)

    def find(self, version: PolicyVersion, have: PolicyVersion) -> Payload | FoldJob | None:
        """The way from `have` to `version`: a payload, a fold that is still to be made, or None where there is none
        that pays."""
        if (found := self.held((version, have))) is not None:
            return found
        if (version, have) in self._folds:
            return None
        starts = [i for i, link in enumerate(self._links) if link.manifest.parent == have]
        ends = [i for i, link in enumerate(self._links) if link.version == version]
        if not starts or not ends or starts[0] >= ends[0]:
            return None
        links = tuple(self._links[starts[0] : ends[0] + 1])
        # A fold is smaller than its parts where they change the same elements, but not by so much.
        pays = sum(link.data.size for link in links) < links[-1].manifest.total_bytes
        return FoldJob(links) if pays else None

    def _forget(self, held: Payload | None) -> None:
        if held is not None:
            self._forgotten.append(weakref.ref(_owner(held.data)))

    def _forgotten_bytes(self) -> int:
        """Of what something refers to still: a message on its way, a fold that is being made."""
        alive = {id(owner): owner for ref in self._forgotten if (owner := ref()) is not None}
        self._forgotten = [weakref.ref(owner) for owner in alive.values()]
        return sum(owner.nbytes for owner in alive.values())


def _owner(data: Bytes) -> Bytes:
    """The array that every view of these bytes refers to."""
    while isinstance(data.base, np.ndarray):
        data = data.base
    return data


def pays(num_bytes: int, total_bytes: int) -> bool:
    """Whether a delta of so many bytes is worth its while against a snapshot of `total_bytes`."""
    return 2 * num_bytes < total_bytes
