"""The learner's end of the weight channel: `WeightPublisher` serves the newest version, and deltas to the ones before.

It owns the one snapshot it serves, never the live weights: `publish` compares them with that snapshot, tensor by
tensor, and writes what changed into it. A version is announced and served only when it is complete.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from broker.process.lifecycle import ErgonError
from broker.process.security import OPEN, Security
from broker.protocol import delta_loops, weights
from broker.protocol.deltas import DeltaEncoder
from broker.protocol.hashes import Leaves
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import DTYPES, Buffer, Bytes, Manifest, TensorSpec, flat
from broker.weights import metrics
from broker.weights.chain import Payload, pays
from broker.weights.server import WeightServer
from broker.weights.store import Draft, OutOfBudgetError, WeightStore
from broker.weights.threads import coding_run, coding_start

logger = logging.getLogger(__name__)

Read = Callable[[str], Buffer]


class Changes(NamedTuple):
    """What changed in a tensor: positions (int64) of elements, and their new bits as unsigned integers of that size."""

    positions: npt.NDArray[np.int64]
    elements: npt.NDArray[Any]


Changed = Callable[[str], Changes | None]


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
        chunk_bytes: int = 4 << 20,
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
        self._store = WeightStore(max_bytes, max_delta_bytes)
        self._server = WeightServer(
            bind_endpoint, run_id, self._store, heartbeat_s=heartbeat_s, liveness=liveness, security=security
        )
        self.endpoint = self._server.endpoint
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
            _source(spec, sources[spec.name])
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
        started = time.monotonic()
        if self._last is not None and version <= self._last:
            raise ValueError(f"version {tuple(version)} is not newer than {tuple(self._last)}, which was published")
        specs = weights.lay_out((name, dtype, tuple(shape)) for name, dtype, shape in layout)
        continues = _continues(self._store.newest, version, specs)
        try:
            draft = self._store.begin(
                specs[-1].offset + specs[-1].num_bytes, timeout_s=self._patience_s, copy=continues
            )
        except OutOfBudgetError as error:
            raise ErgonError(str(error)) from error
        try:
            based = continues and draft.base is not None
            leaves = Leaves(flat(draft.data)) if based else None
            diff = _fill(draft, specs, read, changed if based else None, leaves)
            manifest = weights.describe(
                self._run_id, version, specs, draft.data, self._chunk_bytes, time.time(), coding_run(), leaves
            )
            delta = None
            if diff is not None and draft.base is not None:
                delta = Payload(weights.describe_delta(manifest, draft.base.version, diff.payload), diff.payload)
        except BaseException:
            self._store.abort(draft)
            self._server.announce()
            raise
        self._store.commit(draft, manifest, delta)
        self._last = version
        self._server.announce()
        stats = _stats(manifest, diff, time.monotonic() - started)
        _observe(stats)
        logger.info("published version=%s %s", tuple(version), stats)
        return stats

    def close(self) -> None:
        """Stop serving. Idempotent."""
        self._server.close()


@dataclass(frozen=True, slots=True)
class _Diff:
    payload: Bytes
    num_changed: int


def _continues(base: Manifest | None, version: PolicyVersion, specs: tuple[TensorSpec, ...]) -> bool:
    """Whether a delta to `base` can be made."""
    return base is not None and base.version.lineage == version.lineage and base.tensors == specs


def _fill(
    draft: Draft, specs: Sequence[TensorSpec], read: Read, changed: Changed | None, leaves: Leaves | None
) -> _Diff | None:
    """Make the draft the new snapshot, tensor by tensor; what changed, where `leaves` is given, which asks for that and
    takes the hashes of what was compared, and where it pays."""
    started = time.monotonic()
    encoder = (
        DeltaEncoder(specs, coding_start(), lambda block: leaves.hash(block.offset, block.offset + block.num_bytes))
        if leaves is not None
        else None
    )
    try:
        for spec in specs:
            target = draft.data[spec.offset : spec.offset + spec.num_bytes]
            changes = changed(spec.name) if changed is not None else None
            if changes is None:
                source = np.frombuffer(_source(spec, read(spec.name)), np.uint8)
            else:
                source = _after(spec, target, changes)
            if encoder is None:
                target[:] = source
            else:
                encoder.add(target, source)
                if not pays(encoder.num_bytes, draft.data.size):
                    encoder.abandon()
                    encoder = None
            del source  # before the next one is read
        payload = encoder.finish() if encoder is not None else None
    finally:
        if encoder is not None:
            encoder.wait()  # whatever failed, nobody writes to the draft any more
    metrics.diff_seconds.observe(time.monotonic() - started)
    if encoder is None or payload is None or not pays(payload.size, draft.data.size):
        return None
    return _Diff(payload, encoder.num_changed)


def _after(spec: TensorSpec, before: Bytes, changes: Changes) -> Bytes:
    """The bytes of a tensor after these changes. Raises ValueError where they do not fit its description."""
    positions, elements = changes
    size = DTYPES[spec.dtype][1]
    num_elements = spec.num_bytes // size
    outside = positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < num_elements
    if elements.dtype != np.dtype(f"u{size}") or elements.shape != positions.shape or outside:
        raise ValueError(
            f"tensor {spec.name!r}: {elements.size} changes of {elements.dtype} at {positions.size} positions; due are "
            f"as many of both, unsigned integers of {size} bytes, within {num_elements} elements"
        )
    after = before.copy()
    after.view(elements.dtype)[positions] = elements
    return after


def _source(spec: TensorSpec, data: Buffer) -> memoryview:
    """The bytes given for a tensor. Raises ValueError where they do not fit its description."""
    try:
        source = flat(data)
    except TypeError as error:
        raise ValueError(f"tensor {spec.name!r} is not contiguous; make it so before publishing") from error
    if source.nbytes != spec.num_bytes:
        raise ValueError(
            f"tensor {spec.name!r} has {source.nbytes} bytes; {spec.dtype} {list(spec.shape)} has {spec.num_bytes}"
        )
    return source


def _stats(manifest: Manifest, diff: _Diff | None, seconds: float) -> PublishStats:
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
