"""The next snapshot, made where the former one lies: compared, copied and hashed tensor by tensor.

Owns what a tensor may look like that is given to be published. Announces nothing, serves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from broker.protocol.deltas import DeltaEncoder, OfRecord, nothing_more
from broker.protocol.hashes import Leaves
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import DTYPES, Buffer, Bytes, Manifest, TensorSpec, flat
from broker.weights import metrics
from broker.weights.chain import pays
from broker.weights.store import Draft
from broker.weights.threads import coding_start

Read = Callable[[str], Buffer]


class Changes(NamedTuple):
    """What changed in a tensor: positions (int64) of elements, and their new bits as unsigned integers of that size."""

    positions: npt.NDArray[np.int64]
    elements: npt.NDArray[Any]


Changed = Callable[[str], Changes | None]


@dataclass(frozen=True, slots=True)
class Diff:
    """The changes of a version, packed, and how many elements they are of."""

    payload: Bytes
    num_changed: int


def continues_base(base: Manifest | None, version: PolicyVersion, specs: tuple[TensorSpec, ...]) -> bool:
    """Whether a delta to `base` can be made."""
    return base is not None and base.version.lineage == version.lineage and base.tensors == specs


def fill(
    draft: Draft,
    specs: Sequence[TensorSpec],
    read: Read,
    changed: Changed | None,
    leaves: Leaves | None,
    record: OfRecord = nothing_more,
) -> Diff | None:
    """Make the draft the new snapshot, tensor by tensor; what changed, where `leaves` is given, which asks for that and
    takes the hashes of what was compared, and where it pays. `record` is called with each record of the payload."""
    started = time.monotonic()
    encoder = None
    if leaves is not None:
        encoder = DeltaEncoder(specs, coding_start(), leaves, record)
    try:
        for spec in specs:
            target = draft.data[spec.offset : spec.offset + spec.num_bytes]
            changes = changed(spec.name) if changed is not None else None
            if changes is None:
                source = np.frombuffer(source_of(spec, read(spec.name)), np.uint8)
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
    return Diff(payload, encoder.num_changed)


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


def source_of(spec: TensorSpec, data: Buffer) -> memoryview:
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
