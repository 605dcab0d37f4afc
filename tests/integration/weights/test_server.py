"""The serving half against raw sockets: refusals, bounds, and peers that do not read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec import msgpack
from prometheus_client import REGISTRY

from broker.process.lifecycle import ErgonError
from broker.protocol import frames
from broker.protocol import weight_messages as messages
from broker.protocol.commands import ErrorBody, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Frame, Message
from broker.protocol.trajectory import PolicyVersion
from broker.weights.basefile import BaseFile
from broker.weights.peers import SEND_QUEUE
from broker.weights.publisher import WeightPublisher
from broker.weights.server import MAX_WAITING
from broker.weights.subscriber import WeightsTimeoutError, WeightSubscriber
from broker.weights.vouching import WeightsCorruptError
from tests.integration.weights.ends import HEARTBEAT_S, RUN, file_holds, random_tensors, until
from tests.integration.weights.raw_peer import RawPeer

V1, V2 = PolicyVersion(1, 0), PolicyVersion(1, 1)
LIVENESS = 100  # raw peers send no heartbeats


def open_publisher(liveness: int) -> WeightPublisher:
    return WeightPublisher(
        "tcp://127.0.0.1:*", RUN, chunk_bytes=1 << 20, max_bytes=400 << 20, heartbeat_s=HEARTBEAT_S, liveness=liveness
    )


def announced(raw: RawPeer) -> tuple[PolicyVersion | None, int]:
    """What the next announcement says."""
    body = parse_body(raw.expect("ANNOUNCE"), messages.Announce)
    return messages.policy_version(body.newest), body.num_bytes


@pytest.fixture
def publisher() -> Iterator[WeightPublisher]:
    publisher = open_publisher(LIVENESS)
    yield publisher
    publisher.close()


@pytest.fixture
def raw(publisher: WeightPublisher) -> Iterator[RawPeer]:
    peer = RawPeer(publisher.endpoint)
    yield peer
    peer.socket.close()


@pytest.fixture
def subscriber(publisher: WeightPublisher) -> Iterator[WeightSubscriber]:
    subscriber = WeightSubscriber(publisher.endpoint, RUN, "fast", heartbeat_s=HEARTBEAT_S, liveness=LIVENESS)
    yield subscriber
    subscriber.close()


def test_hello_watch_announce_and_repetition(publisher: WeightPublisher, raw: RawPeer) -> None:
    raw.hello()
    welcome = raw.expect("WELCOME")
    assert msgpack.decode(welcome.body) == {"run_id": RUN, "heartbeat_s": HEARTBEAT_S, "liveness": LIVENESS}
    raw.send(messages.Watch(have=None, push_bytes=0).pack())
    assert announced(raw) == (None, 0)
    publisher.publish(V1, random_tensors(1 << 20, seed=0))
    while announced(raw) != (V1, 1 << 20):
        raw.send(Message("HEARTBEAT"))
    raw.send(Message("HEARTBEAT"))
    assert announced(raw) == (V1, 1 << 20)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"run_id": "other"}, ErrorCode.WRONG_RUN, "this is run 'weights-test'"),
        ({"role": "learner"}, ErrorCode.BAD_MESSAGE, "role is 'learner'"),
        ({"peer_id": ""}, ErrorCode.BAD_MESSAGE, "peer_id"),
    ],
)
def test_hello_is_refused_with_a_sentence(
    raw: RawPeer, changes: dict[str, object], code: ErrorCode, words: str
) -> None:
    raw.hello(**changes)
    error = parse_body(raw.expect("ERROR"), ErrorBody)
    assert error.code == code
    assert words in error.message


def test_another_major_version_is_refused_with_a_sentence(raw: RawPeer) -> None:
    parts: list[Frame] = frames.encode(Message("HELLO"))
    raw.socket.send_multipart([frames.MAGIC + bytes((frames.PROTOCOL_MAJOR + 1, 0)), *parts[1:]])
    error = parse_body(raw.expect("ERROR"), ErrorBody)
    assert (error.code, error.fatal) == ("BAD_VERSION", True)
    assert "run the same major version of Ergon on both sides" in error.message


def test_other_refusals(publisher: WeightPublisher, raw: RawPeer) -> None:
    publisher.publish(V1, random_tensors(1 << 20, seed=0))

    def refusal(message: Message) -> tuple[str, str]:
        raw.send(message)
        error = parse_body(raw.expect("ERROR"), ErrorBody)
        return error.code, error.about

    assert refusal(messages.manifest_request(V1, None)) == ("UNKNOWN_PEER", "")
    raw.hello()
    raw.expect("WELCOME")
    assert refusal(Message("LEASE", msgpack.encode({"credit": 1}))) == ("UNKNOWN_COMMAND", "")
    assert refusal(messages.manifest_request(V2, None)) == ("NOT_FOUND", "1.1")
    assert refusal(messages.chunk_request(V2, None, 0)) == ("NOT_FOUND", "1.1")
    assert refusal(messages.chunk_request(V1, None, 1)) == ("BAD_MESSAGE", "CHUNK")
    assert refusal(messages.chunk_request(V1, PolicyVersion(0, 7), 0)) == ("NOT_FOUND", "1.0")
    for body in (
        {"lineage": 1, "version": "x", "parent": None, "index": 0},
        {"lineage": 1, "version": True, "parent": None, "index": 0},
        {"lineage": 1, "version": 2**63, "parent": None, "index": 0},
        {"lineage": 1, "version": 1, "index": 0},
        {"lineage": 1, "version": 1, "parent": None, "index": 0, "more": 0},
    ):
        assert refusal(Message("CHUNK", msgpack.encode(body))) == ("BAD_MESSAGE", "")
    assert refusal(Message("WATCH", b"\x81\xa4have" + b"\x91" * 100 + b"\xc0")) == ("BAD_MESSAGE", "")
    assert refusal(Message("WATCH", b"\x82\xa4have\xc0\xa1\xff\x01")) == ("BAD_MESSAGE", "")
    deep = frames.encode(Message("WATCH", b"\x81\xa4have" + b"\x91" * 30_000 + b"\xc0"))
    for noise in ([b"noise", b"\xff"], deep):
        raw.socket.send_multipart(noise)
        assert parse_body(raw.expect("ERROR"), ErrorBody).code == "BAD_FRAME"
        assert refusal(messages.Watch(have=None, push_bytes=0).pack()) == ("UNKNOWN_PEER", "")
        raw.hello()
        raw.expect("WELCOME")


def test_a_peer_that_does_not_read_delays_nobody_and_still_gets_everything(
    tmp_path: Path, publisher: WeightPublisher, raw: RawPeer, subscriber: WeightSubscriber
) -> None:
    tensors = random_tensors(96 << 20, seed=1)
    publisher.publish(V1, tensors)
    raw.hello()
    raw.expect("WELCOME")
    raw.send(messages.manifest_request(V1, None))
    manifest = messages.read_manifest(raw.expect("MANIFEST_REPLY"))
    for index in range(manifest.num_chunks):
        raw.send(messages.chunk_request(V1, None, index))  # 96 MiB asked for, nothing read
    assert subscriber.wait_newer(None, 10) == V1
    subscriber.fetch_base(V1, BaseFile(tmp_path / "w"), 20)
    assert file_holds(tmp_path / "w", tensors)
    for index in range(manifest.num_chunks):
        chunk = messages.read_chunk(raw.expect("CHUNK_REPLY"))
        assert (chunk.version, chunk.parent, chunk.index) == (V1, None, index)
        assert manifest.chunk_fits(index, chunk.data)


def refusals(code: str) -> float:
    return REGISTRY.get_sample_value("ergon_weights_refused_total", {"code": code}) or 0.0


def test_more_requests_than_any_credit_are_refused(publisher: WeightPublisher, raw: RawPeer) -> None:
    publisher.publish(V1, random_tensors(2 << 20, seed=1))
    raw.hello()
    raw.expect("WELCOME")
    num = MAX_WAITING + 10 * SEND_QUEUE
    before = refusals("BAD_STATE")
    for _ in range(num):
        raw.send(messages.chunk_request(V1, None, 0))
    until(lambda: refusals("BAD_STATE") > before)
    replies: list[Message] = []
    while sum(reply.command == "CHUNK_REPLY" for reply in replies) + refusals("BAD_STATE") - before < num:
        if raw.socket.poll(100):
            replies.append(raw.receive())
    assert {parse_body(reply, ErrorBody).code for reply in replies if reply.command == "ERROR"} <= {"BAD_STATE"}
    assert sum(reply.command == "CHUNK_REPLY" for reply in replies) >= MAX_WAITING


def test_a_frozen_peer_is_forgotten_and_its_memory_freed() -> None:
    contents = [random_tensors(96 << 20, seed=seed) for seed in range(3)]
    publisher = open_publisher(liveness=60)  # longer than a publication takes on a busy machine
    raw = RawPeer(publisher.endpoint)
    publisher.publish(V1, contents[0])
    raw.hello()
    raw.expect("WELCOME")
    for index in range(96):
        raw.send(messages.chunk_request(V1, None, index))
    until(lambda: publisher._store._lent[V1] > 8)
    base = publisher._store.base
    assert base is not None
    first, base = id(base.data), None
    publisher.publish(V2, contents[1])
    assert id(publisher._store.base.data) != first  # type: ignore[union-attr]  # not written over what is on its way
    assert publisher._store.live_bytes == 2 * (96 << 20)  # the old version is on its way to the frozen peer
    publisher.publish(PolicyVersion(1, 2), contents[2])
    until(lambda: publisher.num_peers == 0 and publisher._store.live_bytes == 96 << 20)
    raw.socket.close()
    publisher.close()


def test_damaged_memory_upstream_never_becomes_a_version(
    tmp_path: Path, publisher: WeightPublisher, subscriber: WeightSubscriber
) -> None:
    publisher.publish(V1, random_tensors(2 << 20, seed=1))
    held = publisher._store.base
    assert held is not None
    held.data.setflags(write=True)
    held.data[12345] ^= 1
    base = BaseFile(tmp_path / "w")
    with pytest.raises(WeightsCorruptError, match="chunk 0"):
        subscriber.fetch_base(V1, base, 10)
    assert base.version is None
    held.data[12345] ^= 1
    subscriber.fetch_base(V1, base, 10)
    assert base.version == V1


def test_a_failed_publish_leaves_the_former_version(publisher: WeightPublisher, subscriber: WeightSubscriber) -> None:
    tensors = random_tensors(1 << 20, seed=1)
    publisher.publish(V1, tensors)
    name, dtype, shape, data = tensors[0]

    def interrupted() -> Iterator[tuple[str, str, tuple[int, ...], np.ndarray]]:
        yield tensors[0]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        publisher.publish(V2, interrupted())
    with pytest.raises(ValueError, match=r"has 524284 bytes; bfloat16 \[131072, 2\] has 524288"):
        publisher.publish(V2, [(name, dtype, shape, data[4:])])
    with pytest.raises(ValueError, match="not contiguous"):
        publisher.publish(V2, [(name, dtype, shape, data.repeat(2)[::2])])
    with pytest.raises(ValueError, match="not newer"):
        publisher.publish(V1, tensors)
    with pytest.raises(ErgonError, match=r"weights\.max_mb"):
        publisher.publish(V2, random_tensors(201 << 20, seed=1))
    assert publisher.newest == V1
    assert subscriber.wait_newer(None, 10) == V1
    assert subscriber.wait_newer(V1, 3 * HEARTBEAT_S) is None
    assert publisher._store.live_bytes == 1 << 20


def test_what_was_published_may_change_afterwards(
    tmp_path: Path, publisher: WeightPublisher, subscriber: WeightSubscriber
) -> None:
    tensors = random_tensors(8 << 20, seed=1)
    live = [(name, dtype, shape, data.copy()) for name, dtype, shape, data in tensors]
    publisher.publish(V1, live)
    for _, _, _, data in live:
        data[:] = 0
    subscriber.fetch_base(V1, BaseFile(tmp_path / "w"), 10)
    assert file_holds(tmp_path / "w", tensors)


def test_fetch_times_out_and_a_closed_subscriber_ends_its_fetch(
    tmp_path: Path, publisher: WeightPublisher, subscriber: WeightSubscriber
) -> None:
    with pytest.raises(WeightsTimeoutError, match=r"\(9, 9\) did not arrive"):
        subscriber.fetch_base(PolicyVersion(9, 9), BaseFile(tmp_path / "w"), 0.3)
    caught: list[Exception] = []

    def fetch() -> None:
        try:
            subscriber.fetch_base(PolicyVersion(9, 9), BaseFile(tmp_path / "w"), 60)
        except WeightsTimeoutError as error:
            caught.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    until(subscriber._fetching.locked)
    subscriber.close()
    thread.join(timeout=10)
    assert len(caught) == 1
    with pytest.raises(WeightsTimeoutError, match="closed"):
        subscriber.fetch_base(V1, BaseFile(tmp_path / "w"), 1)


def test_a_subscriber_of_another_run_is_refused_for_good(publisher: WeightPublisher, tmp_path: Path) -> None:
    failures: list[Exception] = []
    subscriber = WeightSubscriber(publisher.endpoint, "other", "a", on_failure=failures.append)
    with pytest.raises(ProtocolError, match="this is run 'weights-test'"):
        subscriber.wait_connected(10)
    for attempt in (
        lambda: subscriber.fetch_base(V1, BaseFile(tmp_path / "w"), 5),
        lambda: subscriber.wait_newer(None, 5),
    ):
        with pytest.raises(ProtocolError, match="this is run"):
            _call(attempt)
    assert failures == [subscriber.failure]
    subscriber.close()


def _call(attempt: Callable[[], object]) -> None:
    attempt()


def test_a_port_in_use_is_one_sentence(publisher: WeightPublisher) -> None:
    with pytest.raises(ErgonError, match=r"cannot be bound.*\[weights\]"):
        WeightPublisher(publisher.endpoint, RUN)


def test_closing_during_the_handshake_is_no_failure(publisher: WeightPublisher) -> None:
    failures: list[Exception] = []
    for _ in range(30):
        subscriber = WeightSubscriber(publisher.endpoint, RUN, "brief", on_failure=failures.append)
        until(lambda: publisher.num_peers > 0)  # HELLO has arrived, WELCOME is on its way
        subscriber.close()
    assert failures == []
