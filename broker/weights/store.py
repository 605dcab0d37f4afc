"""The versions one process can serve, in memory. Owns which are kept and for how long; knows no socket, reads no clock.

The newest version is always kept. An older one is kept only while somebody fetches it and the byte budget allows.
A snapshot's memory is freed when nothing refers to it: messages on their way to a peer keep it alive, and count.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Bytes, Manifest
from broker.weights import metrics


class OutOfBudgetError(Exception):
    """A snapshot does not fit beside what must be kept; the message says how much is missing and what to set."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A complete, verified version: its manifest and its bytes (uint8, read-only, [total_bytes])."""

    manifest: Manifest
    data: Bytes

    @property
    def version(self) -> PolicyVersion:
        """The version these weights are."""
        return self.manifest.version

    def chunk(self, index: int) -> Bytes:
        """A view of one chunk. Raises IndexError."""
        start, end = self.manifest.chunk_range(index)
        return self.data[start:end]


class WeightStore:
    """Complete versions by number. Thread-safe; every method returns at once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Condition()  # re-entrant: a finalizer may run inside an allocation made under the lock
        self._held: dict[PolicyVersion, Snapshot] = {}
        self._in_use: frozenset[PolicyVersion] = frozenset()
        self._live_bytes = 0

    @property
    def newest(self) -> Snapshot | None:
        """The newest version held."""
        with self._lock:
            return self._held[max(self._held)] if self._held else None

    @property
    def versions(self) -> tuple[PolicyVersion, ...]:
        """All versions held, oldest first."""
        with self._lock:
            return tuple(sorted(self._held))

    @property
    def live_bytes(self) -> int:
        """Memory of all snapshots that exist: held, being filled, or dropped but still on their way to a peer."""
        with self._lock:
            return self._live_bytes

    def get(self, version: PolicyVersion) -> Snapshot | None:
        """This version, or None if it is not (or no longer) held."""
        with self._lock:
            return self._held.get(version)

    def allocate(self, num_bytes: int, timeout_s: float = 0.0) -> Bytes:
        """Memory for a snapshot, within the budget; older versions make room, the newest never does.

        Waits up to `timeout_s` for slow peers to let go of versions already dropped. Raises OutOfBudgetError.
        """
        if 2 * num_bytes > self._max_bytes:
            raise OutOfBudgetError(
                f"two snapshots of {num_bytes} bytes (one served, one arriving) do not fit into the weight channel's "
                f"budget of {self._max_bytes} bytes; raise weights.max_mb to {-(-3 * num_bytes >> 20)} or more"
            )
        with self._lock:
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
        self._observe()
        return data

    def put(self, snapshot: Snapshot) -> bool:
        """Hold a complete version; False (and nothing happens) unless it is newer than the newest one."""
        with self._lock:
            if self._held and snapshot.version <= max(self._held):
                return False
            self._held[snapshot.version] = snapshot
            self._drop_unused()
        metrics.newest_lineage.set(snapshot.version.lineage)
        metrics.newest_version.set(snapshot.version.version)
        self._observe()
        return True

    def mark_in_use(self, version: PolicyVersion) -> None:
        """Say that somebody has begun to fetch this version; it counts until the next `keep_only`."""
        with self._lock:
            self._in_use |= {version}

    def keep_only(self, in_use: Collection[PolicyVersion]) -> None:
        """Say which versions somebody is fetching; older ones outside this set are dropped."""
        with self._lock:
            self._in_use = frozenset(in_use)
            self._drop_unused()
        self._observe()

    def _fits(self, num_bytes: int) -> bool:
        return self._live_bytes + num_bytes <= self._max_bytes

    def _drop_unused(self) -> None:
        for version in self.versions[:-1]:
            if version not in self._in_use:
                del self._held[version]

    def _freed(self, num_bytes: int) -> None:
        with self._lock:  # no metric is touched here: a finalizer may run anywhere, even inside a metric's own lock
            self._live_bytes -= num_bytes
            self._lock.notify_all()

    def _observe(self) -> None:
        metrics.held_versions.set(len(self._held))
        metrics.held_bytes.set(self._live_bytes)
