"""Whether the learner made what arrived: signing what is published, and refusing what is not signed as it must be.

Without keys nothing is signed and nothing is refused. Owns no version; decides nothing about which one is served.
"""

from __future__ import annotations

from broker.process.signing import Signers, SigningKey
from broker.protocol import proofs
from broker.protocol.proofs import Of, Proof, statement
from broker.protocol.weights import Buffer, Manifest, flat
from broker.weights import metrics
from broker.weights.threads import num_threads


class WeightsCorruptError(Exception):
    """What arrived is not what the manifest promises, repeatedly, or the manifest contradicts itself."""


class WeightsForgedError(WeightsCorruptError):
    """The manifest is not signed by whom it must be, or what arrived is not what was signed."""


def sign(manifest: Manifest, of: Of, data: Buffer, key: SigningKey, threads: int = 1) -> Proof:
    """The proof that this key's holder made the version with this manifest, whose payload or snapshot is `data`."""
    digest = proofs.digest(flat(data), threads)
    return Proof(of, digest, key.sign(statement(manifest, of, digest)))


def check_signed(manifest: Manifest, signers: Signers | None) -> None:
    """Raise WeightsForgedError unless one of the signers vouches for this; None: nobody has to."""
    if signers is None:
        return
    proof = manifest.proof
    if proof is None:
        raise _forged(manifest, "unsigned", "is not signed")
    if proof.of is Of.PAYLOAD and manifest.parent is None:
        raise _forged(manifest, "signature", "is a snapshot with the proof of a delta")
    if not signers.accept(statement(manifest, proof.of, proof.digest), proof.signature):
        raise _forged(manifest, "signature", "is not signed by a key that counts (`signs` in public.keys)")


def check_digest(manifest: Manifest, of: Of, data: Buffer) -> None:
    """Raise WeightsForgedError where the manifest's proof is of this, and these are not the bytes that it is of."""
    proof = manifest.proof
    if proof is not None and proof.of is of and proofs.digest(flat(data), num_threads()) != proof.digest:
        raise _forged(manifest, "digest", f"has another {of} than was signed")


def _forged(manifest: Manifest, reason: str, what: str) -> WeightsForgedError:
    metrics.forged.labels(reason).inc()
    lineage, number = manifest.version
    return WeightsForgedError(
        f"version ({lineage}, {number}) {what}, so the learner did not make it; the old version stays in use: look at "
        "who serves it, and whose keys that has"
    )
