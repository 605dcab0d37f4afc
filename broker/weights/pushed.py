"""The receiver's place for a delta that came unasked: the newest one alone, until it is fetched for or of no use.

Owns how much memory such deltas may take, and the parts of one that is still being made; counts what became of each.
Verifies no byte: what is taken goes through the fetch as if it had been asked for. Knows no socket.
"""

from __future__ import annotations

import threading

import numpy as np

from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weight_messages import Part, Pushed
from broker.weights import metrics
from broker.weights.chain import Payload

TAKEN, DROPPED = "taken", "dropped"


class PushSlot:
    """Holds at most one payload, and the parts of one, each of at most `max_bytes`; 0: none at all. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: Payload | None = None
        self._parts: list[Part] = []  # of one payload, from its beginning on, without a gap

    def put_part(self, part: Part) -> bool:
        """One has arrived: whether it is kept, which it is where it is the first of a payload or follows on those held.
        Those of another payload are forgotten."""
        with self._lock:
            if self._parts and (part.start == 0 or part[:2] != self._parts[0][:2] or part.start != self._part_bytes):
                self._parts.clear()
            if part.start != self._part_bytes or part.start + part.data.size > self.max_bytes:
                return False
            self._parts.append(part)
            return True

    def put(self, pushed: Pushed) -> Payload | None:
        """A push has arrived: the whole, where it is kept, which it is where it is newer than what is held, not too
        large, and what it lacks is there in parts."""
        with self._lock:
            whole = self._whole(pushed)
            self._parts.clear()
            newer = whole is not None and (self._held is None or self._held.version < whole.version)
            kept = whole if whole is not None and newer and whole.data.size <= self.max_bytes else None
            dropped = kept is None or self._held is not None
            self._held = kept or self._held
        if dropped:
            metrics.pushes_received.labels(DROPPED).inc()
        return kept

    def take(self, version: PolicyVersion, have: PolicyVersion | None) -> Payload | None:
        """The payload that makes `have` this version, if it has come; nothing is held afterwards."""
        with self._lock:
            held, self._held = self._held, None
        if held is None:
            return None
        fits = held.key == (version, have)
        metrics.pushes_received.labels(TAKEN if fits else DROPPED).inc()
        return held if fits else None

    def coming(self) -> tuple[PolicyVersion, PolicyVersion] | None:
        """The version and the parent of the delta that parts have come of."""
        with self._lock:
            return (self._parts[0].version, self._parts[0].parent) if self._parts else None

    def parts(self, version: PolicyVersion, start: int) -> list[Part]:
        """Those of the delta to this version from byte `start` on."""
        with self._lock:
            return [part for part in self._parts if part.version == version and part.start >= start]

    def forget_parts(self) -> None:
        """Nobody waits for the rest of them."""
        with self._lock:
            self._parts.clear()

    @property
    def _part_bytes(self) -> int:
        return sum(part.data.size for part in self._parts)

    def _whole(self, pushed: Pushed) -> Payload | None:
        if not pushed.sent_bytes:
            return Payload(pushed.manifest, pushed.rest)
        key = (pushed.manifest.version, pushed.manifest.parent)
        if not self._parts or self._parts[0][:2] != key or self._part_bytes != pushed.sent_bytes:
            return None
        return Payload(pushed.manifest, np.concatenate([*(part.data for part in self._parts), pushed.rest]))
