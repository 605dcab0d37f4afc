"""The commands of the weight channel as bytes: round trips, and refusal of everything else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from broker.protocol import weight_messages as messages
from broker.protocol.commands import parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.proofs import Of, Proof
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import MAX_INT, Manifest, TensorSpec, describe_delta
from tests.unit.weights.samples import CHUNK, OLDER, VERSION, snapshot
from tests.unit.weights.wire import GOOD, MANIFEST, PAYLOAD, PUSHED, READERS, body_of, over_the_wire, with_body

PROOF = Proof(Of.SNAPSHOT, bytes(range(32)), bytes(range(64)))
NUMBERS = [
    ("WATCH", "push_bytes"),
    ("ANNOUNCE", "num_bytes"),
    ("MANIFEST", "lineage"),
    ("MANIFEST", "version"),
    ("MANIFEST_REPLY", "lineage"),
    ("MANIFEST_REPLY", "version"),
    ("MANIFEST_REPLY", "payload_bytes"),
    ("PUSH", "version"),
    ("PUSH", "payload_bytes"),
    ("PUSH", "sent_bytes"),
    ("PUSH_PART", "version"),
    ("PUSH_PART", "start"),
    ("CHUNK", "lineage"),
    ("CHUNK", "version"),
    ("CHUNK", "index"),
    ("CHUNK_REPLY", "index"),
]


def with_key(command: str, key: str, value: object) -> Message:
    return with_body(GOOD[command], {**body_of(GOOD[command]), key: value})


def refuse(message: Message, words: str | None = None) -> None:
    """It must be refused when it comes as frames, which are well-formed, with one sentence."""
    with pytest.raises(ProtocolError, match=words) as caught:
        READERS[message.command](over_the_wire(message))
    assert caught.value.code is ErrorCode.BAD_MESSAGE
    assert caught.value.message.startswith(f"{message.command}: ")
    assert len(caught.value.message) < 1100


def test_every_command_is_tried_here() -> None:
    own = ({*messages.FROM_RECEIVER} | {*messages.FROM_SERVER}) - {"HEARTBEAT", "ERROR"}
    assert own == GOOD.keys() == READERS.keys()


def test_manifest_round_trip() -> None:
    assert messages.read_manifest(over_the_wire(GOOD["MANIFEST_REPLY"])) == MANIFEST


def test_a_proof_round_trips() -> None:
    for message, read in ((messages.manifest_reply, messages.read_manifest), (pushed, messages.read_push)):
        for manifest in (replace(PUSHED, proof=PROOF), replace(PUSHED, proof=PROOF._replace(of=Of.PAYLOAD))):
            arrived = read(over_the_wire(message(manifest)))
            got = arrived if isinstance(arrived, Manifest) else arrived.manifest
            assert got == manifest
            assert got.proof is not None
            assert type(got.proof.of) is Of


def pushed(manifest: Manifest) -> Message:
    return messages.push(manifest, PAYLOAD)


def test_the_largest_numbers_round_trip() -> None:
    largest = PolicyVersion(MAX_INT, MAX_INT)
    manifest, _ = snapshot(version=largest)
    read = messages.read_manifest(over_the_wire(messages.manifest_reply(manifest)))
    assert read.version == largest
    request = parse_body(over_the_wire(messages.chunk_request(largest, largest, MAX_INT)), messages.ChunkRequest)
    assert (request.index, messages.policy_version(request.parent)) == (MAX_INT, largest)
    watch = parse_body(over_the_wire(messages.Watch(have=largest, push_bytes=MAX_INT).pack()), messages.Watch)
    assert (messages.policy_version(watch.have), watch.push_bytes) == (largest, MAX_INT)


def test_push_round_trip() -> None:
    for sent_bytes in (0, 3000, PAYLOAD.size):
        manifest, sent, rest = messages.read_push(over_the_wire(messages.push(PUSHED, PAYLOAD, sent_bytes)))
        assert (manifest, sent, rest.tobytes()) == (PUSHED, sent_bytes, PAYLOAD[sent_bytes:].tobytes())
    assert manifest.num_chunks > 1
    empty = describe_delta(MANIFEST, OLDER, np.zeros(0, np.uint8))
    manifest, sent, rest = messages.read_push(over_the_wire(messages.push(empty, np.zeros(0, np.uint8))))
    assert (manifest, sent, rest.size) == (empty, 0, 0)


def test_the_parts_of_a_push_round_trip() -> None:
    part = messages.read_part(over_the_wire(GOOD["PUSH_PART"]))
    assert (part[:3], part.data.tobytes()) == ((VERSION, OLDER, 1000), PAYLOAD[1000:3000].tobytes())
    assert {type(part.version), type(part.parent)} == {PolicyVersion}
    refuse(Message("PUSH_PART", GOOD["PUSH_PART"].body, (PAYLOAD.reshape(1, -1),)), "one \\|u1 of 1 dimensions is due")
    refuse(with_key("PUSH_PART", "parent", None), "parent")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ((), "one \\|u1 of 2 dimensions, one \\|u1 of 1 dimensions is due"),
        (GOOD["PUSH"].arrays[:1], "carries 1 arrays"),
        (GOOD["PUSH"].arrays[::-1], "carries 2 arrays"),
        ((*GOOD["PUSH"].arrays, PAYLOAD), "carries 3 arrays"),
        ((GOOD["PUSH"].arrays[0], PAYLOAD.reshape(1, -1)), "carries 2 arrays"),
        ((GOOD["PUSH"].arrays[0], PAYLOAD.view(np.int8)), "carries 2 arrays"),
        ((GOOD["PUSH"].arrays[0], PAYLOAD[3001:]), f"a payload of {PAYLOAD.size - 3001} bytes behind .*3000; allowed"),
        ((GOOD["PUSH"].arrays[0], PAYLOAD), f"a payload of {PAYLOAD.size} bytes"),
        ((GOOD["PUSH"].arrays[0][1:], PAYLOAD[3000:]), "chunk hashes of shape"),
    ],
)
def test_a_push_carries_all_of_its_payload_that_was_not_sent_before(arrays: tuple[np.ndarray, ...], words: str) -> None:
    refuse(Message("PUSH", GOOD["PUSH"].body, arrays), words)


def test_an_anchor_is_not_pushed() -> None:
    refuse(messages.push(*snapshot()), "parent is null")


def test_small_messages_round_trip() -> None:
    for body in (
        messages.Watch(have=None, push_bytes=0),
        messages.Watch(have=VERSION, push_bytes=1 << 24),
        messages.Announce(newest=VERSION, num_bytes=9, proof=None),
        messages.Announce(newest=VERSION, num_bytes=9, proof=PROOF),
        messages.Announce(newest=None, num_bytes=0, proof=None),
        messages.ManifestRequest(lineage=3, version=17, have=None),
        messages.ManifestRequest(lineage=3, version=17, have=OLDER),
        messages.ChunkRequest(lineage=3, version=17, parent=None, index=7),
        messages.ChunkRequest(lineage=3, version=17, parent=OLDER, index=7),
        messages.Hello(role=messages.Role.OPERATOR, peer_id="p", run_id="r", session="s"),
        messages.Welcome(run_id="r", heartbeat_s=1.0, liveness=15),
    ):
        assert parse_body(over_the_wire(body.pack()), type(body)) == body
    assert messages.policy_version(None) is None
    read = messages.policy_version(parse_body(over_the_wire(GOOD["ANNOUNCE"]), messages.Announce).newest)
    assert (read, type(read)) == (VERSION, PolicyVersion)
    request = parse_body(over_the_wire(messages.manifest_request(VERSION, OLDER)), messages.ManifestRequest)
    assert (request.policy_version, request.have) == (VERSION, OLDER)
    chunk = messages.read_chunk(over_the_wire(GOOD["CHUNK_REPLY"]))
    assert (chunk.version, chunk.parent, chunk.index, chunk.data.tolist()) == (VERSION, OLDER, 7, [0, 1, 2, 3, 4])
    assert (type(chunk.version), type(chunk.parent)) == (PolicyVersion, PolicyVersion)
    anchors = messages.read_chunk(over_the_wire(messages.chunk_reply(VERSION, None, 0, np.zeros(1, np.uint8))))
    assert anchors.parent is None


def test_what_is_on_the_wire_is_what_the_protocol_page_says() -> None:
    assert body_of(GOOD["WATCH"]) == {"have": [3, 17], "push_bytes": 65_536}
    assert body_of(messages.Watch(have=None, push_bytes=0).pack()) == {"have": None, "push_bytes": 0}
    assert body_of(GOOD["PUSH"]) == body_of(messages.manifest_reply(PUSHED)) | {"sent_bytes": 3000}
    assert body_of(GOOD["PUSH_PART"]) == {"lineage": 3, "version": 17, "parent": [3, 12], "start": 1000}
    assert body_of(GOOD["MANIFEST"]) == {"lineage": 3, "version": 17, "have": [3, 12]}
    assert body_of(GOOD["CHUNK"]) == {"lineage": 3, "version": 17, "parent": [3, 12], "index": 7}
    assert body_of(GOOD["CHUNK_REPLY"]) == {"lineage": 3, "version": 17, "parent": [3, 12], "index": 7}
    assert body_of(GOOD["HELLO"]) == {"role": "relay", "peer_id": "relay-0", "run_id": "run", "session": "s"}
    body = body_of(GOOD["MANIFEST_REPLY"])
    assert (body["parent"], body["payload_bytes"]) == (None, 50_000)
    assert body["tensors"][0] == ["norm.weight", "float32", [6250 // 2], 0, 12500]
    assert body["total_hash"] == MANIFEST.total_hash
    assert (body["created_at"], type(body["created_at"])) == (1.75e9, float)
    assert body["proof"] is None
    signed = body_of(messages.manifest_reply(replace(MANIFEST, proof=PROOF)))
    assert signed["proof"] == ["snapshot", bytes(range(32)), bytes(range(64))]
    (hashes,) = GOOD["MANIFEST_REPLY"].arrays
    assert (hashes.dtype.str, hashes.shape) == ("|u1", (MANIFEST.num_chunks, 16))


@pytest.mark.parametrize("command", GOOD)
def test_bodies_are_closed(command: str) -> None:
    body = body_of(GOOD[command])
    refuse(with_body(GOOD[command], {**body, "flavour": 1}), "unknown field `flavour`")
    for key in body:
        refuse(with_body(GOOD[command], {k: v for k, v in body.items() if k != key}), f"missing required field `{key}`")
    refuse(with_body(GOOD[command], {}), "missing required field")


@pytest.mark.parametrize("command", GOOD)
def test_a_key_of_no_text_is_refused(command: str) -> None:
    packed = bytes(GOOD[command].body)
    for key in (b"\xa1\xff", b"\xa3\xed\xa0\x80", b"\xc4\x01a", b"\x01", b"\xc0", b"\x90"):
        more = bytes([packed[0] + 1]) + packed[1:] + key + b"\x01"
        refuse(Message(command, more, GOOD[command].arrays))


@pytest.mark.parametrize("command", GOOD)
@pytest.mark.parametrize("depth", [100, 30_000])
def test_deep_nesting_is_refused(command: str, depth: int) -> None:
    packed = bytes(GOOD[command].body)
    for key in (b"\xa4deep", packed[1 : 2 + (packed[1] & 0x1F)]):  # one that is not allowed, and the first one again
        for opening in (b"\x91", b"\x81\xa1k"):
            deep = bytes([packed[0] + 1]) + packed[1:] + key + opening * depth + b"\xc0"
            # 30,000 levels are refused before the body is looked at.
            with pytest.raises(ProtocolError):
                READERS[command](over_the_wire(Message(command, deep, GOOD[command].arrays)))
            with pytest.raises(ProtocolError):
                READERS[command](Message(command, deep, GOOD[command].arrays))


@pytest.mark.parametrize("command", GOOD)
def test_bodies_cut_short_or_too_long_are_refused(command: str) -> None:
    packed = bytes(GOOD[command].body)
    for damaged in (b"", *(packed[:end] for end in range(1, min(len(packed), 60))), packed[:-1], packed + b"\x00"):
        with pytest.raises(ProtocolError):
            READERS[command](Message(command, damaged, GOOD[command].arrays))
    for other in (b"\xc0", b"\x91\x01", b"\xa1a", b"\xdf\xff\xff\xff\xff", b"\xc7\x01\x05a", b"\xc1"):
        with pytest.raises(ProtocolError):
            READERS[command](Message(command, other, GOOD[command].arrays))


@pytest.mark.parametrize(("command", "key"), NUMBERS)
@pytest.mark.parametrize("value", [-1, 2**63, 2**64 - 1, True, False, 1.0, float("nan"), "1", b"1", None, [1], {}])
def test_numbers_are_integers_within_bounds(command: str, key: str, value: object) -> None:
    refuse(with_key(command, key, value), f"{key} is .*Expected `int`")


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("WATCH", "have"),
        ("ANNOUNCE", "newest"),
        ("MANIFEST", "have"),
        ("MANIFEST_REPLY", "parent"),
        ("PUSH", "parent"),
        ("PUSH_PART", "parent"),
        ("CHUNK", "parent"),
        ("CHUNK_REPLY", "parent"),
    ],
)
@pytest.mark.parametrize(
    "value",
    [[], [1], [1, 2, 3], [-1, 0], [0, 2**63], [True, 1], [1, 1.0], [1, None], ["1", "2"], "12", b"12", {}, 0, [[1, 2]]],
)
def test_versions_are_two_numbers_or_nothing(command: str, key: str, value: object) -> None:
    refuse(with_key(command, key, value), key)


@pytest.mark.parametrize(
    ("command", "key", "value"),
    [
        ("HELLO", "role", "learner"),
        ("HELLO", "role", "Relay"),
        ("HELLO", "role", 0),
        ("HELLO", "peer_id", ""),
        ("HELLO", "peer_id", "x" * 257),
        ("HELLO", "peer_id", b"bytes"),
        ("HELLO", "run_id", 7),
        ("HELLO", "session", None),
        ("WELCOME", "run_id", ""),
        ("WELCOME", "heartbeat_s", 0),
        ("WELCOME", "heartbeat_s", float("nan")),
        ("WELCOME", "heartbeat_s", float("inf")),
        ("WELCOME", "heartbeat_s", True),
        ("WELCOME", "liveness", 0),
        ("WELCOME", "liveness", 1.5),
        ("MANIFEST_REPLY", "run_id", ""),
        ("MANIFEST_REPLY", "run_id", None),
        ("MANIFEST_REPLY", "run_id", "x" * 257),
        ("MANIFEST_REPLY", "chunk_bytes", 1),
        ("MANIFEST_REPLY", "chunk_bytes", 1 << 40),
        ("MANIFEST_REPLY", "chunk_bytes", 4096.0),
        ("MANIFEST_REPLY", "chunk_bytes", True),
        ("MANIFEST_REPLY", "total_hash", b"short"),
        ("MANIFEST_REPLY", "total_hash", bytes(17)),
        ("MANIFEST_REPLY", "total_hash", "sixteen letters."),
        ("MANIFEST_REPLY", "created_at", float("nan")),
        ("MANIFEST_REPLY", "created_at", float("inf")),
        ("MANIFEST_REPLY", "created_at", float("-inf")),
        ("MANIFEST_REPLY", "created_at", -1.0),
        ("MANIFEST_REPLY", "created_at", True),
        ("MANIFEST_REPLY", "created_at", "now"),
        ("MANIFEST_REPLY", "created_at", None),
        *(
            (command, "proof", proof)
            for command in ("ANNOUNCE", "MANIFEST_REPLY", "PUSH")
            for proof in (
                [],
                ["snapshot", bytes(32)],
                ["snapshot", bytes(31), bytes(64)],
                ["snapshot", bytes(32), bytes(65)],
                ["snapshot", "x" * 32, bytes(64)],
                ["chunk", bytes(32), bytes(64)],
                ["payload", bytes(32), bytes(64), 0],
                {"of": "payload"},
                b"proof",
                0,
            )
        ),
    ],
)
def test_other_values_are_refused_by_name(command: str, key: str, value: object) -> None:
    refuse(with_key(command, key, value), key)


def test_whole_seconds_are_seconds() -> None:
    read = messages.read_manifest(over_the_wire(with_key("MANIFEST_REPLY", "created_at", 17)))
    assert (read.created_at, type(read.created_at)) == (17.0, float)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([], "tensors is .*length >= 1"),
        (None, "tensors"),
        ({}, "tensors"),
        (["a"], "tensors"),
        ([{"name": "a"}], "tensors"),
        ([["a", "float32", [1], 0]], "length 5"),
        ([["a", "float32", [1], 0, 4, 0]], "length 5"),
        ([["", "float32", [1], 0, 4]], "length >= 1"),
        ([["x" * 1025, "float32", [1], 0, 4]], "length <= 1024"),
        ([[b"a", "float32", [1], 0, 4]], "Expected `str`"),
        ([["__metadata__", "float32", [1], 0, 4]], "__metadata__"),
        ([["a", "float31", [1], 0, 4]], "dtype 'float31'; allowed: float64"),
        ([["a", 7, [1], 0, 4]], "Expected `str`"),
        ([["a", "float32", [-1], 0, 4]], "Expected `int` >= 0"),
        ([["a", "float32", [True], 0, 4]], "got `bool`"),
        ([["a", "float32", [1.0], 0, 4]], "got `float`"),
        ([["a", "float32", [1] * 9, 0, 4]], "length <= 8"),
        ([["a", "float32", 1, 0, 4]], "Expected `array`"),
        ([["a", "float32", [1], 4, 4]], "offset 4 .* allowed: offset 0"),
        ([["a", "float32", [1], False, 4]], "got `bool`"),
        ([["a", "float32", [1], 0.0, 4]], "got `float`"),
        ([["a", "float32", [1], 0, 5]], "num_bytes 4"),
        ([["a", "float32", [1], 0, 4], ["b", "float32", [1], 3, 4]], "tensors\\[1\\].*allowed: offset 4"),
        ([["a", "float32", [1], 0, 4], ["b", "float32", [1], 5, 4]], "tensors\\[1\\].*allowed: offset 4"),
        ([["a", "float32", [2**40, 2**40], 0, 2**62]], f"num_bytes {2**82}"),
        ([["a", "uint8", [2**62], 0, 2**62], ["b", "uint8", [2**62], 2**62, 2**62]], "2\\^63"),
        ([["a", "uint8", [MAX_INT] * 8, 0, MAX_INT]], "num_bytes"),
        ([["a", "float32", [0], 0, 0]], "without a byte"),
        ([["a", "uint8", [1], 0, 1], ["a", "uint8", [1], 1, 1]], "each name once"),
        ([["a", "uint8", [1], 0, 1]], "payload_bytes is 50000; allowed for an anchor: 1"),
        ([["a", "uint8", [50_000], 0, 50_000]], None),
    ],
)
def test_tensors_lie_one_behind_the_other(tensors: object, words: str | None) -> None:
    message = with_key("MANIFEST_REPLY", "tensors", tensors)
    if words is None:
        assert messages.read_manifest(over_the_wire(message)).total_bytes == 50_000
    else:
        refuse(message, words)


DELTA = describe_delta(MANIFEST, OLDER, np.arange(CHUNK + 3, dtype=np.uint16).view(np.uint8)[: CHUNK + 3])
EMPTY = describe_delta(MANIFEST, OLDER, np.zeros(0, np.uint8))


@pytest.mark.parametrize("manifest", [DELTA, EMPTY], ids=["two chunks", "no change"])
def test_the_manifest_of_a_delta_round_trips(manifest: Manifest) -> None:
    read = messages.read_manifest(over_the_wire(messages.manifest_reply(manifest)))
    assert read == manifest
    assert (read.parent, read.num_chunks) == (OLDER, -(-manifest.payload_bytes // CHUNK))
    assert read.total_bytes == MANIFEST.total_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parent": [3, 17]}, "parent is \\[3, 17\\]; allowed"),
        ({"parent": [3, 18]}, "parent is"),
        ({"parent": [2, 12]}, "the same lineage"),
        ({"parent": [4, 0]}, "the same lineage"),
        ({"parent": None}, "allowed for an anchor: 50000"),
        ({"payload_bytes": 50_000}, "allowed for a delta: less than the snapshot's 50000"),
        ({"payload_bytes": 2**62}, "allowed for a delta"),
        ({"payload_bytes": CHUNK}, "chunk hashes"),
        ({"payload_bytes": 0}, "chunk hashes"),
    ],
)
def test_the_manifest_of_a_delta_is_less_and_of_the_same_lineage(changes: dict[str, object], words: str) -> None:
    message = messages.manifest_reply(DELTA)
    refuse(with_body(message, {**body_of(message), **changes}), words)


def test_a_name_of_half_a_character_is_refused() -> None:
    packed = bytes(GOOD["MANIFEST_REPLY"].body)
    for half in (b"\xed\xa0\x80", b"\xff\xfe\xfd"):
        message = Message("MANIFEST_REPLY", packed.replace(b"norm", b"n" + half), GOOD["MANIFEST_REPLY"].arrays)
        refuse(message, "utf-8")


@pytest.mark.parametrize(
    "arrays",
    [
        (),
        (np.zeros((MANIFEST.num_chunks, 16), "u1"),) * 2,
        (np.zeros((MANIFEST.num_chunks + 1, 16), "u1"),),
        (np.zeros((MANIFEST.num_chunks, 15), "u1"),),
        (np.zeros(MANIFEST.num_chunks * 16, "u1"),),
        (np.zeros((MANIFEST.num_chunks, 16), "i1"),),
        (np.zeros((MANIFEST.num_chunks, 16, 1), "u1"),),
        (np.zeros((0, 16), "u1"),),
    ],
    ids=lambda arrays: " ".join(f"{array.dtype.str}{list(array.shape)}" for array in arrays),
)
def test_as_many_hashes_as_chunks(arrays: tuple[np.ndarray, ...]) -> None:
    refuse(Message("MANIFEST_REPLY", GOOD["MANIFEST_REPLY"].body, arrays))
    if len(arrays) != 1 or arrays[0].ndim != 1 or arrays[0].dtype != np.uint8:
        refuse(Message("CHUNK_REPLY", GOOD["CHUNK_REPLY"].body, arrays), "one \\|u1 of 1 dimensions is due")


def test_a_manifest_of_many_tensors() -> None:
    names = [f"model.layers.{i}.weight" for i in range(30_000)]
    tensors = tuple(TensorSpec(name, "bfloat16", (64, 32), i * 4096, 4096) for i, name in enumerate(names))
    hashes = tuple(i.to_bytes(16, "big") for i in range(len(names)))
    manifest = Manifest("run", VERSION, None, tensors, len(names) * 4096, 4096, hashes, bytes(16), 0.0)
    read = messages.read_manifest(over_the_wire(messages.manifest_reply(manifest)))
    assert read == manifest
    assert {type(spec) for spec in read.tensors} == {TensorSpec}
