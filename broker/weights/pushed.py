"""The receiver's place for a delta that came unasked: the newest one alone, until it is fetched for or of no use.

Owns how much memory such deltas may take, and counts what became of each. Verifies no byte: what is taken goes through
the fetch as if it had been asked for. Knows no socket.
"""

from __future__ import annotations

import threading

from broker.protocol.trajectory import PolicyVersion
from broker.weights import metrics
from broker.weights.chain import Payload

TAKEN, DROPPED = "taken", "dropped"


class PushSlot:
    """Holds at most one payload of at most `max_bytes`; 0: none at all. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: Payload | None = None

    def put(self, push: Payload) -> bool:
        """One has arrived: whether it is kept, which it is where it is newer than what is held and not too large."""
        with self._lock:
            dropped: Payload | None = push
            if push.data.size <= self.max_bytes and (self._held is None or self._held.version < push.version):
                dropped, self._held = self._held, push
        if dropped is not None:
            metrics.pushes_received.labels(DROPPED).inc()
        return dropped is not push

    def take(self, version: PolicyVersion, have: PolicyVersion | None) -> Payload | None:
        """The payload that makes `have` this version, if it has come; nothing is held afterwards."""
        with self._lock:
            held, self._held = self._held, None
        if held is None:
            return None
        fits = held.key == (version, have)
        metrics.pushes_received.labels(TAKEN if fits else DROPPED).inc()
        return held if fits else None
