"""Manifest, layout, hashes and messages: round trips, and refusal of everything else."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

import msgpack
import numpy as np
import pytest
import safetensors
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.protocol import frames
from broker.protocol import weight_messages as messages
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import DTYPES, describe, lay_out, safetensors_header
from tests.unit.weights.samples import CHUNK, VERSION, snapshot


def over_the_wire(message: Message) -> Message:
    return frames.decode([bytes(frame) for frame in frames.encode(message)])


def test_manifest_round_trip() -> None:
    manifest, _ = snapshot()
    assert messages.read_manifest(over_the_wire(messages.manifest_reply(manifest))) == manifest


def test_hashes_are_xxh3_128_of_the_chunks_and_of_the_whole() -> None:
    manifest, data = snapshot(num_bytes=3 * CHUNK + 5)
    raw = data.tobytes()
    assert manifest.num_chunks == 4
    assert manifest.total_hash == xxhash.xxh3_128_digest(raw)
    for index, expected in enumerate(manifest.chunk_hashes):
        assert expected == xxhash.xxh3_128_digest(raw[index * CHUNK : (index + 1) * CHUNK])
    assert manifest.chunk_range(3) == (3 * CHUNK, 3 * CHUNK + 5)
    with pytest.raises(IndexError):
        manifest.chunk_range(4)


def test_small_messages_round_trip() -> None:
    assert messages.read_have(over_the_wire(messages.watch(None))) is None
    assert messages.read_have(over_the_wire(messages.watch(VERSION))) == VERSION
    assert messages.read_announce(over_the_wire(messages.announce(VERSION, 9))) == (VERSION, 9)
    assert messages.read_announce(over_the_wire(messages.announce(None, 0))) == (None, 0)
    assert messages.read_manifest_request(over_the_wire(messages.manifest_request(VERSION))) == VERSION
    request = over_the_wire(messages.chunk_request(VERSION, 7))
    assert messages.read_chunk_request(request) == (VERSION, 7)
    version, index, data = messages.read_chunk(
        over_the_wire(messages.chunk_reply(VERSION, 7, np.arange(5, dtype="u1")))
    )
    assert (version, index, data.tolist()) == (VERSION, 7, [0, 1, 2, 3, 4])


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


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("flavour", 1, "keys \\['flavour'\\]; due are exactly"),
        ("run_id", "", "run_id"),
        ("run_id", None, "run_id"),
        ("lineage", -1, "lineage"),
        ("lineage", True, "lineage"),
        ("version", 2**63, "version"),
        ("parent", [1], "parent"),
        ("chunk_bytes", 1, "chunk_bytes"),
        ("chunk_bytes", 1 << 40, "chunk_bytes"),
        ("total_hash", b"short", "total_hash"),
        ("created_at", float("nan"), "created_at"),
        ("created_at", True, "created_at"),
        ("tensors", [], "tensors"),
        ("tensors", [["a", "float32", [1], 0]], "rows"),
        ("tensors", [["a", "float32", [1], 4, 4]], "offset 0"),
        ("tensors", [["a", "float32", [1], 0, 5]], "num_bytes 4"),
        ("tensors", [["a", "float32", [2**40, 2**40], 0, 2**82]], "2\\^63"),
        ("tensors", [["a", "float32", [0], 0, 0]], "without a byte"),
        ("tensors", [["a", "uint8", [1], 0, 1], ["a", "uint8", [1], 1, 1]], "each name once"),
        ("tensors", [["a", "uint8", [1], 0, 1]], "chunk hashes"),
    ],
)
def test_manifest_refuses(key: str, value: object, words: str) -> None:
    manifest, _ = snapshot()
    good = messages.manifest_reply(manifest)
    with pytest.raises(ProtocolError, match=words) as caught:
        messages.read_manifest(Message(good.command, {**good.body, key: value}, good.arrays))
    assert caught.value.code is ErrorCode.BAD_MESSAGE


JSON_LIKE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


def mutate(body: Any, path: list[int], value: object) -> Any:
    """Replace one node of a nested body; the path's numbers choose where."""
    if not path or not isinstance(body, (dict, list)) or not body:
        return value
    keys = list(body) if isinstance(body, dict) else list(range(len(body)))
    key = keys[path[0] % len(keys)]
    body[key] = mutate(body[key], path[1:], value)
    return body


@given(path=st.lists(st.integers(0, 10), min_size=1, max_size=4), value=JSON_LIKE)
@settings(max_examples=300, deadline=None)
def test_a_mutated_manifest_is_read_or_refused(path: list[int], value: object) -> None:
    manifest, _ = snapshot()
    good = messages.manifest_reply(manifest)
    body = mutate(copy.deepcopy(good.body), path, value)
    try:
        read = messages.read_manifest(Message(good.command, body, good.arrays))
    except ProtocolError:
        return
    assert read.num_chunks == -(-read.total_bytes // read.chunk_bytes)
    assert msgpack.packb(messages.manifest_reply(read).body)


BODIES = st.sampled_from([["have"], ["newest", "num_bytes"], ["lineage", "version"], ["lineage", "version", "index"]])


@given(body=BODIES.flatmap(lambda keys: st.fixed_dictionaries(dict.fromkeys(keys, JSON_LIKE))))
@settings(max_examples=300, deadline=None)
def test_small_bodies_are_read_or_refused(body: dict[str, Any]) -> None:
    message = Message("ANY", body, ())
    for read in (
        messages.read_have,
        messages.read_announce,
        messages.read_manifest_request,
        messages.read_chunk_request,
        messages.read_chunk,
    ):
        try:
            value = read(message)
        except ProtocolError:
            continue
        assert value is None or value is not message
        if isinstance(value, PolicyVersion):
            assert min(value) >= 0


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_frames_raise_nothing_but_protocol_errors(data: st.DataObject) -> None:
    manifest, _ = snapshot()
    parts = [bytearray(frame) for frame in frames.encode(messages.manifest_reply(manifest))]
    for _ in range(data.draw(st.integers(1, 4))):
        part = parts[data.draw(st.integers(0, len(parts) - 1))]
        if part and data.draw(st.booleans()):
            part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
        else:
            del part[data.draw(st.integers(0, len(part))) :]
    try:
        read = messages.read_manifest(frames.decode([bytes(part) for part in parts]))
    except ProtocolError:
        return
    assert read.total_bytes > 0
