"""Deltas over real sockets: through relays, folded, in place, and with everything that can be wrong with one."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from broker.protocol import delta_records, deltas
from broker.protocol import weight_messages as messages
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import describe_delta
from broker.weights.chain import FoldJob, Payload
from broker.weights.fetch import WeightsSupersededError
from tests.integration.weights.ends import (
    HEARTBEAT_S,
    SIZE,
    Actor,
    ActorAt,
    Learner,
    StartRelay,
    file_holds,
    total,
    until,
)
from tests.integration.weights.raw_peer import RawPeer
from tests.ports import free_port


def test_stats_say_what_was_published(learner: Learner) -> None:
    learner.publish()
    same = learner.publisher.publish(PolicyVersion(1, 9), learner.contents[learner.version])
    assert (same.full, same.num_changed, same.payload_bytes) == (False, 0, 0)
    changed = [(*rest, data.copy()) for *rest, data in learner.contents[learner.version]]
    changed[0][3].view(np.uint16)[[3, 77, 90_000]] ^= 1  # type: ignore[index]
    stats = learner.publisher.publish(PolicyVersion(1, 10), changed)  # type: ignore[arg-type]
    assert (stats.full, stats.num_changed, stats.num_elements) == (False, 3, SIZE // 4 + SIZE // 8)
    assert 0 < stats.payload_bytes < 200
    assert (stats.num_bytes, stats.num_tensors) == (SIZE, 2)
    full = learner.publisher.publish(PolicyVersion(2, 0), changed)  # type: ignore[arg-type]
    assert (full.full, full.num_changed, full.payload_bytes) == (True, full.num_elements, SIZE)
    assert total("ergon_weights_changed_fraction") == 3 / stats.num_elements
    assert total("ergon_weights_compression_ratio") == 1.0


def test_tensors_are_read_in_the_order_of_the_snapshot_and_few_are_held_at_a_time(
    learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they come from a GPU, what is held is memory of this machine. Small blocks here, and few of them begun."""
    monkeypatch.setattr(delta_records, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(deltas, "MAX_BEGUN", 2)
    layout = [(f"{i:02d}", "bfloat16", (2048,)) for i in range(30)]
    alive: list[weakref.ref[np.ndarray]] = []
    names: list[str] = []
    held = 0

    def read(name: str) -> np.ndarray:
        nonlocal held
        held = max(held, sum(ref() is not None for ref in alive))
        data = np.full(4096, len(names), np.uint8)
        alive.append(weakref.ref(data))
        names.append(name)
        return data

    # Each begins a lineage, so that it is copied; continues it with other bytes; and with the same once more.
    for number, (full, most) in enumerate(((True, 0), (False, 4), (False, 4))):
        held = 0
        assert learner.publisher.publish_from(PolicyVersion(1, number), layout, read).full is full
        assert held <= most
        assert names == [name for name, _, _ in layout]
        names.clear()


def test_a_version_that_changed_everywhere_is_an_anchor_again(learner: Learner, actor_at: ActorAt) -> None:
    actor = actor_at(learner.publisher.endpoint)
    learner.publish()
    assert actor.follow(learner) is None
    learner.publish(num_changes=20 * SIZE)
    assert actor.follow(learner) is None
    base = actor.base.version
    learner.publish()
    assert actor.follow(learner) == base


def test_deltas_through_a_chain_of_relays(tmp_path: Path, start_relay: StartRelay, actor_at: ActorAt) -> None:
    """From each place of the tree; a late joiner, one that is behind, one whose relay is restarted, a new lineage."""
    port = free_port()
    near = start_relay(port)
    far = start_relay(near.port)
    learner = Learner(port)
    try:
        learner.publish()
        actors = [actor_at(endpoint) for endpoint in (learner.publisher.endpoint, near.endpoint, far.endpoint)]
        assert [actor.follow(learner) for actor in actors] == [None] * 3
        for _ in range(3):
            parent = learner.version
            learner.publish()
            assert [actor.follow(learner) for actor in actors] == [parent] * 3
        behind = learner.version
        for _ in range(3):
            learner.publish()
            far.wait_serving(learner.version)
        assert [actor.follow(learner) for actor in actors] == [behind] * 3  # folded, by each server for its own
        late = actor_at(far.endpoint)
        assert late.follow(learner) is None
        assert 'fetched_total{kind="delta"} 6.0' in far.metrics()
        assert "ergon_weights_folds_total 1.0" in far.metrics()
        far.kill()
        far.start()
        learner.publish()
        assert actors[2].follow(learner) is None  # the relay began with an anchor, and knows no delta
        parent = learner.version
        learner.publish()
        assert [actors[2].follow(learner), late.follow(learner)][0] == parent
        learner.publish(lineage=2)
        assert [actor.follow(learner) for actor in actors] == [None] * 3
        parent = learner.version
        learner.publish()
        assert [actor.follow(learner) for actor in actors] == [parent] * 3
    finally:
        learner.publisher.close()


def test_a_fold_is_made_once_for_many_and_not_by_who_answers_heartbeats(
    learner: Learner, actor_at: ActorAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    run, may_go_on = FoldJob.run, threading.Event()

    def slow(job: FoldJob) -> Payload:
        threads.append(threading.current_thread().name)
        assert may_go_on.wait(30)
        return run(job)

    monkeypatch.setattr(FoldJob, "run", slow)
    learner.publish()
    actors = [actor_at(learner.publisher.endpoint) for _ in range(12)]
    for actor in actors:
        actor.follow(learner)
    have = learner.version
    learner.publish()
    learner.publish()
    with ThreadPoolExecutor(len(actors)) as pool:
        fetches = [pool.submit(actor.follow, learner) for actor in actors]
        until(lambda: bool(threads))
        with RawPeer(learner.publisher.endpoint) as raw:  # meanwhile the server answers others
            raw.hello()
            raw.expect("WELCOME")
            raw.send(messages.manifest_request(learner.version, None))
            assert messages.read_manifest(raw.expect("MANIFEST_REPLY")).parent is None
        assert not any(fetch.done() for fetch in fetches)
        may_go_on.set()
        assert [fetch.result(30) for fetch in fetches] == [have] * len(actors)
    assert len(threads) == 1
    assert "weight-server" not in threads[0]


def test_a_slow_reader_keeps_its_version_bit_exact_while_others_are_published(
    learner: Learner, actor_at: ActorAt
) -> None:
    """Chunks on their way refer to the snapshot: they are what their version was, or the request is refused."""
    big = Learner(size=24 << 20)
    try:
        fast = actor_at(big.publisher.endpoint)
        first = big.publish()
        with RawPeer(big.publisher.endpoint) as raw:
            raw.hello()
            raw.expect("WELCOME")
            raw.send(messages.manifest_request(first, None))
            manifest = messages.read_manifest(raw.expect("MANIFEST_REPLY"))
            for index in range(200):
                raw.send(messages.chunk_request(first, None, index))
            for _ in range(4):  # they wait inside ZeroMQ and before it, and nobody reads them
                big.publish()
                fast.follow(big)
            for index in range(200):
                chunk = messages.read_chunk(raw.expect("CHUNK_REPLY"))
                assert (chunk.version, chunk.index) == (first, index)
                assert manifest.chunk_fits(index, chunk.data)
            raw.send(messages.Watch(have=first, push_bytes=0).pack())
            until(lambda: big.store.live_bytes == 24 << 20)
            big.publish()
            raw.send(messages.chunk_request(first, None, 0))
            assert raw.expect("ERROR") is not None
            assert big.store.live_bytes == 24 << 20
    finally:
        big.publisher.close()


def forge(learner: Learner, data: np.ndarray) -> None:
    """The newest delta becomes this payload; its chunk hashes fit."""
    links = learner.store._chain._links
    parent = links[-1].manifest.parent
    links[-1] = Payload(describe_delta(replace(links[-1].manifest, parent=None), parent, data), data)


@pytest.mark.parametrize("what", ["other bytes", "malformed", "empty"])
def test_a_delta_that_lies_is_followed_by_the_anchor_in_the_same_call(
    learner: Learner, actor_at: ActorAt, what: str
) -> None:
    actor = actor_at(learner.publisher.endpoint, push_bytes=0)
    for _ in range(2):
        learner.publish()
        actor.follow(learner)
    former = learner.store._chain._links[-1].data
    learner.publish()
    payloads = {"other bytes": former, "malformed": np.arange(99, dtype=np.uint8), "empty": former[:0]}
    forge(learner, payloads[what])
    before = total("ergon_weights_deltas_refused_total")
    assert actor.follow(learner) is None
    assert total("ergon_weights_deltas_refused_total") == before + 1
    parent = learner.version
    learner.publish()
    assert actor.follow(learner) == parent


def test_a_base_that_was_damaged_is_noticed_and_replaced(learner: Learner, actor_at: ActorAt) -> None:
    actor = actor_at(learner.publisher.endpoint)
    learner.publish()
    actor.follow(learner)
    with actor.base.path.open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"damaged")
    learner.publish()
    assert actor.follow(learner) is None


def test_a_publisher_that_fails_midway_publishes_nothing_and_goes_on_with_an_anchor(
    learner: Learner, actor_at: ActorAt
) -> None:
    actor = actor_at(learner.publisher.endpoint)
    first = learner.publish()
    actor.follow(learner)
    until(lambda: learner.store._idle(first))  # so that the only copy is written over
    layout = [(name, dtype, shape) for name, dtype, shape, _ in learner.contents[first]]

    def read(name: str) -> np.ndarray:
        if name.startswith("norm"):  # the first of the snapshot, whose elements are wider
            return np.zeros(SIZE // 2, np.uint8)
        raise InterruptedError("killed")

    with pytest.raises(InterruptedError):
        learner.publisher.publish_from(PolicyVersion(1, 2), layout, read)
    assert learner.publisher.newest is None
    assert learner.store.live_bytes == 0
    assert actor.subscriber.wait_newer(first, 3 * HEARTBEAT_S) is None
    assert file_holds(actor.base.path, learner.contents[first])
    learner.version = PolicyVersion(1, 2)
    learner.publish()
    assert actor.follow(learner) is None


def test_everybody_follows_a_publisher_that_does_not_wait(
    tmp_path: Path, start_relay: StartRelay, actor_at: ActorAt
) -> None:
    """Versions are published faster than some can fetch them, a relay is killed in between: every fetch that completes
    is one version, whole, and everybody gets to the last."""
    port = free_port()
    near = start_relay(port)
    far = start_relay(near.port)
    learner = Learner(port)
    ended = threading.Event()
    last: list[PolicyVersion] = []

    def chase(actor: Actor) -> tuple[list[PolicyVersion], int]:
        fetched, num_deltas = list[PolicyVersion](), 0
        while not ended.is_set() or fetched[-1:] != last:
            version = actor.subscriber.wait_newer(actor.base.version, 1)
            if version is None:
                continue
            try:
                manifest = actor.subscriber.fetch_base(version, actor.base, 60)
            except WeightsSupersededError:
                continue
            assert file_holds(actor.base.path, learner.contents[version])
            fetched.append(version)
            num_deltas += manifest.parent is not None
        return fetched, num_deltas

    try:
        with ThreadPoolExecutor(6) as pool:
            endpoints = (learner.publisher.endpoint, near.endpoint, far.endpoint)
            actors = [actor_at(endpoint, credit=credit) for endpoint in endpoints for credit in (1, 16)]
            chases = [pool.submit(chase, actor) for actor in actors]
            pause = threading.Event()
            for number in range(40):
                learner.publish(
                    num_changes=20 * SIZE if number % 13 == 12 else 200, lineage=2 if number == 25 else None
                )
                pause.wait(0.03)
                if number in (10, 30):
                    far.kill()
                    far.start()
            last.append(learner.version)
            ended.set()
            results = [each.result(timeout=120) for each in chases]
        assert all(fetched == sorted(set(fetched)) for fetched, _ in results)
        assert sum(num_deltas for _, num_deltas in results) > 0
    finally:
        ended.set()
        learner.publisher.close()
