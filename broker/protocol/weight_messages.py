"""The commands of the weight channel: a body for each, and what of a message its type cannot say, as in PROTOCOL.md.

HEARTBEAT and ERROR are those of `commands.py`, whose `parse_body` reads these bodies, too. What arrives from the
network raises `ProtocolError` and nothing else. Opens no socket, holds no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar, Final

import numpy as np
from msgspec import Meta

from broker.protocol.commands import parse_body
from broker.protocol.common import Body, Period
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.trajectory import Name, PolicyVersion, Positive, Seconds
from broker.protocol.weights import (
    DTYPES,
    HASH_BYTES,
    MAX_CHUNK_BYTES,
    MAX_INT,
    MIN_CHUNK_BYTES,
    Bytes,
    Integer,
    Manifest,
    TensorSpec,
    tensor_problem,
)

FROM_RECEIVER: Final = ("HELLO", "HEARTBEAT", "WATCH", "MANIFEST", "CHUNK")
FROM_SERVER: Final = ("WELCOME", "HEARTBEAT", "ANNOUNCE", "MANIFEST_REPLY", "CHUNK_REPLY", "ERROR")

Pair = tuple[Integer, Integer]  # a policy version: its numbers may be larger here than on the experience channel


class Role(StrEnum):
    """What a peer of the weight channel's serving half is. An operator only watches."""

    RELAY = "relay"
    ACTOR = "actor"
    OPERATOR = "operator"


class Hello(Body, frozen=True, kw_only=True):
    """First message on every socket. `session` is drawn once per process and survives its reconnections."""

    COMMAND: ClassVar[str] = "HELLO"
    role: Role
    peer_id: Name
    run_id: Name
    session: Name


class Welcome(Body, frozen=True, kw_only=True):
    """The server's timers, which the peer adopts."""

    COMMAND: ClassVar[str] = "WELCOME"
    run_id: Name
    heartbeat_s: Period
    liveness: Positive


class Watch(Body, frozen=True, kw_only=True):
    """Announce the newest version to me, now and at every change; `have` is the version I hold whole."""

    COMMAND: ClassVar[str] = "WATCH"
    have: Pair | None


class Announce(Body, frozen=True, kw_only=True):
    """The newest version that can be pulled here and its size in bytes, or that there is none."""

    COMMAND: ClassVar[str] = "ANNOUNCE"
    newest: Pair | None
    num_bytes: Integer


class OfVersion(Body, frozen=True, kw_only=True):
    """Base of what is said about one version."""

    lineage: Integer
    version: Integer

    @property
    def policy_version(self) -> PolicyVersion:
        """Both numbers."""
        return PolicyVersion(self.lineage, self.version)


class ManifestRequest(OfVersion, frozen=True, kw_only=True):
    """Send me the manifest of this version; `have` is the version whose snapshot I hold whole and verified."""

    COMMAND: ClassVar[str] = "MANIFEST"
    have: Pair | None


