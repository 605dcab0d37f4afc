"""The commands of the weight channel: one function that writes each, one that reads each, as in PROTOCOL.md.

HEARTBEAT and ERROR are those of `commands.py`. What arrives from the network raises `ProtocolError` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from enum import StrEnum

import numpy as np
from pydantic import Field

from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.trajectory import Facts, Name, PolicyVersion
from broker.protocol.weights import (
    DTYPES,
    HASH_BYTES,
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    Bytes,
    Manifest,
    TensorSpec,
    tensor_problem,
)

MAX_INT = 2**63 - 1
MANIFEST_KEYS = frozenset(
    {"run_id", "lineage", "version", "parent", "tensors", "chunk_bytes", "total_hash", "created_at"}
)

FROM_RECEIVER = ("HELLO", "HEARTBEAT", "WATCH", "MANIFEST", "CHUNK")
FROM_SERVER = ("WELCOME", "HEARTBEAT", "ANNOUNCE", "MANIFEST_REPLY", "CHUNK_REPLY", "ERROR")


class Role(StrEnum):
    """What a peer of the weight channel's serving half is. An operator only watches."""

    RELAY = "relay"
    ACTOR = "actor"
    OPERATOR = "operator"


class Hello(Facts):
    """First message on every socket. `session` is drawn once per process and survives its reconnections."""

    role: Role = Field(strict=False)
    peer_id: Name
    run_id: Name
    session: Name


def version_text(version: PolicyVersion) -> str:
    """LINEAGE.VERSION, the `about` of a NOT_FOUND."""
    return f"{version.lineage}.{version.version}"


def welcome(run_id: str, heartbeat_s: float, liveness: int) -> Message:
    """WELCOME: the server's timers, which the peer adopts."""
    return Message("WELCOME", {"run_id": run_id, "heartbeat_s": heartbeat_s, "liveness": liveness})


def watch(have: PolicyVersion | None) -> Message:
    """WATCH: announce the newest version to me, now and at every change; `have` is the version I hold whole."""
    return Message("WATCH", {"have": None if have is None else list(have)})


def announce(newest: PolicyVersion | None, num_bytes: int) -> Message:
    """ANNOUNCE: the newest version that can be pulled here and its size in bytes, or that there is none."""
    return Message("ANNOUNCE", {"newest": None if newest is None else list(newest), "num_bytes": num_bytes})


def manifest_request(version: PolicyVersion) -> Message:
    """MANIFEST: send me the manifest of this version."""
    return Message("MANIFEST", {"lineage": version.lineage, "version": version.version})


def chunk_request(version: PolicyVersion, index: int) -> Message:
    """CHUNK: send me this chunk."""
    return Message("CHUNK", {"lineage": version.lineage, "version": version.version, "index": index})


def chunk_reply(version: PolicyVersion, index: int, data: Bytes) -> Message:
    """CHUNK_REPLY: the bytes of one chunk, referenced, not copied."""
    body = {"lineage": version.lineage, "version": version.version, "index": index}
    return Message("CHUNK_REPLY", body, (data,))


def manifest_reply(manifest: Manifest) -> Message:
    """MANIFEST_REPLY: the manifest, its chunk hashes as one |u1 array of shape [num_chunks, 16]."""
    parent = manifest.parent
    body = {
        "run_id": manifest.run_id,
        "lineage": manifest.version.lineage,
        "version": manifest.version.version,
        "parent": None if parent is None else list(parent),
        "tensors": [[s.name, s.dtype, list(s.shape), s.offset, s.num_bytes] for s in manifest.tensors],
        "chunk_bytes": manifest.chunk_bytes,
        "total_hash": manifest.total_hash,
        "created_at": manifest.created_at,
    }
    hashes = np.frombuffer(b"".join(manifest.chunk_hashes), np.uint8).reshape(-1, HASH_BYTES)
    return Message("MANIFEST_REPLY", body, (hashes,))


def read_have(message: Message) -> PolicyVersion | None:
    """`have` of a WATCH."""
    _close(message, {"have"})
    return _pair(message, "have")


def read_announce(message: Message) -> tuple[PolicyVersion | None, int]:
    """`newest` and `num_bytes` of an ANNOUNCE."""
    _close(message, {"newest", "num_bytes"})
    return _pair(message, "newest"), _count(message, "num_bytes")


def read_manifest_request(message: Message) -> PolicyVersion:
    """The version that a MANIFEST asks for."""
    _close(message, {"lineage", "version"})
    return _version(message)


def read_chunk_request(message: Message) -> tuple[PolicyVersion, int]:
    """The version and the index that a CHUNK asks for."""
    _close(message, {"lineage", "version", "index"})
    return _version(message), _count(message, "index")


def read_chunk(message: Message) -> tuple[PolicyVersion, int, Bytes]:
    """Version, index and bytes of a CHUNK_REPLY. The bytes are not verified: that needs the manifest."""
    return *read_chunk_request(message), _bytes_array(message, ndim=1)


