"""The learner's signature: Ed25519 keys, which say who made something, whoever passed it on.

CURVE keys, which everything else on the wire is known by, agree on secrets between two ends and sign nothing. Knows no
file (`keys.py`) and not what is signed.
"""

from __future__ import annotations

from collections.abc import Iterable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


class SigningKey:
    """A secret key, of 32 bytes."""

    def __init__(self, secret: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(secret)

    @classmethod
    def make(cls) -> SigningKey:
        """A new one."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def secret(self) -> bytes:
        """To be kept."""
        return self._key.private_bytes_raw()

    @property
    def public(self) -> bytes:
        """What its signatures are verified with, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, statement: bytes) -> bytes:
        """64 bytes."""
        return self._key.sign(statement)


class Signers:
    """The public keys of those whose signature counts."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._keys = [Ed25519PublicKey.from_public_bytes(key) for key in keys]

    def accept(self, statement: bytes, signature: bytes) -> bool:
        """Whether one of them signed this."""
        return any(_verifies(key, statement, signature) for key in self._keys)


def _verifies(key: Ed25519PublicKey, statement: bytes, signature: bytes) -> bool:
    try:
        key.verify(signature, statement)
    except InvalidSignature:
        return False
    return True
