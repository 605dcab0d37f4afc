"""What one process can serve, in memory: the newest snapshot, and the deltas that lead to it. Owns which are kept and
for how long, and when a snapshot's memory may be written again; knows no socket, reads no clock.

There is one copy of the newest snapshot, and the next version is written into the same memory, unless somebody fetches
it: then into a second copy, and the old one is kept while it is fetched and the budget allows. Chunks on their way to a
peer are counted (`lend`) until nothing refers to them; memory is freed when nothing refers to it.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from broker.protocol.proofs import Proof
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Bytes, Manifest, flat
from broker.weights import metrics
from broker.weights.chain import DeltaChain, FoldJob, Key, Payload, pays


class OutOfBudgetError(Exception):
    """A snapshot does not fit beside what must be kept; the message says how much is missing and what to set."""


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """Memory in which the next version is made (uint8, writable). `base` describes the snapshot that it holds now."""

    data: Bytes
    base: Manifest | None


@dataclass(frozen=True, slots=True)
class Unsealed:
    """What is served as soon as there is proof of it."""

    key: Key


class WeightStore:
    """Versions by number, and how to get from one to another. Thread-safe; only `begin` waits.

    One thread writes: `begin`, then `commit` or `abort`. `max_bytes` bounds the snapshots, `max_delta_bytes` the deltas
    and again the folded ones. `sealed`: only what there is proof of is served; a delta has its own, a snapshot and what
    is folded wait for `seal`.
    """

    def __init__(self, max_bytes: int, max_delta_bytes: int = 1 << 30, *, sealed: bool = False) -> None:
        self._max_bytes = max_bytes
        self._sealed = sealed
        self._proofs: dict[PolicyVersion, Proof] = {}  # of snapshots
        self._lock = threading.Condition()  # re-entrant: a finalizer may run inside an allocation made under the lock
        self._held: dict[PolicyVersion, Payload] = {}  # anchors
        self._chain = DeltaChain(max_delta_bytes)
        self._newest: Manifest | None = None  # its anchor is not held while the next version is written over it
        self._in_use: frozenset[Key] = frozenset()
        self._lent: Counter[PolicyVersion] = Counter()  # chunks of anchors on their way
        self._live_bytes = 0

    @property
    def newest(self) -> Manifest | None:
        """The newest complete version, as an anchor."""
        with self._lock:
            return self._newest

    @property
    def base(self) -> Payload | None:
        """The newest snapshot; None where none is held whole."""
        with self._lock:
            return self._held.get(self._newest.version) if self._newest else None

    @property
    def versions(self) -> tuple[PolicyVersion, ...]:
        """The versions whose snapshots are held, oldest first."""
        with self._lock:
            return tuple(sorted(self._held))

    @property
    def live_bytes(self) -> int:
        """Memory of all snapshots that exist: held, being filled, or dropped but still on their way to a peer."""
        with self._lock:
            return self._live_bytes

    # --- serving ----------------------------------------------------------------------------------------------------

    def find(self, version: PolicyVersion, have: PolicyVersion | None) -> Payload | FoldJob | Unsealed | None:
        """The cheapest payload that makes `have` this version, which counts as fetched from here on; or the fold that
        is to be made for it, or that there is no proof of it yet; None where the version is not (or no longer, or at
        this moment not) held."""
        with self._lock:
            found = self._chain.find(version, have) if have is not None else None
            if found is None:
                found = self._held.get(version)
            if found is None:
                return None
            self._in_use |= {found.key}
            if isinstance(found, FoldJob):
                found = replace(found, proof=self._proofs.get(version))
            proof = found.proof if isinstance(found, FoldJob) else found.manifest.proof
            return Unsealed(found.key) if self._sealed and proof is None else found

    def delta(self, version: PolicyVersion, have: PolicyVersion) -> Payload | None:
        """The delta that leads straight from `have` to this version, where it is there already."""
        with self._lock:
            return self._chain.held((version, have))

    def add_fold(self, job: FoldJob, made: Payload | None) -> None:
        """Keep what a job made, None where it failed; the anchor is served instead where a fold does not pay."""
        worth = made is not None and pays(made.data.size, made.manifest.total_bytes)
        with self._lock:
            # The chain may have been begun anew meanwhile, with other bytes under the same numbers.
            if self._chain.held(job.deltas[-1].key) is job.deltas[-1]:
                self._chain.add_fold(job.key, made if worth else None, self._in_use)
        if worth:
            metrics.folds.inc()
        self._observe()

    def lend(self, key: Key, index: int) -> Bytes | None:
        """One chunk of a payload, counted until nothing refers to it; None where it is not held. Raises IndexError."""
        version, parent = key
        with self._lock:
            held = self._chain.held(key) if parent is not None else self._held.get(version)
            if held is None:
                return None
            chunk = held.chunk(index)
            self._in_use |= {key}
            if parent is not None:
                return chunk
            # numpy refers views of views to the first array that is no view of another: this one is.
            chunk = np.frombuffer(flat(chunk), np.uint8)
            self._lent[version] += 1
            weakref.finalize(chunk, self._returned, version).atexit = False
            return chunk

    def keep_only(self, in_use: Collection[Key]) -> None:
        """Say which payloads somebody is fetching; older snapshots outside this set are dropped."""
        with self._lock:
            self._in_use = frozenset(in_use)
            self._drop_unused()
        self._observe()

    def seal(self, version: PolicyVersion, proof: Proof) -> None:
        """Keep the proof of a snapshot, where the version is held or deltas lead to it."""
        with self._lock:
            if version in self._known():
                self._proofs[version] = proof
            if self._newest is not None and self._newest.version == version:
                self._newest = replace(self._newest, proof=proof)
            if (held := self._held.get(version)) is not None:
                self._held[version] = Payload(replace(held.manifest, proof=proof), held.data)

    # --- writing ----------------------------------------------------------------------------------------------------

    def begin(self, num_bytes: int, timeout_s: float = 0.0, *, copy: bool = False, beside: bool = False) -> Draft:
        """Memory for the next version, which must be newer than the newest, within the budget.

        It is that of the newest snapshot where this has as many bytes and nobody fetches it; from here on it is not
        served. Else it is new, and holds a copy of the newest snapshot where `copy` asks for that. `beside` asks for
        new memory in any case. Older versions make room, the newest never does. Waits up to `timeout_s` for slow peers
        to let go of versions already dropped. Raises OutOfBudgetError.
        """
        with self._lock:
            base = self.base
            if base is not None and not beside and base.data.size == num_bytes and self._idle(base.version):
                del self._held[base.version]
                base.data.setflags(write=True)
                return Draft(base.data, base.manifest)
            data = self._allocate(num_bytes, timeout_s)
        self._observe()
        if base is None or not copy or base.data.size != num_bytes:
            return Draft(data, None)
        data[:] = base.data
        return Draft(data, base.manifest)

    def commit(self, draft: Draft, manifest: Manifest, delta: Payload | None) -> bool:
        """Hold and serve a complete version; `delta` leads to it from the newest one, if there is one.

        False (and nothing is held) unless it is newer than the newest one.
        """
        with self._lock:
            if self._newest is not None and manifest.version <= self._newest.version:
                self.abort(draft)
                return False
            draft.data.setflags(write=False)
            continues = delta is not None and self._newest is not None and delta.manifest.parent == self._newest.version
            if delta is not None and continues:
                self._chain.append(delta, self._in_use)
            else:
                self._chain.clear()
            self._held[manifest.version] = Payload(manifest, draft.data)
            self._newest = manifest
            if manifest.proof is not None:
                self._proofs[manifest.version] = manifest.proof
            self._drop_unused()
            known = self._known()
            self._proofs = {version: proof for version, proof in self._proofs.items() if version in known}
        metrics.newest_lineage.set(manifest.version.lineage)
        metrics.newest_version.set(manifest.version.version)
        self._observe()
        return True

    def abort(self, draft: Draft) -> None:
        """The version was not finished: its memory is dropped. Where that was the newest snapshot's, nothing is held
        any more, and the next version is an anchor."""
        with self._lock:
            base, newest = draft.base, self._newest
            if base is not None and newest is not None and base.version == newest.version and self.base is None:
                self._newest = None
                self._chain.clear()
        self._observe()

    def _known(self) -> set[PolicyVersion]:
        return self._chain.versions | self._held.keys() | ({self._newest.version} if self._newest else set())

    def _idle(self, version: PolicyVersion) -> bool:
        return (version, None) not in self._in_use and not self._lent[version]

    def _allocate(self, num_bytes: int, timeout_s: float) -> Bytes:
        if 2 * num_bytes > self._max_bytes:
            raise OutOfBudgetError(
                f"two snapshots of {num_bytes} bytes (one served, one arriving) do not fit into the weight channel's "
                f"budget of {self._max_bytes} bytes; raise weights.max_mb to {-(-3 * num_bytes >> 20)} or more"
            )
        for version in self.versions[:-1]:
            if self._fits(num_bytes):
                break
            del self._held[version]
        if not self._lock.wait_for(lambda: self._fits(num_bytes), timeout_s):
            raise OutOfBudgetError(
                f"a snapshot of {num_bytes} bytes does not fit beside the {self._live_bytes} bytes still in use by "
                f"slow peers; the budget is {self._max_bytes} bytes: raise weights.max_mb"
            )
        data = np.empty(num_bytes, np.uint8)
        self._live_bytes += num_bytes
        weakref.finalize(data, self._freed, num_bytes).atexit = False
        return data

    def _fits(self, num_bytes: int) -> bool:
        return self._live_bytes + num_bytes <= self._max_bytes

    def _drop_unused(self) -> None:
        for version in self.versions:
            superseded = self._newest is None or version < self._newest.version
            if superseded and (version, None) not in self._in_use:
                del self._held[version]

    def _freed(self, num_bytes: int) -> None:
        with self._lock:  # no metric is touched here: a finalizer may run anywhere, even inside a metric's own lock
            self._live_bytes -= num_bytes
            self._lock.notify_all()

    def _returned(self, version: PolicyVersion) -> None:
        with self._lock:
            self._lent[version] -= 1
            if not self._lent[version]:
                del self._lent[version]

    def _observe(self) -> None:
        with self._lock:
            num_versions, num_deltas = len(self._held), self._chain.num_deltas
            live_bytes, delta_bytes = self._live_bytes, self._chain.num_bytes
        metrics.held_versions.set(num_versions)
        metrics.held_deltas.set(num_deltas)
        metrics.held_bytes.set(live_bytes)
        metrics.held_delta_bytes.set(delta_bytes)
