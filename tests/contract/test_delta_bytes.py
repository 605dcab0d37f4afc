"""The bytes of a delta as PROTOCOL.md has them: read by plain Python that shares nothing with the project's code."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import zstandard

from broker.protocol.delta_records import BLOCK_BYTES
from broker.protocol.deltas import DeltaEncoder, apply_delta, fold
from broker.protocol.weights import DTYPES, Bytes, TensorSpec, lay_out

SPECS = lay_out([("w", "bfloat16", (70_000,)), ("b", "float32", (3,)), ("m", "uint8", (4,))])
# b: element 1 from 1.0 to the next smaller number. w: element 2 from 5 to 4, element 65,538 from +0 to -0, which is
# 65,535 unchanged ones later: a pass and a gap of 0. m: element 0 from 0 to 255, which is one down, modulo 256.
# Frames of zstd that hold their content as it is, so that they are the same whatever made them.
GOLDEN = bytes.fromhex(
    "00000000" "01000000" "01000000" "0f000000" "28b52ffd" "2006" "310000" "0100" "01000000"
    "01000000" "02000000" "03000000" "13000000" "28b52ffd" "200a" "510000" "02ff00" "00ff00" "01ff" "00ff"
    "02000000" "01000000" "01000000" "0c000000" "28b52ffd" "2003" "190000" "0000" "01"
)  # fmt: skip


def versions() -> tuple[Bytes, Bytes]:
    old = np.zeros(SPECS[-1].offset + SPECS[-1].num_bytes, np.uint8)
    old[4:8].view("<f4")[0] = 1.0
    old[12 : 12 + 140_000].view("<u2")[2] = 5
    new = old.copy()
    new[4:8].view("<u4")[0] -= 1
    weights = new[12 : 12 + 140_000].view("<u2")
    weights[2] -= 1
    weights[65_538] = 0x8000
    new[12 + 140_000] = 255
    return old, new


def read_by_hand(payload: bytes, specs: tuple[TensorSpec, ...], snapshot: bytearray) -> None:
    """Apply a payload, element by element."""
    blocks: list[tuple[int, int]] = []  # where they begin, and the bytes of their elements
    for width in (8, 4, 2, 1):
        run = [spec for spec in specs if DTYPES[spec.dtype][1] == width]
        if run:
            blocks += [(at, width) for at in range(run[0].offset, run[-1].offset + run[-1].num_bytes, 4 << 20)]
    at = 0
    while at < len(payload):
        block, num_values, num_gaps, num_packed = struct.unpack_from("<IIII", payload, at)
        at += 16
        content = zstandard.ZstdDecompressor().decompress(payload[at : at + num_packed])
        at += num_packed
        start, width = blocks[block]
        assert len(content) == 2 * num_gaps + width * num_values
        gaps = [content[i] | content[num_gaps + i] << 8 for i in range(num_gaps)]
        planes = content[2 * num_gaps :]
        value = 0
        for gap in gaps:
            start += width * gap
            if gap == 65_535:
                continue
            zigzag = sum(planes[k * num_values + value] << 8 * k for k in range(width))
            difference = zigzag >> 1 if zigzag % 2 == 0 else -(zigzag + 1 >> 1)
            bits = int.from_bytes(snapshot[start : start + width], "little") + difference
            snapshot[start : start + width] = (bits % (1 << 8 * width)).to_bytes(width, "little")
            start, value = start + width, value + 1
        assert value == num_values


def test_the_golden_bytes_mean_the_same_to_everybody() -> None:
    old, new = versions()
    by_hand, target = bytearray(old.tobytes()), old.copy()
    read_by_hand(GOLDEN, SPECS, by_hand)
    assert apply_delta(GOLDEN, SPECS, target) == 4
    assert target.tobytes() == bytes(by_hand) == new.tobytes()
    assert fold([GOLDEN], SPECS).tobytes() == GOLDEN


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "uint8"])
def test_what_the_encoder_makes_is_read_by_hand(dtype: str) -> None:
    """Blocks that begin and end within tensors, and a run of another width behind them."""
    width = DTYPES[dtype][1]
    num = BLOCK_BYTES // width
    specs = lay_out([("v", dtype, (num - 5,)), ("w", dtype, (num + 9,)), ("x", "bool", (3,))])
    rng = np.random.default_rng(width)
    old = rng.integers(0, 256, specs[-1].offset + specs[-1].num_bytes, np.uint8)
    base, new = old.copy(), old.copy()
    new[rng.integers(0, old.size, 40)] += 1
    new[-3 * width :] = rng.integers(0, 256, 3 * width, np.uint8)
    new[BLOCK_BYTES - 1 : BLOCK_BYTES + 1] += 1
    encoder = DeltaEncoder(specs)
    for spec in specs:
        part = slice(spec.offset, spec.offset + spec.num_bytes)
        encoder.add(base[part], new[part])
    by_hand = bytearray(old.tobytes())
    read_by_hand(encoder.finish().tobytes(), specs, by_hand)
    assert bytes(by_hand) == new.tobytes()