def read_manifest(message: Message) -> Manifest:
    """The manifest in a MANIFEST_REPLY, consistent in itself: tensors without gaps, as many hashes as chunks."""
    _close(message, MANIFEST_KEYS)
    body = message.body
    run_id, total_hash, created_at = body.get("run_id"), body.get("total_hash"), body.get("created_at")
    if not isinstance(run_id, str) or not 1 <= len(run_id) <= 256:
        raise _bad(message, "run_id", run_id, "text of 1 to 256 characters")
    if not isinstance(total_hash, bytes) or len(total_hash) != HASH_BYTES:
        raise _bad(message, "total_hash", total_hash, f"{HASH_BYTES} bytes")
    if not isinstance(created_at, int | float) or isinstance(created_at, bool) or not 0 <= float(created_at) < math.inf:
        raise _bad(message, "created_at", created_at, "seconds since 1970, not negative")
    chunk_bytes = _count(message, "chunk_bytes")
    if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise _bad(message, "chunk_bytes", chunk_bytes, f"{MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}")
    tensors = _read_tensors(message)
    total_bytes = tensors[-1].offset + tensors[-1].num_bytes
    hashes = _bytes_array(message, ndim=2)
    num_chunks = -(-total_bytes // chunk_bytes)
    if hashes.shape != (num_chunks, HASH_BYTES):
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE,
            f"MANIFEST_REPLY: chunk hashes of shape {list(hashes.shape)}; {total_bytes} bytes in chunks of "
            f"{chunk_bytes} need [{num_chunks}, {HASH_BYTES}]",
        )
    joined = hashes.tobytes()
    chunk_hashes = tuple(joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES))
    version, parent = _version(message), _pair(message, "parent")
    return Manifest(run_id, version, parent, tensors, chunk_bytes, chunk_hashes, total_hash, float(created_at))


def _read_tensors(message: Message) -> tuple[TensorSpec, ...]:
    rows = message.body.get("tensors")
    if not isinstance(rows, list) or not rows:
        raise _bad(message, "tensors", rows, "a list of [name, dtype, shape, offset, num_bytes], not empty")
    specs: list[TensorSpec] = []
    names: set[str] = set()
    expected = 0
    for row in rows:
        if not isinstance(row, list) or len(row) != 5:
            raise _bad(message, "tensors", row, "rows [name, dtype, shape, offset, num_bytes]")
        name, dtype, shape, offset, num_bytes = row
        if problem := tensor_problem(name, dtype, shape):
            raise ProtocolError(ErrorCode.BAD_MESSAGE, f"MANIFEST_REPLY: {problem}")
        size = math.prod(shape) * DTYPES[dtype][1]
        if type(offset) is not int or type(num_bytes) is not int or (offset, num_bytes) != (expected, size):
            raise _bad(message, "tensors", row, f"offset {expected} and num_bytes {size} (no gap, no overlap)")
        if name in names:
            raise _bad(message, "tensors", name, "each name once")
        names.add(name)
        expected += size
        if expected > MAX_INT:
            raise _bad(message, "tensors", row, "a snapshot below 2^63 bytes")
        specs.append(TensorSpec(name, dtype, tuple(shape), offset, num_bytes))
    if expected == 0:
        raise ProtocolError(ErrorCode.BAD_MESSAGE, "MANIFEST_REPLY: a snapshot without a byte")
    return tuple(specs)


def _bytes_array(message: Message, ndim: int) -> Bytes:
    if len(message.arrays) != 1 or message.arrays[0].dtype != np.uint8 or message.arrays[0].ndim != ndim:
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE,
            f"{message.command[:40]}: carries {len(message.arrays)} arrays; one |u1 of {ndim} dimensions is due",
        )
    return message.arrays[0]


def _close(message: Message, keys: AbstractSet[str]) -> None:
    """Bodies are closed: refuse a key that this version of the protocol does not have, and one that is missing."""
    if wrong := message.body.keys() ^ keys:
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE, f"{message.command[:40]}: keys {sorted(wrong)!r:.80}; due are exactly {sorted(keys)}"
        )


def _version(message: Message) -> PolicyVersion:
    return PolicyVersion(_count(message, "lineage"), _count(message, "version"))


def _count(message: Message, key: str) -> int:
    value = message.body.get(key)
    if type(value) is not int or not 0 <= value <= MAX_INT:
        raise _bad(message, key, value, "an integer, 0 to 2^63 - 1")
    return value


def _pair(message: Message, key: str) -> PolicyVersion | None:
    value = message.body.get(key)
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(type(n) is not int or not 0 <= n <= MAX_INT for n in value)
    ):
        raise _bad(message, key, value, "null or [lineage, version]")
    return PolicyVersion(value[0], value[1])


def _bad(message: Message, key: str, value: object, allowed: str) -> ProtocolError:
    return ProtocolError(ErrorCode.BAD_MESSAGE, f"{message.command[:40]}: {key} is {value!r:.80}; allowed: {allowed}")
