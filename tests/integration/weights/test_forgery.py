"""With keys: a relay that lies gets nothing adopted, and one that does not passes on what the learner has signed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from broker.process.keys import Identity, make_keys
from broker.process.security import keyed
from broker.process.signing import SigningKey
from broker.protocol.proofs import Of
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Manifest, describe_delta
from broker.weights.chain import Payload
from broker.weights.server import WeightServer
from broker.weights.sinks import describe_as
from broker.weights.store import WeightStore
from broker.weights.vouching import WeightsForgedError, sign
from tests.integration.weights.ends import (
    HEARTBEAT_S,
    RUN,
    Actor,
    Learner,
    RelayProcess,
    file_holds,
    total,
    until,
)
from tests.ports import free_port

FETCH_S = 20


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "keys"
    make_keys(directory)
    return directory


@pytest.fixture
def learner(keys: Path) -> Iterator[Learner]:
    learner = Learner(security=keyed(keys, Identity.LEARNER))
    yield learner
    learner.publisher.close()


def refused() -> float:
    return sum(total("ergon_weights_forged_total", reason=reason) for reason in ("unsigned", "signature", "digest"))


def test_signed_versions_go_through_a_relay_as_anchors_deltas_and_folds(
    keys: Path, learner: Learner, tmp_path: Path
) -> None:
    relay = RelayProcess(tmp_path, int(learner.publisher.endpoint.rpartition(":")[2]), keys=keys)
    actors = []
    before = refused()

    def joined(name: str, upstream: str, server: Identity) -> Actor:
        security = keyed(keys, Identity.ACTOR)
        actors.append(Actor(upstream, tmp_path / name, security=security, server=server))
        return actors[-1]

    try:
        learner.publish()
        near = joined("near", learner.publisher.endpoint, Identity.LEARNER)
        far = joined("far", relay.endpoint, Identity.RELAY)
        assert [near.follow(learner), far.follow(learner)] == [None, None]
        for _ in range(2):
            parent = learner.version
            learner.publish()
            assert [near.follow(learner), far.follow(learner)] == [parent, parent]
        behind = learner.version
        for _ in range(3):
            learner.publish()
            relay.wait_serving(learner.version)
        assert [near.follow(learner), far.follow(learner)] == [behind, behind]  # folded, by each server for its own
        late = joined("late", relay.endpoint, Identity.RELAY)  # the relay has the version as a delta, and its proof
        assert late.follow(learner) is None
        learner.publish(lineage=2)
        assert far.follow(learner) is None
        assert 'forged_total{reason="unsigned"} 0' in relay.metrics() or "forged_total{" not in relay.metrics()
        assert refused() == before
    finally:
        for actor in actors:
            actor.subscriber.close()
            actor.base.close()
        relay.dispose()


class Liar:
    """A server with the relays' key, and what it has seen of the learner's: it serves what it likes."""

    def __init__(self, keys: Path, learner: Learner) -> None:
        self.store = WeightStore(64 << 20)
        self._learner = learner
        self.server = WeightServer(
            "tcp://127.0.0.1:*",
            RUN,
            self.store,
            heartbeat_s=HEARTBEAT_S,
            liveness=100,
            security=keyed(keys, Identity.RELAY),
        )

    def copy(self) -> Manifest:
        """Serve what the learner serves."""
        until(lambda: self._learner.store.newest.proof is not None)
        base = self._learner.store.base
        self.serve(base.manifest, base.data)
        return base.manifest

    def serve(self, manifest: Manifest, data: np.ndarray, delta: Payload | None = None) -> None:
        draft = self.store.begin(data.size, copy=True)
        draft.data[:] = data
        self.store.commit(draft, manifest, delta)
        self.server.announce()


@pytest.fixture
def liar(keys: Path, learner: Learner) -> Iterator[Liar]:
    liar = Liar(keys, learner)
    yield liar
    liar.server.close()


@pytest.fixture
def actor(keys: Path, liar: Liar, tmp_path: Path) -> Iterator[Actor]:
    actor = Actor(liar.server.endpoint, tmp_path / "actor", security=keyed(keys, Identity.ACTOR), server=Identity.RELAY)
    yield actor
    actor.subscriber.close()
    actor.base.close()


def assert_refuses(actor: Actor, learner: Learner, version: PolicyVersion, reason: str, held: PolicyVersion) -> None:
    """It tries, says why not, and has what it had."""
    until(lambda: actor.subscriber.latest() == version)
    before = total("ergon_weights_forged_total", reason=reason)
    with pytest.raises(WeightsForgedError, match="the learner did not make it"):
        actor.subscriber.fetch_base(version, actor.base, FETCH_S)
    assert total("ergon_weights_forged_total", reason=reason) > before
    assert actor.base.version == held
    assert file_holds(actor.base.path, learner.contents[held])


ANCHORS = ("unsigned", "another's signature", "another run", "another lineage", "another version")


@pytest.mark.parametrize("how", ANCHORS)
def test_an_anchor_that_a_relay_made_up_is_refused(liar: Liar, learner: Learner, actor: Actor, how: str) -> None:
    held = learner.publish()
    true = liar.copy()
    actor.follow(learner)
    later = PolicyVersion(held.lineage, held.version + 1)
    data = np.random.default_rng(0).integers(0, 256, true.total_bytes, np.uint8)
    made_up = describe_as(replace(true, version=later, proof=None), data)
    if how == "another's signature":
        made_up = replace(made_up, proof=sign(made_up, Of.SNAPSHOT, data, SigningKey.make()))
    elif how != "unsigned":
        # What the learner has signed, for what it was not signed for. The bytes, at least, are the learner's.
        data = learner.store.base.data
        version = PolicyVersion(held.lineage + 1, held.version) if how == "another lineage" else later
        made_up = replace(true, version=version)
        if how == "another run":
            learnt = replace(made_up, run_id="last-week")
            made_up = replace(made_up, proof=sign(learnt, Of.SNAPSHOT, data, learner.publisher._key))
    liar.serve(made_up, data)
    assert_refuses(actor, learner, made_up.version, "unsigned" if how == "unsigned" else "signature", held)


DELTAS = ("unsigned", "another's signature", "of another parent", "other changes", "a fold of other changes")


@pytest.mark.parametrize("how", DELTAS)
@pytest.mark.parametrize("pushed", [False, True])
def test_a_delta_that_a_relay_made_up_is_refused(
    liar: Liar, learner: Learner, actor: Actor, how: str, pushed: bool
) -> None:
    held = learner.publish()
    liar.copy()
    actor.follow(learner)
    old = learner.contents[held]
    other = Learner(port=free_port())  # someone who can make deltas, too
    other.publisher.publish(held, old)
    changed = [(*rest, data.copy()) for *rest, data in old]
    changed[0][3][:20] ^= 1
    other.publisher.publish(PolicyVersion(held.lineage, held.version + 1), changed)
    other.publisher.close()
    learner.publish()
    until(lambda: learner.store.newest.proof is not None)
    version = learner.version
    true, false = learner.store.delta(version, held), other.store.delta(version, held)
    manifest, data = true.manifest, true.data
    expected = "signature"
    if how == "unsigned":
        manifest, expected = replace(manifest, proof=None), "unsigned"
    elif how == "another's signature":
        manifest = replace(manifest, proof=sign(manifest, Of.PAYLOAD, data, SigningKey.make()))
    elif how == "of another parent":
        signed_for = replace(manifest, parent=PolicyVersion(held.lineage, held.version - 1))
        manifest = replace(manifest, proof=sign(signed_for, Of.PAYLOAD, data, learner.publisher._key))
    else:
        # Every chunk fits its hash, and all that the learner has signed is there: these bytes are not what it is of.
        data = false.data
        manifest = describe_delta(replace(manifest, parent=None), held, data)
        proof = true.manifest.proof if how == "other changes" else learner.store.newest.proof
        manifest, expected = replace(manifest, proof=proof), "digest"
    until(lambda: has_watched(liar, held) or not pushed)
    if not pushed:
        actor.subscriber._pushed.max_bytes = 0
        actor.subscriber._watch()
        until(lambda: not has_watched(liar, held))
    liar.serve(describe_as(true.manifest, learner.store.base.data), learner.store.base.data, Payload(manifest, data))
    if how == "a fold of other changes":
        # It was applied before its result could be judged; then the anchor is fetched, which here is the true one, and
        # has no proof in this server's store.
        until(lambda: actor.subscriber.latest() == version)
        with pytest.raises(WeightsForgedError, match="is not signed"):
            actor.subscriber.fetch_base(version, actor.base, FETCH_S)
        assert actor.base.version is None
    else:
        assert_refuses(actor, learner, version, expected, held)
    # The truth is taken at any time.
    liar.server.close()
    honest = Actor(
        learner.publisher.endpoint,
        actor.base.path.with_name("honest"),
        security=actor.security,
        server=Identity.LEARNER,
    )
    honest.follow(learner)
    honest.subscriber.close()
    honest.base.close()


def has_watched(liar: Liar, version: PolicyVersion) -> bool:
    """Whether the server knows that its one peer holds this version, and may push to it."""
    return any(peer.have == version and peer.push_bytes > 0 for _, peer in liar.server._peers.watching())


def test_an_old_version_is_no_news_to_who_has_a_newer_one(liar: Liar, learner: Learner, actor: Actor) -> None:
    """Though the learner has signed it."""
    learner.publish()
    old = liar.copy()
    old_data = learner.store.base.data.copy()
    newest = learner.publish()
    liar.copy()
    actor.follow(learner)
    with liar.store._lock:
        liar.store._newest = None
        liar.store._held.clear()
    liar.serve(old, old_data)
    until(lambda: liar.store.newest.version == old.version)
    assert actor.subscriber.wait_newer(newest, 3 * HEARTBEAT_S) is None
    assert actor.subscriber.latest() == actor.base.version == newest


def test_a_relay_passes_on_no_push_that_is_not_signed(keys: Path, learner: Learner, tmp_path: Path) -> None:
    """Here the learner's own server lies: its key is the learner's, and what it signs with is not."""
    relay = RelayProcess(tmp_path, int(learner.publisher.endpoint.rpartition(":")[2]), keys=keys)
    actor = Actor(relay.endpoint, tmp_path / "actor", security=keyed(keys, Identity.ACTOR), server=Identity.RELAY)
    try:
        held = learner.publish()
        actor.follow(learner)
        until(lambda: any(peer.have == held for _, peer in learner.publisher._server._peers.watching()))
        learner.publisher._key = SigningKey.make()
        learner.publish()
        until(lambda: 'forged_total{reason="signature"}' in relay.metrics())
        until(lambda: "forged" in str(relay.health()[1]["problem"]) or "did not make it" in str(relay.health()[1]))
        assert actor.subscriber.latest() == held
    finally:
        actor.subscriber.close()
        actor.base.close()
        relay.dispose()
