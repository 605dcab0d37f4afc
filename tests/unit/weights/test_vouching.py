"""What the learner signs is believed, of that version and those bytes; everything else is refused before it is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from prometheus_client import REGISTRY

from broker.process.signing import Signers, SigningKey
from broker.protocol import weight_messages as messages
from broker.protocol.proofs import Of, Proof, statement
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Bytes, Manifest, describe, describe_delta
from broker.weights.basefile import BaseFile
from broker.weights.chain import FoldJob, Payload
from broker.weights.sinks import DeltaRefusedError, StoreSink, describe_as
from broker.weights.store import Unsealed, WeightStore
from broker.weights.vouching import WeightsForgedError, check_signed, sign
from tests.unit.weights.harness import Harness, fill
from tests.unit.weights.samples import CHUNK, OLDER, VERSION, changed, snapshot

KEY = SigningKey.make()
SIGNERS = Signers([KEY.public])
ANCHOR, DATA = snapshot(version=OLDER)
DELTA, PAYLOAD, NEW_DATA = changed(ANCHOR, DATA, VERSION, seed=1)
NEW_ANCHOR = describe("run", VERSION, ANCHOR.tensors, NEW_DATA, CHUNK, 1.75e9)


def signed(manifest: Manifest, of: Of, data: Bytes, key: SigningKey = KEY) -> Manifest:
    return replace(manifest, proof=sign(manifest, of, data, key))


def refused(reason: str) -> float:
    return REGISTRY.get_sample_value("ergon_weights_forged_total", {"reason": reason}) or 0.0


def test_the_statement_is_what_the_protocol_page_says() -> None:
    """By another encoder and another implementation of the signature."""
    delta = signed(DELTA, Of.PAYLOAD, PAYLOAD)
    assert delta.proof is not None
    tensors = [[name, dtype, list(shape), *rest] for name, dtype, shape, *rest in DELTA.tensors]
    of_version = ["ergon weights 1", "run", [3, 17]]
    digest = blake3(PAYLOAD.data).digest()
    said = msgpack.packb([*of_version, [3, 12], tensors, DELTA.total_hash, "payload", digest])
    assert delta.proof.digest == digest
    Ed25519PublicKey.from_public_bytes(KEY.public).verify(delta.proof.signature, said)
    whole = signed(NEW_ANCHOR, Of.SNAPSHOT, NEW_DATA)
    assert whole.proof is not None
    digest = blake3(NEW_DATA.data).digest()
    said = msgpack.packb([*of_version, None, tensors, DELTA.total_hash, "snapshot", digest])
    Ed25519PublicKey.from_public_bytes(KEY.public).verify(whole.proof.signature, said)


def test_the_proof_of_a_snapshot_is_true_of_the_version_whatever_it_comes_as() -> None:
    proof = sign(NEW_ANCHOR, Of.SNAPSHOT, NEW_DATA, KEY)
    for manifest in (NEW_ANCHOR, DELTA, describe_delta(NEW_ANCHOR, PolicyVersion(3, 1), PAYLOAD)):
        check_signed(replace(manifest, proof=proof), SIGNERS)


def test_without_keys_nothing_has_to_be_signed() -> None:
    check_signed(ANCHOR, None)
    check_signed(replace(ANCHOR, proof=Proof(Of.SNAPSHOT, bytes(32), bytes(64))), None)


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "another"},
        {"version": PolicyVersion(3, 18)},
        {"version": PolicyVersion(4, 17)},
        {"parent": PolicyVersion(3, 11)},
        {"tensors": (*DELTA.tensors[:-1], DELTA.tensors[-1]._replace(name="head"))},
        {"total_hash": bytes(16)},
    ],
)
def test_a_signature_is_of_one_version_and_of_all_that_is_promised_of_it(change: dict[str, object]) -> None:
    """What a relay might make of a signature that it has seen: for another run, a later version, another lineage."""
    delta = signed(DELTA, Of.PAYLOAD, PAYLOAD)
    check_signed(delta, SIGNERS)
    before = refused("signature")
    with pytest.raises(WeightsForgedError, match="not signed by a key that counts"):
        check_signed(replace(delta, **change), SIGNERS)  # type: ignore[arg-type]
    assert refused("signature") == before + 1


def test_who_may_not_sign_and_who_does_not_is_refused() -> None:
    with pytest.raises(WeightsForgedError, match="not signed by a key that counts"):
        check_signed(signed(DELTA, Of.PAYLOAD, PAYLOAD, SigningKey.make()), SIGNERS)
    before = refused("unsigned")
    with pytest.raises(WeightsForgedError, match=r"version \(3, 17\) is not signed"):
        check_signed(DELTA, SIGNERS)
    assert refused("unsigned") == before + 1
    payload = sign(DELTA, Of.PAYLOAD, PAYLOAD, KEY)
    with pytest.raises(WeightsForgedError, match="a snapshot with the proof of a delta"):
        check_signed(replace(NEW_ANCHOR, proof=payload), SIGNERS)
    # The proof of one thing is none of the other, though all else is the same.
    with pytest.raises(WeightsForgedError):
        check_signed(replace(DELTA, proof=payload._replace(of=Of.SNAPSHOT)), SIGNERS)


@pytest.mark.parametrize("manifest", [DELTA, replace(DELTA, proof=sign(DELTA, Of.PAYLOAD, PAYLOAD, SigningKey.make()))])
def test_a_fetch_asks_for_no_chunk_of_what_is_not_signed(tmp_path: Path, manifest: Manifest) -> None:
    base = BaseFile(tmp_path / "w.safetensors")
    fill(base, ANCHOR, DATA)
    harness = Harness(base, signers=SIGNERS)
    harness.take()
    reply = messages.manifest_reply(manifest)
    for begin, what in ((harness.fetch.start, Payload(manifest, PAYLOAD)), (harness.fetch.handle, reply)):
        with pytest.raises(WeightsForgedError):
            begin(what)  # type: ignore[operator]
        assert harness.take() == []
        assert base.version == OLDER


def forged_payload() -> tuple[Manifest, Bytes]:
    """Another delta with the learner's proof of the right one: every chunk fits the hash that the manifest names."""
    manifest, other, _ = changed(ANCHOR, DATA, VERSION, seed=2)
    return replace(manifest, total_hash=DELTA.total_hash, proof=sign(DELTA, Of.PAYLOAD, PAYLOAD, KEY)), other


