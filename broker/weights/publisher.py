"""The learner's end of the weight channel: `WeightPublisher` serves the newest version.

It owns the snapshots it serves, never the live weights: `publish` copies them once and returns. A version is announced
and served only when it is complete.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from broker.process.lifecycle import ErgonError
from broker.process.security import OPEN, Security
from broker.protocol import weights
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Buffer, Bytes, TensorSpec, flat
from broker.weights import metrics
from broker.weights.server import WeightServer
from broker.weights.store import OutOfBudgetError, Snapshot, WeightStore

logger = logging.getLogger(__name__)


def _copy(specs: Sequence[TensorSpec], sources: Mapping[str, Buffer], snapshot: Bytes) -> None:
    """Fill the snapshot and make it read-only. Raises ValueError where the bytes do not fit the description."""
    target = flat(snapshot)
    for spec in specs:
        try:
            source = flat(sources[spec.name])
        except TypeError as error:
            raise ValueError(f"tensor {spec.name!r} is not contiguous; make it so before publishing") from error
        if source.nbytes != spec.num_bytes:
            raise ValueError(
                f"tensor {spec.name!r} has {source.nbytes} bytes; {spec.dtype} {list(spec.shape)} has {spec.num_bytes}"
            )
        target[spec.offset : spec.offset + spec.num_bytes] = source
    snapshot.setflags(write=False)


@dataclass(frozen=True, slots=True)
class PublishStats:
    """What one `publish` did."""

    num_bytes: int
    num_tensors: int
    seconds: float


class WeightPublisher:
    """Serves the newest weights of this process on `bind_endpoint` from its own thread.

    Raises ErgonError where it cannot bind. `max_bytes` bounds the memory of all snapshots; two must fit.
    """

    def __init__(
        self,
        bind_endpoint: str,
        run_id: str,
        *,
        chunk_bytes: int = 4 << 20,
        max_bytes: int = 8 << 30,
        heartbeat_s: float = 1.0,
        liveness: int = 15,
        security: Security = OPEN,
    ) -> None:
        self._run_id = run_id
        self._chunk_bytes = chunk_bytes
        self._patience_s = 2 * heartbeat_s * liveness  # by then a peer that reads nothing is gone, and its memory free
        self._store = WeightStore(max_bytes)
        self._server = WeightServer(
            bind_endpoint, run_id, self._store, heartbeat_s=heartbeat_s, liveness=liveness, security=security
        )
        self.endpoint = self._server.endpoint

    @property
    def newest(self) -> PolicyVersion | None:
        """The version being served."""
        snapshot = self._store.newest
        return snapshot.version if snapshot else None

    @property
    def num_peers(self) -> int:
        """Relays, actors and operators connected."""
        return self._server.num_peers

    def publish(
        self, version: PolicyVersion, tensors: Iterable[tuple[str, str, Sequence[int], Buffer]]
    ) -> PublishStats:
        """Copy, hash, switch, announce. Tensors are (name, dtype as in torch, shape, contiguous little-endian bytes).

        The bytes may change once this returns. Raises ValueError for tensors or a version that cannot be published,
        ErgonError where the memory budget is too small; the version served before then stays.
        """
        if self._server.failure is not None:
            raise self._server.failure
        started = time.monotonic()
        newest = self.newest
        if newest is not None and version <= newest:
            raise ValueError(f"version {tuple(version)} is not newer than {tuple(newest)}, which is being served")
        given = list(tensors)
        specs = weights.lay_out((name, dtype, tuple(shape)) for name, dtype, shape, _ in given)
        sources = {name: data for name, _, _, data in given}
        try:
            snapshot = self._store.allocate(specs[-1].offset + specs[-1].num_bytes, timeout_s=self._patience_s)
        except OutOfBudgetError as error:
            raise ErgonError(str(error)) from error
        _copy(specs, sources, snapshot)
        manifest = weights.describe(self._run_id, version, specs, snapshot, self._chunk_bytes, time.time())
        self._store.put(Snapshot(manifest, snapshot))
        self._server.announce()
        stats = PublishStats(snapshot.size, len(specs), time.monotonic() - started)
        metrics.publish_seconds.observe(stats.seconds)
        metrics.published_bytes.inc(stats.num_bytes)
        logger.info("published version=%s bytes=%d seconds=%.3f", tuple(version), stats.num_bytes, stats.seconds)
        return stats

    def close(self) -> None:
        """Stop serving. Idempotent."""
        self._server.close()
