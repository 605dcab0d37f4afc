"""Where fetched weights go: what a `Fetch` needs of its destination, the payload of a delta on its way, and the relay's
destination, which is its store. The actor's is in `basefile.py`.

A sink owns its destination from `begin` to `finish` or `abort`. It trusts no chunk order and verifies the whole at the
end; it knows no socket.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Protocol

import numpy as np

from broker.protocol.deltas import apply_delta
from broker.protocol.errors import ProtocolError
from broker.protocol.hashes import Leaves
from broker.protocol.proofs import Of
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Buffer, Bytes, Manifest, TensorSpec, describe, flat
from broker.weights import metrics
from broker.weights.begun import Begun
from broker.weights.chain import Payload
from broker.weights.store import Draft, WeightStore
from broker.weights.threads import coding_run
from broker.weights.vouching import WeightsCorruptError, WeightsForgedError, check_digest


class DeltaRefusedError(Exception):
    """A delta does not fit the base, or gives other bytes than its manifest promises: the anchor is needed."""


class Sink(Protocol):
    """Where verified chunks go. `begin` may be called again after `abort`."""

    @property
    def have(self) -> PolicyVersion | None:
        """The version whose snapshot is held whole at this moment, to which a delta can be applied."""
        ...

    def begin(self, manifest: Manifest) -> None:
        """Prepare for this payload. Raises DeltaRefusedError where it is a delta to other tensors than the base's."""
        ...

    def write(self, index: int, data: Buffer) -> None:
        """Store a verified chunk."""
        ...

    def finish(self) -> None:
        """Verify the whole and make it visible. Raises WeightsCorruptError (an anchor), DeltaRefusedError."""
        ...

    def abort(self) -> None:
        """Give up what is unfinished. Harmless at any time, after `finish` too."""
        ...

    def forget(self) -> None:
        """A delta was refused: `have` is None from now on."""
        ...


class DeltaBuffer:
    """The payload of a delta, in memory, chunk by chunk."""

    def __init__(self, manifest: Manifest, base_tensors: tuple[TensorSpec, ...]) -> None:
        """Raises DeltaRefusedError where the delta is one of other tensors than the base's."""
        if manifest.tensors != base_tensors:
            raise DeltaRefusedError(f"the delta to {_text(manifest)} is of other tensors than {manifest.parent} has")
        self.manifest = manifest
        self.data: Bytes = np.empty(manifest.payload_bytes, np.uint8)

    def write(self, index: int, data: Buffer) -> None:
        """Store a verified chunk."""
        start, end = self.manifest.chunk_range(index)
        self.data[start:end] = np.frombuffer(flat(data), np.uint8)

    def check(self) -> None:
        """All of it is here: raise WeightsForgedError where it is not what was signed. Due before `apply_to`."""
        self.data.setflags(write=False)
        check_digest(self.manifest, Of.PAYLOAD, self.data)

    def apply_to(self, target: Bytes, begun: Begun | None = None) -> Leaves:
        """Make `target`, the parent's snapshot, that of this version; `verify` is due. The hashes of what has changed.

        begun: what of this very payload is applied already. Raises DeltaRefusedError."""
        leaves, start = (begun.leaves, begun.num_bytes) if begun is not None else (Leaves(flat(target)), 0)
        try:
            apply_delta(self.data[start:], self.manifest.tensors, target, coding_run(), leaves)
        except ProtocolError as error:
            raise DeltaRefusedError(f"the delta to {_text(self.manifest)} is malformed: {error.message}") from error
        return leaves

    def verify(self, target: Bytes, total_hash: bytes) -> None:
        """Raise DeltaRefusedError unless the target, which has this hash, is the version's snapshot."""
        if total_hash != self.manifest.total_hash:
            raise DeltaRefusedError(f"the delta to {_text(self.manifest)} gives other bytes than its manifest promises")
        try:
            check_digest(self.manifest, Of.SNAPSHOT, target)
        except WeightsForgedError as error:
            raise DeltaRefusedError(str(error)) from error


class StoreSink:
    """A relay's store: an anchor arrives beside what is served, a delta is applied to the one copy there is.

    Raises OutOfBudgetError, an anchor at `begin`, a delta at `finish`.
    """

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._forgotten = False
        self._manifest: Manifest | None = None
        self._anchor: Draft | None = None
        self._delta: DeltaBuffer | None = None

    @property
    def have(self) -> PolicyVersion | None:
        """See Sink."""
        base = self._store.base
        return base.version if base is not None and not self._forgotten else None

    def begin(self, manifest: Manifest) -> None:
        """See Sink."""
        base = self._store.base
        if manifest.parent is None:
            self._anchor = self._store.begin(manifest.total_bytes, beside=True)
        else:
            self._delta = DeltaBuffer(manifest, base.manifest.tensors if base is not None else ())
        self._manifest = manifest

    def write(self, index: int, data: Buffer) -> None:
        """See Sink."""
        assert self._manifest is not None
        if self._delta is not None:
            self._delta.write(index, data)
            return
        assert self._anchor is not None
        start, end = self._manifest.chunk_range(index)
        self._anchor.data[start:end] = np.frombuffer(flat(data), np.uint8)

    def finish(self) -> None:
        """See Sink."""
        assert self._manifest is not None
        if self._delta is not None:
            self._finish_delta(self._delta)
        else:
            assert self._anchor is not None
            made = describe_as(self._manifest, self._anchor.data)
            if made.total_hash != self._manifest.total_hash:
                raise wrong_total(self._manifest)
            check_digest(self._manifest, Of.SNAPSHOT, self._anchor.data)
            self._store.commit(self._anchor, made, None)
        self._anchor = self._delta = None

    def abort(self) -> None:
        """See Sink."""
        if self._anchor is not None:
            self._store.abort(self._anchor)
        self._anchor = self._delta = None

    def forget(self) -> None:
        """See Sink. What the store holds goes on being served: every receiver verifies it."""
        self._forgotten = True

    def _finish_delta(self, delta: DeltaBuffer) -> None:
        delta.check()
        draft = self._store.begin(delta.manifest.total_bytes, copy=True)
        started = time.monotonic()
        try:
            made = describe_as(delta.manifest, draft.data, delta.apply_to(draft.data))
            delta.verify(draft.data, made.total_hash)
        except BaseException:
            self._store.abort(draft)
            raise
        metrics.apply_seconds.observe(time.monotonic() - started)
        self._store.commit(draft, made, Payload(delta.manifest, delta.data))


def describe_as(manifest: Manifest, snapshot: Bytes, leaves: Leaves | None = None) -> Manifest:
    """The manifest of these bytes as an anchor of the version that `manifest` names; only `total_hash` may differ. What
    was signed of a snapshot is true of it whatever it came as.
    leaves: of the snapshot, as far as they are hashed already."""
    made = describe(
        manifest.run_id,
        manifest.version,
        manifest.tensors,
        snapshot,
        manifest.chunk_bytes,
        manifest.created_at,
        coding_run(),
        leaves,
    )
    proof = manifest.proof
    return replace(made, proof=proof) if proof is not None and proof.of is Of.SNAPSHOT else made


def wrong_total(manifest: Manifest) -> WeightsCorruptError:
    """The error for an anchor whose chunks are right and whose whole is not."""
    return WeightsCorruptError(
        f"version {_text(manifest)}: every chunk fits its hash and the whole does not; the manifest contradicts "
        "itself, so the publisher or a relay is damaged"
    )


def _text(manifest: Manifest) -> str:
    return f"({manifest.version.lineage}, {manifest.version.version})"
