"""What the codec alone does with real consecutive versions: bytes, seconds, CPU. No socket.

Compared with the plain snapshot and with zstd of it; hashes stand beside, because every version pays them whatever way
it travels. Also the usual way without a channel: a safetensors file in a directory that both sides see.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard

from broker.protocol.deltas import DeltaEncoder, apply_delta
from broker.protocol.weights import DTYPES, Bytes, TensorSpec, digest
from broker.weights.threads import coding_run, coding_start
from tests.bench.weight_versions import read_snapshot
from tests.bench.weightchannel.workers import State, Usage, median_usage, timed

ZSTD_LEVEL = 1
SCAN_BYTES = 2 << 20


class Codec(NamedTuple):
    """Medians over consecutive versions at one learning rate."""

    changed_fraction: float
    snapshot_bytes: int
    delta_bytes: int
    encode: Usage  # the difference and its packing
    decode_apply: Usage  # to check everything, and then to write it
    total_hash: Usage  # of the snapshot, on either side; in none of the others
    scan: Usage  # to read both versions once and no more: what no encoder can be faster than

    @property
    def ratio(self) -> float:
        """Bytes of the snapshot over those of the delta."""
        return self.snapshot_bytes / self.delta_bytes

    @property
    def seconds(self) -> float:
        """Encode, decode and apply."""
        return self.encode.seconds + self.decode_apply.seconds


class Packed(NamedTuple):
    """The whole snapshot under zstd."""

    num_bytes: int
    pack: Usage
    unpack: Usage


class Shared(NamedTuple):
    """Seconds of a snapshot by way of a directory, medians."""

    write_s: float  # and fsync
    read_s: float


def measure_codec(_: State, specs: Sequence[TensorSpec], files: Sequence[Path], repeats: int) -> Codec:
    """Encode and apply every step between these versions, `repeats` times, and verify each result."""
    snapshots = [read_snapshot(file) for file in files]
    runs: list[tuple[float, int, Usage, Usage, Usage, Usage]] = []
    for _repeat in range(repeats):
        for old, new in itertools.pairwise(snapshots):
            runs.append(_one_step(specs, old, new))
    changed, sizes, encodes, applies, hashes, scans = zip(*runs, strict=True)
    return Codec(
        statistics.median(changed),
        snapshots[0].size,
        round(statistics.median(sizes)),
        median_usage(encodes),
        median_usage(applies),
        median_usage(hashes),
        median_usage(scans),
    )


def _one_step(specs: Sequence[TensorSpec], old: Bytes, new: Bytes) -> tuple[float, int, Usage, Usage, Usage, Usage]:
    published, held, run = old.copy(), old.copy(), coding_run()

    def encode() -> tuple[int, Bytes]:
        encoder = DeltaEncoder(specs, coding_start())
        for spec in specs:
            part = slice(spec.offset, spec.offset + spec.num_bytes)
            encoder.add(published[part], new[part])
        payload = encoder.finish()
        return encoder.num_changed, payload

    def compare(start: int) -> None:
        np.not_equal(old[start : start + SCAN_BYTES].view("<u8"), new[start : start + SCAN_BYTES].view("<u8"))

    whole_words = range(0, old.size // SCAN_BYTES * SCAN_BYTES, SCAN_BYTES)
    _, scanning = timed(lambda: list(run(compare, whole_words)))
    (num_changed, payload), encoding = timed(encode)
    _, applying = timed(lambda: apply_delta(payload, specs, held, run))
    hashed, hashing = timed(lambda: digest(held, run))
    if hashed != digest(new):
        raise RuntimeError("a delta does not give the version it was made from")
    num_elements = sum(spec.num_bytes // DTYPES[spec.dtype][1] for spec in specs)
    return num_changed / num_elements, payload.size, encoding, applying, hashing, scanning


def measure_zstd(_: State, file: Path) -> Packed:
    """Pack and unpack a whole snapshot."""
    snapshot = read_snapshot(file)
    packed, packing = timed(lambda: zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(snapshot.data))
    opened, unpacking = timed(lambda: zstandard.ZstdDecompressor().decompress(packed))
    if len(opened) != snapshot.size:
        raise RuntimeError("zstd lost bytes")
    return Packed(len(packed), packing, unpacking)


def measure_shared(_: State, specs: Sequence[TensorSpec], file: Path, directory: Path, repeats: int) -> Shared:
    """Write a snapshot as safetensors there, sync it, and read it into memory of the reader's own."""
    import torch
    from safetensors.torch import load_file, save_file

    snapshot = torch.from_numpy(np.fromfile(file, np.uint8))
    tensors = {
        spec.name: snapshot[spec.offset : spec.offset + spec.num_bytes]
        .view(getattr(torch, spec.dtype))
        .view(spec.shape)
        for spec in specs
    }
    path = directory / "snapshot.safetensors"

    def write() -> None:
        save_file(tensors, path)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    def read() -> None:
        for tensor in load_file(path).values():
            tensor.clone()

    try:
        return Shared(_median_s(write, repeats), _median_s(read, repeats))
    finally:
        path.unlink(missing_ok=True)


def _median_s(work: Callable[[], None], repeats: int) -> float:
    return statistics.median(timed(work)[1].seconds for _ in range(repeats))
