"""What vouches for a version where the hashes, which find damage, do not: a digest that nobody can forge, signed.

A proof is of a delta's payload or of a whole snapshot. What the learner signs names the run, the version, its tensors
and its hash as well, so a signature is of no use for anything else. Who holds the base that a signed delta was made
from, and has proof of that, has proof of the result without hashing it. Pure: no key, no socket, no file.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

from blake3 import blake3
from msgspec import Meta, msgpack

if TYPE_CHECKING:
    from broker.protocol.weights import Manifest

DIGEST_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
PURPOSE: Final = "ergon weights 1"


class Of(StrEnum):
    """What a proof is of."""

    PAYLOAD = "payload"  # a delta from exactly the parent that its manifest names
    SNAPSHOT = "snapshot"  # the version whole, whatever it travels as


class Proof(NamedTuple):
    """`digest` is BLAKE3 of what `of` says; `signature` the learner's, of `statement`."""

    of: Of
    digest: Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
    signature: Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


def digest(data: memoryview, num_threads: int = 1) -> bytes:
    """BLAKE3 of some bytes: 0.2 s of CPU a GB, on threads of its own where that is allowed."""
    return blake3(data, max_threads=num_threads).digest()


def statement(manifest: Manifest, of: Of, digest: bytes) -> bytes:
    """The bytes to be signed: what a manifest promises of its version, and the digest of what it is promised of."""
    parent = manifest.parent if of is Of.PAYLOAD else None
    version, tensors, total = manifest.version, manifest.tensors, manifest.total_hash
    return _PACK((PURPOSE, manifest.run_id, version, parent, tensors, total, of, digest))


_PACK = msgpack.Encoder().encode
