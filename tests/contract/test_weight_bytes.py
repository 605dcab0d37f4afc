"""The weight channel's messages as bytes: what was once on the wire means the same for ever, and is signed the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.process.signing import Signers, SigningKey
from broker.protocol import weight_messages as messages
from broker.protocol.commands import parse_body
from broker.protocol.frames import Message, decode, encode
from broker.protocol.proofs import Of, Proof
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Manifest, TensorSpec
from broker.weights.vouching import check_signed, sign

SECRET = bytes(range(32))
PAYLOAD = np.arange(6, dtype=np.uint8)
TENSORS = (TensorSpec("w", "bfloat16", (4, 1), 0, 8),)
VERSION, PARENT = PolicyVersion(3, 17), PolicyVersion(3, 16)
MANIFEST = Manifest("run", VERSION, PARENT, TENSORS, 6, 4096, (bytes(16),), b"0123456789abcdef", 1.5)
SIGNATURES = {
    Of.PAYLOAD: bytes.fromhex(
        "be69b54b0d403f5658d7f240ec34d3b9ed0c4cc46e65088e478804e615fcb7c8"
        "6925f11eace8e96d4c291cce0e2f30aa04db3430a6bcf24cc7e8f1a902e2d70f"
    ),
    Of.SNAPSHOT: bytes.fromhex(
        "ae0025c27a27b1705fb6786c9da702469c1491ea4a6cfb9afed1eddd8babc5b0"
        "0888b274cb6a08fb35a2ce70db0ec4961b43071f869f6cd5533d1c16ad487d08"
    ),
}
PROOFS = {of: Proof(of, blake3(PAYLOAD.data).digest(), SIGNATURES[of]) for of in Of}
BODY: dict[str, Any] = {
    "lineage": 3,
    "version": 17,
    "run_id": "run",
    "parent": [3, 16],
    "tensors": [["w", "bfloat16", [4, 1], 0, 8]],
    "payload_bytes": 6,
    "chunk_bytes": 4096,
    "total_hash": b"0123456789abcdef",
    "created_at": 1.5,
    "proof": ["payload", PROOFS[Of.PAYLOAD].digest, SIGNATURES[Of.PAYLOAD]],
}
# Each made by this project's code, and by hand: the body as a plain map, and the arrays.
PART = {"lineage": 3, "version": 17, "parent": [3, 16], "start": 0}
HASHES = (bytes(16), "|u1", [1, 16])
MESSAGES: dict[str, tuple[Callable[[], Message], dict[str, Any], list[tuple[bytes, str, list[int]]]]] = {
    "ANNOUNCE": (
        lambda: messages.Announce(newest=VERSION, num_bytes=8, proof=PROOFS[Of.SNAPSHOT]).pack(),
        {"newest": [3, 17], "num_bytes": 8, "proof": ["snapshot", PROOFS[Of.SNAPSHOT].digest, SIGNATURES[Of.SNAPSHOT]]},
        [],
    ),
    "MANIFEST_REPLY": (
        lambda: messages.manifest_reply(replace(MANIFEST, proof=PROOFS[Of.PAYLOAD])),
        BODY,
        [HASHES],
    ),
    "PUSH_PART": (
        lambda: messages.push_part(messages.Part(VERSION, PARENT, 0, PAYLOAD[:4])),
        PART,
        [(bytes(range(4)), "|u1", [4])],
    ),
    "PUSH": (
        lambda: messages.push(replace(MANIFEST, proof=PROOFS[Of.PAYLOAD]), PAYLOAD, 4),
        BODY | {"sent_bytes": 4},
        [HASHES, (bytes(range(4, 6)), "|u1", [2])],
    ),
}


@pytest.mark.parametrize("of", Of)
def test_a_statement_is_signed_the_same_for_ever(of: Of) -> None:
    """Ed25519 makes the same signature of the same bytes; here they are put together, and signed, by hand as well."""
    parent = [3, 16] if of is Of.PAYLOAD else None
    tensors = [["w", "bfloat16", [4, 1], 0, 8]]
    digest = blake3(PAYLOAD.data).digest()
    said = msgpack.packb(["ergon weights 1", "run", [3, 17], parent, tensors, b"0123456789abcdef", str(of), digest])
    assert Ed25519PrivateKey.from_private_bytes(SECRET).sign(said) == SIGNATURES[of]
    key = SigningKey(SECRET)
    assert sign(MANIFEST, of, PAYLOAD, key) == PROOFS[of]
    check_signed(replace(MANIFEST, proof=PROOFS[of]), Signers([key.public]))


@pytest.mark.parametrize("command", MESSAGES)
def test_a_message_is_the_bytes_that_the_page_describes(command: str) -> None:
    by_code, body, arrays = MESSAGES[command]
    frames = [bytes(frame) for frame in encode(by_code())]
    assert frames[0] == b"ERGN\x01\x00"
    envelope = msgpack.unpackb(frames[1])
    assert envelope == {"t": command, "b": body, "a": [[dtype, shape] for _, dtype, shape in arrays]}
    assert frames[2:] == [raw for raw, _, _ in arrays]


READ: dict[str, Callable[[Message], object]] = {
    "ANNOUNCE": lambda message: parse_body(message, messages.Announce).proof,
    "MANIFEST_REPLY": messages.read_manifest,
    "PUSH_PART": lambda message: messages.read_part(message)[:3],
    "PUSH": lambda message: messages.read_push(message)[:2],
}
MEANT: dict[str, object] = {
    "ANNOUNCE": PROOFS[Of.SNAPSHOT],
    "MANIFEST_REPLY": replace(MANIFEST, proof=PROOFS[Of.PAYLOAD]),
    "PUSH_PART": (VERSION, PARENT, 0),
    "PUSH": (replace(MANIFEST, proof=PROOFS[Of.PAYLOAD]), 4),
}


@pytest.mark.parametrize("command", MESSAGES)
def test_what_another_encoder_made_is_read(command: str) -> None:
    _, body, arrays = MESSAGES[command]
    envelope = {"t": command, "b": body, "a": [[dtype, shape] for _, dtype, shape in arrays]}
    frames = [b"ERGN\x01\x00", msgpack.packb(envelope), *(raw for raw, _, _ in arrays)]
    assert READ[command](decode(frames)) == MEANT[command]