def into_base(directory: Path) -> tuple[BaseFile, Callable[[], Bytes]]:
    base = BaseFile(directory / "w.safetensors")
    fill(base, ANCHOR, DATA)
    return base, lambda: np.fromfile(base.path, np.uint8)[-DATA.size :]


def into_store() -> tuple[StoreSink, Callable[[], Bytes]]:
    store = WeightStore(4 * DATA.size)
    draft = store.begin(DATA.size)
    draft.data[:] = DATA
    store.commit(draft, describe_as(ANCHOR, draft.data), None)

    def held() -> Bytes:
        assert store.base is not None
        return store.base.data

    return StoreSink(store), held


@pytest.mark.parametrize("where", ["base", "store"])
def test_another_payload_than_was_signed_is_not_applied(tmp_path: Path, where: str) -> None:
    sink, held = into_base(tmp_path) if where == "base" else into_store()
    manifest, payload = forged_payload()
    check_signed(manifest, SIGNERS)
    before = refused("digest")
    sink.begin(manifest)
    for index in range(manifest.num_chunks):
        start, end = manifest.chunk_range(index)
        assert manifest.chunk_fits(index, payload[start:end])
        sink.write(index, payload[start:end])
    with pytest.raises(WeightsForgedError, match="has another payload than was signed"):
        sink.finish()
    sink.abort()
    assert refused("digest") == before + 1
    assert sink.have == OLDER
    assert np.array_equal(held(), DATA)


