"""The commands of the weight channel: a body for each, and what of a message its type cannot say, as in PROTOCOL.md.

HEARTBEAT and ERROR are those of `commands.py`, whose `parse_body` reads these bodies, too. What arrives from the
network raises `ProtocolError` and nothing else. Opens no socket, holds no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar, Final, NamedTuple

import numpy as np
from msgspec import Meta

from broker.protocol.commands import parse_body
from broker.protocol.common import Body, Period
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.proofs import Proof
from broker.protocol.trajectory import Name, PolicyVersion, Positive, Seconds
from broker.protocol.weights import (
    HASH_BYTES,
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    Bytes,
    Integer,
    Manifest,
    TensorSpec,
    check_layout,
)

FROM_RECEIVER: Final = ("HELLO", "HEARTBEAT", "WATCH", "MANIFEST", "CHUNK")
FROM_SERVER: Final = ("WELCOME", "HEARTBEAT", "ANNOUNCE", "PUSH_PART", "PUSH", "MANIFEST_REPLY", "CHUNK_REPLY", "ERROR")

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
    """Announce the newest version to me, now and at every change; `have` is the version I hold whole. `push_bytes`:
    the next one may come as one PUSH, with what goes before it, of a payload of at most so many bytes; 0: only
    announced."""

    COMMAND: ClassVar[str] = "WATCH"
    have: Pair | None
    push_bytes: Integer


class Announce(Body, frozen=True, kw_only=True):
    """The newest version that can be pulled here and its size in bytes, or that there is none. `proof`: of its
    snapshot, where that is signed and the server has it already."""

    COMMAND: ClassVar[str] = "ANNOUNCE"
    newest: Pair | None
    num_bytes: Integer
    proof: Proof | None


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
    proof: Proof | None


class PushPart(OfVersion, frozen=True, kw_only=True):
    """Ahead of a PUSH, while its payload is still being made: some bytes of that, |u1 of one dimension, which begin at
    `start`. See `read_part`."""

    COMMAND: ClassVar[str] = "PUSH_PART"
    parent: Pair
    start: Integer


class Push(ManifestReply, frozen=True, kw_only=True):
    """Instead of the first ANNOUNCE: the newest version as a delta to what the receiver holds, unasked. Its arrays are
    those of MANIFEST_REPLY and the payload but for its first `sent_bytes`, which were in PUSH_PARTs. See `read_push`.
    """

    COMMAND: ClassVar[str] = "PUSH"
    sent_bytes: Integer


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


class Part(NamedTuple):
    """Some bytes of the payload of a delta that is being made, from byte `start` on. Nothing is verified."""

    version: PolicyVersion
    parent: PolicyVersion
    start: int
    data: Bytes


class Pushed(NamedTuple):
    """What a PUSH carries: the payload from byte `sent_bytes` on. The bytes are not verified."""

    manifest: Manifest
    sent_bytes: int
    rest: Bytes


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
    return _described(ManifestReply, manifest)


def push(manifest: Manifest, payload: Bytes, sent_bytes: int = 0) -> Message:
    """The PUSH of a delta, the first bytes of which were sent in parts; the rest is referenced, not copied."""
    return _described(Push, manifest, payload[sent_bytes:], sent_bytes=sent_bytes)


def push_part(part: Part) -> Message:
    """The PUSH_PART of some bytes, referenced, not copied."""
    version = part.version
    body = PushPart(lineage=version.lineage, version=version.version, parent=part.parent, start=part.start)
    return body.pack((part.data,))


def _described(kind: type[ManifestReply], manifest: Manifest, *more: Bytes, **fields: int) -> Message:
    body = kind(
        **fields,
        run_id=manifest.run_id,
        lineage=manifest.version.lineage,
        version=manifest.version.version,
        parent=manifest.parent,
        tensors=manifest.tensors,
        payload_bytes=manifest.payload_bytes,
        chunk_bytes=manifest.chunk_bytes,
        total_hash=manifest.total_hash,
        created_at=manifest.created_at,
        proof=manifest.proof,
    )
    hashes = np.frombuffer(b"".join(manifest.chunk_hashes), np.uint8).reshape(-1, HASH_BYTES)
    return body.pack((hashes, *more))


def policy_version(pair: Pair | None) -> PolicyVersion | None:
    """The version that a body names as a pair."""
    return None if pair is None else PolicyVersion(*pair)


def read_chunk(message: Message) -> Chunk:
    """What a CHUNK_REPLY carries."""
    body = parse_body(message, ChunkReply)
    (data,) = _bytes_arrays(message, 1)
    return Chunk(body.policy_version, policy_version(body.parent), body.index, data)


def read_manifest(message: Message) -> Manifest:
    """The manifest in a MANIFEST_REPLY, consistent in itself: tensors without gaps, a payload that an anchor or a delta
    can have, as many hashes as chunks."""
    body = parse_body(message, ManifestReply)
    (hashes,) = _bytes_arrays(message, 2)
    return _manifest(body, hashes)


def read_push(message: Message) -> Pushed:
    """What a PUSH carries; its manifest is one as `read_manifest` gives it, of a delta."""
    body = parse_body(message, Push)
    hashes, rest = _bytes_arrays(message, 2, 1)
    manifest = _manifest(body, hashes)
    if manifest.parent is None:
        raise _bad(body, "parent is null; allowed: an older version of the same lineage")
    if body.sent_bytes + rest.size != manifest.payload_bytes:
        raise _bad(
            body,
            f"a payload of {rest.size} bytes behind sent_bytes, {body.sent_bytes}; allowed: payload_bytes, "
            f"{manifest.payload_bytes}, in all",
        )
    return Pushed(manifest, body.sent_bytes, rest)


def read_part(message: Message) -> Part:
    """What a PUSH_PART carries."""
    body = parse_body(message, PushPart)
    (data,) = _bytes_arrays(message, 1)
    return Part(body.policy_version, PolicyVersion(*body.parent), body.start, data)


def _manifest(body: ManifestReply, hashes: Bytes) -> Manifest:
    try:
        _check_payload(body, check_layout(body.tensors))
        num_chunks = -(-body.payload_bytes // body.chunk_bytes)
        if hashes.shape != (num_chunks, HASH_BYTES):
            raise ValueError(
                f"chunk hashes of shape {list(hashes.shape)}; {body.payload_bytes} bytes in chunks of "
                f"{body.chunk_bytes} need [{num_chunks}, {HASH_BYTES}]"
            )
    except ValueError as error:
        raise _bad(body, str(error)) from error
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
        body.proof,
    )


def _check_payload(body: ManifestReply, total_bytes: int) -> None:
    """Raises ValueError unless an anchor is the whole snapshot, and a delta less, to an older one of its lineage."""
    size, parent = body.payload_bytes, body.parent
    if parent is None:
        if size != total_bytes:
            raise ValueError(f"payload_bytes is {size}; allowed for an anchor: {total_bytes}, its tensors")
        return
    if parent[0] != body.lineage or parent[1] >= body.version:
        raise ValueError(
            f"parent is {list(parent)}; allowed for version [{body.lineage}, {body.version}]: null, or an older "
            "version of the same lineage"
        )
    if size >= total_bytes:
        raise ValueError(f"payload_bytes is {size}; allowed for a delta: less than the snapshot's {total_bytes}")


def _bytes_arrays(message: Message, *ndims: int) -> tuple[Bytes, ...]:
    """The arrays, of so many dimensions each."""
    if tuple(array.ndim if array.dtype == np.uint8 else -1 for array in message.arrays) != ndims:
        due = ", ".join(f"one |u1 of {ndim} dimensions" for ndim in ndims)
        text = f"{message.command[:40]}: carries {len(message.arrays)} arrays; {due} is due"
        raise ProtocolError(ErrorCode.BAD_MESSAGE, text)
    return message.arrays


def _bad(body: ManifestReply, text: str) -> ProtocolError:
    return ProtocolError(ErrorCode.BAD_MESSAGE, f"{body.COMMAND}: {text}")
