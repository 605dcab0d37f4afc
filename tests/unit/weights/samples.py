"""Small snapshots for the weight channel's unit tests."""

from __future__ import annotations

import numpy as np

from broker.protocol.deltas import DeltaEncoder
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import DTYPES, Bytes, Manifest, describe, describe_delta, lay_out

VERSION, OLDER = PolicyVersion(3, 17), PolicyVersion(3, 12)
CHUNK = 4096


def snapshot(
    num_bytes: int = 50_000, version: PolicyVersion = VERSION, seed: int = 0, run_id: str = "run"
) -> tuple[Manifest, Bytes]:
    """A snapshot of one bf16 matrix, one fp32 vector and an odd tail of bytes, random, with its manifest."""
    wide = num_bytes // 2 // 4
    specs = lay_out(
        [
            ("layers.0.weight", "bfloat16", (2, wide)),
            ("norm.weight", "float32", (wide // 2,)),
            ("tail", "uint8", (num_bytes - 2 * wide * 2 - (wide // 2) * 4,)),
        ]
    )
    data = np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)
    assert specs[-1].offset + specs[-1].num_bytes == num_bytes
    assert {spec.dtype for spec in specs} <= DTYPES.keys()
    return describe(run_id, version, specs, data, CHUNK, 1.75e9), data


def changed(
    old: Manifest, data: Bytes, version: PolicyVersion, seed: int, num_changes: int = 100
) -> tuple[Manifest, Bytes, Bytes]:
    """The next version: its manifest as a delta, the payload of it, and the new snapshot; some bytes are random."""
    rng = np.random.default_rng(seed)
    new, base = data.copy(), data.copy()
    new[rng.integers(0, data.size, num_changes)] = rng.integers(0, 256, num_changes, np.uint8)
    encoder = DeltaEncoder(old.tensors)
    for spec in old.tensors:
        start, end = spec.offset, spec.offset + spec.num_bytes
        encoder.add(base[start:end], new[start:end])
    payload = encoder.finish()
    anchor = describe(old.run_id, version, old.tensors, new, old.chunk_bytes, 1.75e9)
    return describe_delta(anchor, old.version, payload), payload, new
