"""The learner's end of the weight channel: `WeightPublisher` serves the newest version, and deltas to the ones before.

It owns the one snapshot it serves, never the live weights: `publish` compares them with that snapshot, tensor by
tensor, and writes what changed into it. A version is announced and served only when it is complete.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from broker.process.lifecycle import ErgonError
from broker.process.security import OPEN, Security
from broker.protocol import delta_loops, weights
from broker.protocol.deltas import OfRecord, nothing_more
from broker.protocol.hashes import Leaves
from broker.protocol.proofs import Of
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weight_messages import Part
from broker.protocol.weights import DTYPES, Buffer, Manifest, flat
from broker.weights import metrics
from broker.weights.chain import Payload
from broker.weights.filling import Changed, Diff, Read, continues_base, fill, source_of
from broker.weights.pushing import Ahead
from broker.weights.sealing import Sealer
from broker.weights.server import WeightServer
from broker.weights.store import OutOfBudgetError, WeightStore
from broker.weights.threads import coding_run
from broker.weights.vouching import sign

logger = logging.getLogger(__name__)

PART_BYTES = 128 << 10  # of a delta that is sent while it is made: a millisecond of a link of 1 Gbit/s


@dataclass(frozen=True, slots=True)
class PublishStats:
    """What one `publish` did. `full`: nothing but the snapshot was published, so all elements count as changed."""

    num_bytes: int
    num_tensors: int
    seconds: float
    num_changed: int
    num_elements: int
    payload_bytes: int
    full: bool


class WeightPublisher:
    """Serves the newest weights of this process on `bind_endpoint` from its own thread.

    Raises ErgonError where it cannot bind. `max_bytes` bounds the memory of all snapshots (two must fit),
    `max_delta_bytes` that of the deltas, and again of the folded ones.
    """

    def __init__(
        self,
        bind_endpoint: str,
        run_id: str,
        *,
        chunk_bytes: int = 1 << 20,
        max_bytes: int = 8 << 30,
        max_delta_bytes: int = 1 << 30,
        heartbeat_s: float = 1.0,
        liveness: int = 15,
        security: Security = OPEN,
    ) -> None:
        self._run_id = run_id
        self._chunk_bytes = chunk_bytes
        self._patience_s = 2 * heartbeat_s * liveness  # by then a peer that reads nothing is gone, and its memory free
        self._last: PolicyVersion | None = None  # announced, whether or not it is still served
        self._delta_bytes = 0  # of its payload as a delta; 0: there was none
        self._key = security.signing_key
        self._store = WeightStore(max_bytes, max_delta_bytes, sealed=self._key is not None)
        self._server = WeightServer(
            bind_endpoint, run_id, self._store, heartbeat_s=heartbeat_s, liveness=liveness, security=security
        )
        self.endpoint = self._server.endpoint
        self._sealer = Sealer(self._store, self._key, self._server.announce) if self._key is not None else None
        if not delta_loops.compiled:
            logger.warning("deltas are made by numpy, at half the speed reason=installed without a C compiler")

    @property
    def newest(self) -> PolicyVersion | None:
        """The version being served."""
        newest = self._store.newest
        return newest.version if newest else None

    @property
    def num_peers(self) -> int:
        """Relays, actors and operators connected."""
        return self._server.num_peers

    def publish(
        self, version: PolicyVersion, tensors: Iterable[tuple[str, str, Sequence[int], Buffer]]
    ) -> PublishStats:
        """`publish_from` tensors that are all there: (name, dtype as in torch, shape, contiguous little-endian bytes).

        All of them are checked before anything is written.
        """
        given = list(tensors)
        sources = {name: data for name, _, _, data in given}
        layout = [(name, dtype, tuple(shape)) for name, dtype, shape, _ in given]
        for spec in weights.lay_out(layout):
            source_of(spec, sources[spec.name])
        return self.publish_from(version, layout, sources.__getitem__)

    def publish_from(
        self,
        version: PolicyVersion,
        layout: Iterable[tuple[str, str, Sequence[int]]],
        read: Read,
        changed: Changed | None = None,
    ) -> PublishStats:
        """Compare with the version before, copy, hash, switch, announce. `layout` is (name, dtype as in torch, shape).

        `read(name)` gives a tensor's contiguous little-endian bytes. It is called once for each, in the order of the
        snapshot; the bytes may change once this returns, and their memory is let go of when they are compared, which is
        not more than some blocks later. `changed(name)`,
        where it is given, is asked first wherever the version before is still there to be changed: what it knows of the
        difference to that version is taken as all of it, and `read` is asked where it knows nothing.

        Raises ValueError for tensors or a version that cannot be published, ErgonError where the memory budget is too
        small; the version served before then stays. Where `read` fails, nothing is published, and if the version before
        had to give its memory, nothing is served until the next one.
        """
        if self._server.failure is not None:
            raise self._server.failure
        if self._sealer is not None:
            self._sealer.wait()
        started = time.monotonic()
        if self._last is not None and version <= self._last:
            raise ValueError(f"version {tuple(version)} is not newer than {tuple(self._last)}, which was published")
        specs = weights.lay_out((name, dtype, tuple(shape)) for name, dtype, shape in layout)
        continues = continues_base(self._store.newest, version, specs)
        try:
            draft = self._store.begin(
                specs[-1].offset + specs[-1].num_bytes, timeout_s=self._patience_s, copy=continues
            )
        except OutOfBudgetError as error:
            raise ErgonError(str(error)) from error
        try:
            based = continues and draft.base is not None
            leaves = Leaves(flat(draft.data)) if based else None
            parts = self._parts(version, draft.base.version) if based and draft.base is not None else nothing_more
            diff = fill(draft, specs, read, changed if based else None, leaves, parts)
            manifest = weights.describe(
                self._run_id, version, specs, draft.data, self._chunk_bytes, time.time(), coding_run(), leaves
            )
            delta = None
            if diff is not None and draft.base is not None:
                described = weights.describe_delta(manifest, draft.base.version, diff.payload)
                if self._key is not None:
                    described = replace(described, proof=sign(described, Of.PAYLOAD, diff.payload, self._key))
                delta = Payload(described, diff.payload)
        except BaseException:
            self._store.abort(draft)
            self._server.push_part(None)
            self._server.announce()
            raise
        self._store.commit(draft, manifest, delta)
        self._last = version
        self._delta_bytes = delta.data.size if delta is not None else 0
        self._server.announce()
        if self._sealer is not None:
            self._sealer.begin()
        stats = _stats(manifest, diff, time.monotonic() - started)
        _observe(stats)
        logger.info("published version=%s %s", tuple(version), stats)
        return stats

    def _parts(self, version: PolicyVersion, parent: PolicyVersion) -> OfRecord:
        """What to do with the records of a delta as they are made: send them ahead, where the delta is likely to be as
        small as the one before."""
        if not self._delta_bytes:
            return nothing_more
        expected_bytes, made, num_sent = self._delta_bytes + self._delta_bytes // 4, bytearray(), 0

        def send(record: bytes) -> None:
            nonlocal made, num_sent
            made += record
            if len(made) >= PART_BYTES:
                part = Part(version, parent, num_sent, np.frombuffer(made, np.uint8))
                self._server.push_part(Ahead(part, expected_bytes))
                made, num_sent = bytearray(), num_sent + len(made)

        return send

    def close(self) -> None:
        """Stop serving. Idempotent."""
        if self._sealer is not None:
            self._sealer.close()
        self._server.close()


def _stats(manifest: Manifest, diff: Diff | None, seconds: float) -> PublishStats:
    num_elements = sum(spec.num_bytes // DTYPES[spec.dtype][1] for spec in manifest.tensors)
    return PublishStats(
        num_bytes=manifest.total_bytes,
        num_tensors=len(manifest.tensors),
        seconds=seconds,
        num_changed=num_elements if diff is None else diff.num_changed,
        num_elements=num_elements,
        payload_bytes=manifest.total_bytes if diff is None else diff.payload.size,
        full=diff is None,
    )


def _observe(stats: PublishStats) -> None:
    kind = metrics.ANCHOR if stats.full else metrics.DELTA
    metrics.publish_seconds.observe(stats.seconds)
    metrics.published_versions.labels(kind).inc()
    metrics.published_bytes.labels(kind).inc(stats.payload_bytes)
    metrics.compression.set(stats.num_bytes / max(stats.payload_bytes, 1))
    if not stats.full:
        metrics.changed_fraction.set(stats.num_changed / stats.num_elements)