class ManifestReply(OfVersion, frozen=True, kw_only=True):
    """The manifest; its chunk hashes are one |u1 array of shape [num_chunks, 16]. See `read_manifest`."""

    COMMAND: ClassVar[str] = "MANIFEST_REPLY"
    run_id: Name
    parent: Pair | None
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    payload_bytes: Integer
    chunk_bytes: Annotated[int, Meta(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)]
    total_hash: Annotated[bytes, Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
    created_at: Seconds


class ChunkRequest(OfVersion, frozen=True, kw_only=True):
    """Send me this chunk of the anchor (`parent` None) or of the delta to `parent`."""

    COMMAND: ClassVar[str] = "CHUNK"
    parent: Pair | None
    index: Integer


class ChunkReply(OfVersion, frozen=True, kw_only=True):
    """One chunk; its bytes are one |u1 array of one dimension. See `read_chunk`."""

    COMMAND: ClassVar[str] = "CHUNK_REPLY"
    parent: Pair | None
    index: Integer


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """What a CHUNK_REPLY carries. The bytes are not verified: that needs the manifest."""

    version: PolicyVersion
    parent: PolicyVersion | None
    index: int
    data: Bytes


def version_text(version: PolicyVersion) -> str:
    """LINEAGE.VERSION, the `about` of a NOT_FOUND."""
    return f"{version.lineage}.{version.version}"


def manifest_request(version: PolicyVersion, have: PolicyVersion | None) -> Message:
    """The MANIFEST that asks for this version, from who holds `have`."""
    return ManifestRequest(lineage=version.lineage, version=version.version, have=have).pack()


def chunk_request(version: PolicyVersion, parent: PolicyVersion | None, index: int) -> Message:
    """The CHUNK that asks for this chunk."""
    return ChunkRequest(lineage=version.lineage, version=version.version, parent=parent, index=index).pack()


def chunk_reply(version: PolicyVersion, parent: PolicyVersion | None, index: int, data: Bytes) -> Message:
    """The CHUNK_REPLY with the bytes of one chunk, referenced, not copied."""
    return ChunkReply(lineage=version.lineage, version=version.version, parent=parent, index=index).pack((data,))


def manifest_reply(manifest: Manifest) -> Message:
    """The MANIFEST_REPLY that carries this manifest."""
    body = ManifestReply(
        run_id=manifest.run_id,
        lineage=manifest.version.lineage,
        version=manifest.version.version,
        parent=manifest.parent,
        tensors=manifest.tensors,
        payload_bytes=manifest.payload_bytes,
        chunk_bytes=manifest.chunk_bytes,
        total_hash=manifest.total_hash,
        created_at=manifest.created_at,
    )
    return body.pack((np.frombuffer(b"".join(manifest.chunk_hashes), np.uint8).reshape(-1, HASH_BYTES),))


def policy_version(pair: Pair | None) -> PolicyVersion | None:
    """The version that a body names as a pair."""
    return None if pair is None else PolicyVersion(*pair)


def read_chunk(message: Message) -> Chunk:
    """What a CHUNK_REPLY carries."""
    body = parse_body(message, ChunkReply)
    data = _bytes_array(message, ndim=1)
    return Chunk(body.policy_version, policy_version(body.parent), body.index, data)


def read_manifest(message: Message) -> Manifest:
    """The manifest in a MANIFEST_REPLY, consistent in itself: tensors without gaps, a payload that an anchor or a delta
    can have, as many hashes as chunks."""
    body = parse_body(message, ManifestReply)
    _check_payload(body, _check_tensors(body.tensors))
    hashes = _bytes_array(message, ndim=2)
    num_chunks = -(-body.payload_bytes // body.chunk_bytes)
    if hashes.shape != (num_chunks, HASH_BYTES):
        raise _bad(
            f"chunk hashes of shape {list(hashes.shape)}; {body.payload_bytes} bytes in chunks of {body.chunk_bytes} "
            f"need [{num_chunks}, {HASH_BYTES}]"
        )
    joined = hashes.tobytes()
    chunk_hashes = tuple(joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES))
    return Manifest(
        body.run_id,
        body.policy_version,
        policy_version(body.parent),
        body.tensors,
        body.payload_bytes,
        body.chunk_bytes,
        chunk_hashes,
        body.total_hash,
        body.created_at,
    )


def _check_payload(body: ManifestReply, total_bytes: int) -> None:
    """Raises ProtocolError unless an anchor is the whole snapshot, and a delta less, to an older one of its lineage."""
    if body.parent is None:
        if body.payload_bytes != total_bytes:
            raise _bad(f"payload_bytes is {body.payload_bytes}; allowed for an anchor: {total_bytes}, its tensors")
        return
    if body.parent[0] != body.lineage or body.parent[1] >= body.version:
        raise _bad(
            f"parent is {list(body.parent)}; allowed for version [{body.lineage}, {body.version}]: null, or an older "
            "version of the same lineage"
        )
    if body.payload_bytes >= total_bytes:
        raise _bad(
            f"payload_bytes is {body.payload_bytes}; allowed for a delta: less than the snapshot's {total_bytes}"
        )


def _check_tensors(specs: tuple[TensorSpec, ...]) -> int:
    """Bytes of the snapshot. Raises ProtocolError unless each tensor is one, and begins where the one before ends."""
    names: set[str] = set()
    end = 0
    for i, (name, dtype, shape, offset, num_bytes) in enumerate(specs):
        if dtype not in DTYPES or name == "__metadata__":  # what else a tensor may not be, its type has refused
            raise _bad(f"tensors[{i}]: {tensor_problem(name, dtype, shape)}")
        size = math.prod(shape) * DTYPES[dtype][1]
        if offset != end or num_bytes != size:
            raise _bad(
                f"tensors[{i}]: tensor {name!r:.80} has offset {offset} and num_bytes {num_bytes}; allowed: offset "
                f"{end} and num_bytes {size} (no gap, no overlap)"
            )
        if name in names:
            raise _bad(f"tensors[{i}]: tensor {name!r:.80} is there twice; allowed: each name once")
        names.add(name)
        end += size
        if end > MAX_INT:
            raise _bad(f"tensors[{i}]: tensor {name!r:.80} ends at byte {end}; allowed: a snapshot below 2^63 bytes")
    if end == 0:
        raise _bad("a snapshot without a byte; allowed: at least one tensor that is not empty")
    return end


def _bytes_array(message: Message, ndim: int) -> Bytes:
    if len(message.arrays) != 1 or message.arrays[0].dtype != np.uint8 or message.arrays[0].ndim != ndim:
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE,
            f"{message.command[:40]}: carries {len(message.arrays)} arrays; one |u1 of {ndim} dimensions is due",
        )
    return message.arrays[0]


def _bad(text: str) -> ProtocolError:
    return ProtocolError(ErrorCode.BAD_MESSAGE, f"MANIFEST_REPLY: {text}")
