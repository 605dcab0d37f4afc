"""Manifest, layout, hashes: what a snapshot is, bit for bit, and refusal of everything else."""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.protocol.hashes import LEAF_BYTES, Hasher, Leaves
from broker.protocol.weights import DTYPES, describe, digest, lay_out, safetensors_header
from tests.unit.weights.samples import CHUNK, VERSION, snapshot


def tree_hash(raw: bytes) -> bytes:
    """XXH3-128 of what fits in a leaf; of the digests of the leaves where there are several."""
    leaves = [xxhash.xxh3_128_digest(raw[start : start + LEAF_BYTES]) for start in range(0, len(raw), LEAF_BYTES)]
    return leaves[0] if len(leaves) == 1 else xxhash.xxh3_128_digest(b"".join(leaves))


@pytest.mark.parametrize("num_bytes", [1, LEAF_BYTES, LEAF_BYTES + 1, 9 * LEAF_BYTES, 17 * LEAF_BYTES + 5])
def test_a_hash_is_the_same_whole_by_threads_and_piece_by_piece(num_bytes: int) -> None:
    rng = np.random.default_rng(num_bytes)
    raw = rng.bytes(num_bytes)
    expected = tree_hash(raw)
    assert digest(raw) == expected
    with ThreadPoolExecutor(3) as pool:
        assert digest(raw, pool.map) == expected
    hasher, start = Hasher(), 0
    while start < num_bytes:
        size = int(rng.choice([0, 1, 1000, LEAF_BYTES - 1, LEAF_BYTES, 3 * LEAF_BYTES]))
        hasher.update(memoryview(raw)[start : start + size])
        start += size
    assert hasher.digest() == hasher.digest() == expected


def test_leaves_that_were_hashed_on_the_way_are_not_hashed_again_and_the_others_are() -> None:
    data = np.random.default_rng(0).integers(0, 256, 5 * LEAF_BYTES + 11, np.uint8)
    expected = [xxhash.xxh3_128_digest(data[start : start + LEAF_BYTES]) for start in range(0, data.size, LEAF_BYTES)]
    leaves = Leaves(data.data)
    leaves.hash(LEAF_BYTES - 1, 3 * LEAF_BYTES + 5)  # leaves 1 and 2 lie within
    leaves.hash(5 * LEAF_BYTES, data.size)  # and the last, short one
    data[LEAF_BYTES : 3 * LEAF_BYTES] ^= 1
    data[5 * LEAF_BYTES :] ^= 1
    assert leaves.finish() == expected
    data[:] = 0
    assert leaves.finish() == expected


@pytest.mark.parametrize("chunk_bytes", [2 * LEAF_BYTES, LEAF_BYTES, LEAF_BYTES // 2, 3 * LEAF_BYTES + 7])
def test_chunks_have_the_hash_of_their_bytes_whether_or_not_they_are_whole_leaves(chunk_bytes: int) -> None:
    specs = lay_out([("w", "uint8", (5 * LEAF_BYTES + 11,))])
    data = np.random.default_rng(0).integers(0, 256, specs[0].num_bytes, np.uint8)
    raw = data.tobytes()
    manifest = describe("run", VERSION, specs, data, chunk_bytes, 0.0)
    assert manifest.total_hash == tree_hash(raw)
    chunks = [raw[start : start + chunk_bytes] for start in range(0, len(raw), chunk_bytes)]
    assert list(manifest.chunk_hashes) == [tree_hash(chunk) for chunk in chunks]
    assert all(manifest.chunk_fits(index, chunk) for index, chunk in enumerate(chunks))


def test_hashes_of_small_chunks_and_snapshots_are_plain_xxh3_128() -> None:
    manifest, data = snapshot(num_bytes=3 * CHUNK + 5)
    raw = data.tobytes()
    assert manifest.num_chunks == 4
    assert manifest.total_hash == xxhash.xxh3_128_digest(raw)
    for index, expected in enumerate(manifest.chunk_hashes):
        assert expected == xxhash.xxh3_128_digest(raw[index * CHUNK : (index + 1) * CHUNK])
    assert manifest.chunk_range(3) == (3 * CHUNK, 3 * CHUNK + 5)
    with pytest.raises(IndexError):
        manifest.chunk_range(4)


def test_layout_is_aligned_gapless_and_independent_of_the_order_given() -> None:
    tensors = [
        ("z", "uint8", (3,)),
        ("b", "bfloat16", (5,)),
        ("a", "float32", (2, 2)),
        ("s", "int64", ()),
        ("e", "float32", (0, 4)),
    ]
    specs = lay_out(tensors)
    assert specs == lay_out(reversed(tensors))
    assert [spec.name for spec in specs] == ["s", "a", "e", "b", "z"]
    offset = 0
    for spec in specs:
        assert spec.offset == offset
        assert offset % DTYPES[spec.dtype][1] == 0
        offset += spec.num_bytes


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([], "without a byte"),
        ([("a", "float32", (0,))], "without a byte"),
        ([("a", "float32", (1,)), ("a", "uint8", (1,))], "'a' is given twice"),
        ([("a", "float31", (1,))], "dtype 'float31'"),
        ([("a", "float32", (-1,))], "shape"),
        ([("__metadata__", "float32", (1,))], "__metadata__"),
        ([("", "float32", (1,))], "tensor name"),
        ([("\ud800", "float32", (1,))], "Unicode"),
    ],
)
def test_layout_refuses(tensors: list[tuple[str, str, tuple[int, ...]]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lay_out(tensors)


@given(
    shapes=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=4)),
        min_size=1,
        max_size=12,
    ),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_header_makes_a_file_that_safetensors_reads_bit_for_bit(
    shapes: dict[str, tuple[str, list[int]]], seed: int
) -> None:
    shapes["never empty"] = ("uint8", [3])
    specs = lay_out((name, dtype, tuple(shape)) for name, (dtype, shape) in shapes.items())
    data = np.random.default_rng(seed).integers(0, 256, specs[-1].offset + specs[-1].num_bytes, np.uint8)
    header = safetensors_header(describe("run", VERSION, specs, data, CHUNK, 0.0))
    assert len(header) % 8 == 0
    assert struct.unpack("<Q", header[:8])[0] == len(header) - 8
    read = dict(safetensors.deserialize(header + data.tobytes()))
    assert read.keys() == shapes.keys()
    for spec in specs:
        assert read[spec.name]["dtype"] == DTYPES[spec.dtype][0]
        assert read[spec.name]["shape"] == list(spec.shape)
        assert bytes(read[spec.name]["data"]) == data[spec.offset : spec.offset + spec.num_bytes].tobytes()


def test_header_names_the_version() -> None:
    manifest, _ = snapshot()
    metadata = json.loads(safetensors_header(manifest)[8:])["__metadata__"]
    assert metadata == {"format": "pt", "run_id": "run", "lineage": "3", "version": "17"}
