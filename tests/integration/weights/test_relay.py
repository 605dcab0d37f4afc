"""Publisher here, relays as processes of their own, subscribers here: real sockets, real SIGKILL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from broker.protocol.trajectory import PolicyVersion
from broker.weights.basefile import BaseFile
from broker.weights.fetch import WeightsSupersededError
from broker.weights.publisher import WeightPublisher
from broker.weights.subscriber import WeightSubscriber
from tests.integration.weights.ends import (
    HEARTBEAT_S,
    LIVENESS,
    RUN,
    RelayProcess,
    file_holds,
    random_tensors,
    until,
)
from tests.ports import free_port

V1, V2 = PolicyVersion(1, 0), PolicyVersion(1, 1)


def fetched_bytes() -> float:
    """Bytes of anchors that this process has fetched so far."""
    return REGISTRY.get_sample_value("ergon_weights_fetched_bytes_total", {"kind": "anchor"}) or 0.0


StartRelay = Callable[..., RelayProcess]


@pytest.fixture
def publish_at() -> Iterator[Callable[[int], WeightPublisher]]:
    publishers: list[WeightPublisher] = []

    def publisher(port: int) -> WeightPublisher:
        endpoint = f"tcp://127.0.0.1:{port}"
        publishers.append(
            WeightPublisher(endpoint, RUN, chunk_bytes=64 << 10, heartbeat_s=HEARTBEAT_S, liveness=LIVENESS)
        )
        return publishers[-1]

    yield publisher
    for each in publishers:
        each.close()


@pytest.fixture
def subscribe() -> Iterator[Callable[..., WeightSubscriber]]:
    subscribers: list[WeightSubscriber] = []

    def subscriber(endpoint: str, credit: int = 8, **kwargs: object) -> WeightSubscriber:
        subscribers.append(
            WeightSubscriber(
                endpoint,
                RUN,
                f"actor-{len(subscribers)}",
                credit=credit,
                heartbeat_s=HEARTBEAT_S,
                liveness=LIVENESS,
                **kwargs,  # type: ignore[arg-type]
            )
        )
        return subscribers[-1]

    yield subscriber
    for each in subscribers:
        each.close()


Publish = Callable[[int], WeightPublisher]
Subscribe = Callable[..., WeightSubscriber]


def test_two_subscribers_over_a_chain_of_relays(
    tmp_path: Path, start_relay: StartRelay, publish_at: Publish, subscribe: Subscribe
) -> None:
    port = free_port()
    near = start_relay(port)
    far = start_relay(near.port)
    publisher = publish_at(port)
    tensors = random_tensors(4 << 20, seed=1)
    publisher.publish(V1, tensors)
    announced: list[PolicyVersion] = []
    one, two = subscribe(near.endpoint), subscribe(far.endpoint, on_announce=announced.append)
    bases = {name: BaseFile(tmp_path / name) for name in ("one", "two")}
    for name, subscriber in (("one", one), ("two", two)):
        assert subscriber.wait_newer(None, 20) == V1
        manifest = subscriber.fetch_base(V1, bases[name], 20)
        assert (manifest.version, manifest.run_id, manifest.parent) == (V1, RUN, None)
        assert file_holds(tmp_path / name, tensors)
    newer = random_tensors(4 << 20, seed=2)
    publisher.publish(V2, newer)
    assert two.wait_newer(V1, 20) == V2
    two.fetch_base(V2, bases["two"], 20)
    assert file_holds(tmp_path / "two", newer)
    assert announced == [V1, V2]
    assert two.latest() == V2
    status, detail = far.health()
    assert (status, detail["newest"], detail["upstream_connected"]) == (200, [1, 1], True)
    assert "ergon_weights_newest_version 1.0" in far.metrics()
    assert "ergon_relay_upstream_connected 1.0" in far.metrics()
    assert near.end()[0] == 0
    until(lambda: "ergon_relay_upstream_connected 0.0" in far.metrics())  # nobody asks for its health
    assert far.end()[0] == 0


def test_relay_killed_in_the_middle_of_a_fetch(
    tmp_path: Path, start_relay: StartRelay, publish_at: Publish, subscribe: Subscribe
) -> None:
    port = free_port()
    relay = start_relay(port)
    publisher = publish_at(port)
    tensors = random_tensors(64 << 20, seed=3)
    publisher.publish(V1, tensors)
    subscriber = subscribe(relay.endpoint, credit=1)
    assert subscriber.wait_newer(None, 20) == V1
    base = BaseFile(tmp_path / "w.safetensors")
    with ThreadPoolExecutor(1) as pool:
        before = fetched_bytes()
        fetch = pool.submit(subscriber.fetch_base, V1, base, 60)
        until(lambda: fetched_bytes() > before + (4 << 20))
        relay.kill()
        assert not fetch.done()
        assert base.version is None
        until(lambda: not subscriber.connected)
        relay.start()
        fetch.result(timeout=60)
    assert (base.version, file_holds(base.path, tensors)) == (V1, True)


def test_relay_goes_on_serving_without_a_publisher_and_takes_the_new_lineage(
    tmp_path: Path, start_relay: StartRelay, publish_at: Publish, subscribe: Subscribe
) -> None:
    port = free_port()
    relay = start_relay(port)
    publisher = publish_at(port)
    old = random_tensors(1 << 20, seed=4)
    publisher.publish(PolicyVersion(1, 7), old)
    relay.wait_serving(PolicyVersion(1, 7))
    publisher.close()
    until(lambda: relay.health()[1]["upstream_connected"] is False)
    assert relay.health()[0] == 200
    subscriber, other = subscribe(relay.endpoint), subscribe(relay.endpoint)
    assert subscriber.wait_newer(None, 20) == PolicyVersion(1, 7)
    bases = {name: BaseFile(tmp_path / name) for name in ("one", "two")}
    subscriber.fetch_base(PolicyVersion(1, 7), bases["one"], 20)
    assert file_holds(tmp_path / "one", old)
    new = random_tensors(1 << 20, seed=5)
    publish_at(port).publish(PolicyVersion(2, 3), new)
    for name, each in (("one", subscriber), ("two", other)):
        assert each.wait_newer(PolicyVersion(1, 7), 20) == PolicyVersion(2, 3)
        assert each.fetch_base(PolicyVersion(2, 3), bases[name], 20).parent is None
        assert file_holds(tmp_path / name, new)


def test_a_version_published_during_fetches_leaves_whole_files(
    tmp_path: Path, start_relay: StartRelay, publish_at: Publish, subscribe: Subscribe
) -> None:
    """Two subscribers of different speed chase a publisher that does not wait; every file is one version, whole."""
    port = free_port()
    relay = start_relay(port)
    publisher = publish_at(port)
    contents = {PolicyVersion(1, i): random_tensors(8 << 20, seed=10 + i) for i in range(6)}
    done = threading.Event()

    def chase(name: str, credit: int) -> list[PolicyVersion]:
        subscriber, base = subscribe(relay.endpoint, credit=credit), BaseFile(tmp_path / name)
        fetched: list[PolicyVersion] = []
        while not fetched or fetched[-1] != PolicyVersion(1, 5):
            version = subscriber.wait_newer(fetched[-1] if fetched else None, 30)
            assert version is not None
            try:
                manifest = subscriber.fetch_base(version, base, 30)
            except WeightsSupersededError:
                continue
            assert manifest.version == version
            assert file_holds(tmp_path / name, contents[version])
            fetched.append(version)
        return fetched

    with ThreadPoolExecutor(2) as pool:
        chases = [pool.submit(chase, "slow", 1), pool.submit(chase, "fast", 16)]
        for version, tensors in contents.items():
            publisher.publish(version, tensors)
            done.wait(0.15)
        for each in chases:
            fetched = each.result(timeout=60)
            assert fetched == sorted(set(fetched))


@pytest.mark.parametrize("what", ["port", "run", "metrics port"])
def test_user_errors_are_one_sentence_and_exit_2(what: str, start_relay: StartRelay, publish_at: Publish) -> None:
    port = free_port()
    publish_at(port)
    if what == "port":
        relay, expected = start_relay(port, port=port), "cannot be bound"
    elif what == "run":
        relay, expected = start_relay(port, run="another"), "this is run 'weights-test'"
    else:
        first = start_relay(port)
        until(lambda: first.health()[0] == 200)
        relay, expected = start_relay(port, metrics_port=first.metrics_port), "metrics port"
    code, errors = relay.wait()
    assert code == 2
    assert expected in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors


def test_a_budget_too_small_makes_the_relay_unhealthy_and_says_why(
    start_relay: StartRelay, publish_at: Publish, subscribe: Subscribe
) -> None:
    port = free_port()
    relay = start_relay(port, max_mb=2)
    publisher = publish_at(port)
    small = random_tensors(1 << 20, seed=7)
    publisher.publish(V1, small)
    relay.wait_serving(V1)
    publisher.publish(V2, random_tensors(2 << 20, seed=8))
    until(lambda: relay.health()[0] == 503)
    detail = relay.health()[1]
    assert "raise weights.max_mb to 6 or more" in str(detail["problem"])
    assert detail["newest"] == list(V1)
    publisher.publish(PolicyVersion(1, 2), small)
    relay.wait_serving(PolicyVersion(1, 2))
    assert relay.health()[0] == 200


def test_sigterm_during_a_fetch_ends_at_once(start_relay: StartRelay, publish_at: Publish) -> None:
    """The upstream announces a version and then vanishes: the relay waits for it, and still ends when told to."""
    port = free_port()
    relay = start_relay(port)
    publisher = publish_at(port)
    until(lambda: relay.health()[1].get("upstream_connected") is True)
    publisher.publish(V1, random_tensors(64 << 20, seed=6))
    until(lambda: relay.health()[1]["announced"] == list(V1))
    publisher.close()
    code, errors = relay.end()
    assert code == 0, errors