@pytest.mark.parametrize("where", ["base", "store"])
@pytest.mark.parametrize("kind", ["fold", "anchor"])
def test_another_snapshot_than_was_signed_is_not_seen(tmp_path: Path, where: str, kind: str) -> None:
    """Its total fits: for the total, which is no cryptographic hash, other bytes can be found. Here it was signed with
    the digest of others."""
    sink, _ = into_base(tmp_path) if where == "base" else into_store()
    manifest, payload = (DELTA, PAYLOAD) if kind == "fold" else (NEW_ANCHOR, NEW_DATA)
    digest = blake3(b"others").digest()
    proof = Proof(Of.SNAPSHOT, digest, KEY.sign(statement(manifest, Of.SNAPSHOT, digest)))
    check_signed(replace(manifest, proof=proof), SIGNERS)
    sink.begin(replace(manifest, proof=proof))
    for index in range(manifest.num_chunks):
        start, end = manifest.chunk_range(index)
        sink.write(index, payload[start:end])
    with pytest.raises(DeltaRefusedError if kind == "fold" else WeightsForgedError, match="another snapshot"):
        sink.finish()
    sink.abort()
    if isinstance(sink, BaseFile):
        assert sink.version is None
    else:
        assert sink.have != VERSION


def step(store: WeightStore, number: int) -> Payload:
    """The next version, as a publisher makes it."""
    base = store.base
    assert base is not None
    manifest, payload, data = changed(base.manifest, base.data, PolicyVersion(3, number), seed=number)
    manifest = signed(manifest, Of.PAYLOAD, payload)
    draft = store.begin(data.size, copy=True)
    draft.data[:] = data
    delta = Payload(manifest, payload)
    store.commit(draft, describe_as(manifest, draft.data), delta)
    return delta


def test_a_store_serves_deltas_at_once_and_what_needs_the_snapshots_proof_when_it_has_that() -> None:
    store = WeightStore(4 * DATA.size, sealed=True)
    draft = store.begin(DATA.size)
    draft.data[:] = DATA
    store.commit(draft, describe_as(ANCHOR, draft.data), None)
    first = OLDER
    assert store.find(first, None) == Unsealed((first, None))
    deltas = [step(store, number) for number in (13, 14)]
    newest = PolicyVersion(3, 14)
    assert store.find(newest, PolicyVersion(3, 13)) is deltas[1]
    assert store.find(newest, first) == Unsealed((newest, first))
    assert store.find(newest, None) == Unsealed((newest, None))
    assert store.newest is not None
    assert store.newest.proof is None
    base = store.base
    assert base is not None
    proof = sign(base.manifest, Of.SNAPSHOT, base.data, KEY)
    store.seal(newest, proof)
    assert store.newest.proof == proof
    anchor, job = store.find(newest, None), store.find(newest, first)
    assert isinstance(anchor, Payload)
    assert anchor.manifest.proof == proof
    assert isinstance(job, FoldJob)
    made = job.run()
    check_signed(made.manifest, SIGNERS)
    store.add_fold(job, made)
    assert store.find(newest, first) is made


def test_a_proof_that_comes_when_its_version_is_being_written_over_is_no_obstacle() -> None:
    """The relay takes it from its connection's thread, at any time; what was begun is given up all the same."""
    store = WeightStore(4 * DATA.size, sealed=True)
    draft = store.begin(DATA.size)
    draft.data[:] = DATA
    store.commit(draft, describe_as(ANCHOR, draft.data), None)
    proof = sign(ANCHOR, Of.SNAPSHOT, DATA, KEY)
    draft = store.begin(DATA.size, copy=True)
    store.seal(OLDER, proof)
    store.abort(draft)
    assert (store.newest, store.base) == (None, None)
    store.seal(OLDER, proof)  # of nothing that is held any more
    assert store.newest is None


def test_proofs_are_forgotten_with_what_they_are_of(tmp_path: Path) -> None:
    store = WeightStore(4 * DATA.size, max_delta_bytes=2000, sealed=True)
    draft = store.begin(DATA.size)
    draft.data[:] = DATA
    store.commit(draft, signed(describe_as(ANCHOR, draft.data), Of.SNAPSHOT, draft.data), None)
    for number in range(13, 40):
        step(store, number)
        assert store.newest is not None
        store.seal(store.newest.version, sign(store.newest, Of.SNAPSHOT, DATA, KEY))
    assert 1 < len(store._proofs) < 10
    store.seal(OLDER, sign(ANCHOR, Of.SNAPSHOT, DATA, KEY))
    assert OLDER not in store._proofs
