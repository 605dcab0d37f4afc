"""A small delta comes with its announcement, to who asked for that, and nobody gets two at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from msgspec import msgpack

from broker.protocol import deltas
from broker.protocol import weight_messages as messages
from broker.protocol.commands import ErrorBody, parse_body
from broker.protocol.frames import Message
from broker.protocol.trajectory import PolicyVersion
from broker.weights.chain import Payload
from broker.weights.relay import push_on
from broker.weights.server import WeightServer
from broker.weights.sinks import describe_as
from broker.weights.store import WeightStore
from tests.integration.weights.ends import (
    HEARTBEAT_S,
    RUN,
    SIZE,
    ActorAt,
    Learner,
    StartRelay,
    has_watched,
    total,
    until,
)
from tests.integration.weights.raw_peer import RawPeer
from tests.ports import free_port

SENT = "ergon_weights_pushes_sent_total"
RECEIVED = "ergon_weights_pushes_received_total"
ENOUGH = 1 << 20
SLOW_REQUESTS = 200  # more than ZeroMQ and the kernel take


@pytest.fixture
def raw(learner: Learner) -> Iterator[RawPeer]:
    with RawPeer(learner.publisher.endpoint) as peer:
        peer.hello()
        peer.expect("WELCOME")
        yield peer


def withheld(reason: str) -> float:
    return total("ergon_weights_pushes_withheld_total", reason=reason)


def watch(raw: RawPeer, have: PolicyVersion | None, push_bytes: int = ENOUGH) -> Message:
    """What the server says to a WATCH."""
    while raw.socket.poll(50):
        raw.receive()
    raw.send(messages.Watch(have=have, push_bytes=push_bytes).pack())
    return raw.receive()


def news(raw: RawPeer, version: PolicyVersion) -> str:
    """How this version is told first."""
    while True:
        message = raw.receive()
        if message.command == "PUSH":
            assert messages.read_push(message)[0].version == version
            return "PUSH"
        if message.command == "ANNOUNCE" and parse_body(message, messages.Announce).newest == version:
            return "ANNOUNCE"


def following(raw: RawPeer, num: int = 5) -> set[str]:
    """What comes next."""
    return {raw.receive().command for _ in range(num)}


def test_a_push_takes_the_place_of_the_announcement_once_for_each_watch(learner: Learner, raw: RawPeer) -> None:
    first = learner.publish()
    assert watch(raw, first).command == "ANNOUNCE"
    second = learner.publish()
    while (message := raw.receive()).command == "ANNOUNCE":
        assert parse_body(message, messages.Announce).newest == first
    manifest, sent_bytes, payload = messages.read_push(message)
    assert (manifest.version, manifest.parent, manifest.run_id) == (second, first, RUN)
    delta = learner.store.delta(second, first)
    assert (manifest, sent_bytes, payload.tobytes()) == (delta.manifest, 0, delta.data.tobytes())
    third = learner.publish()
    assert news(raw, third) == "ANNOUNCE"  # the credit is used up
    assert following(raw) == {"ANNOUNCE"}
    assert watch(raw, third).command == "ANNOUNCE"
    assert news(raw, learner.publish()) == "PUSH"


def arriving(raw: RawPeer) -> tuple[list[messages.Part], messages.Pushed]:
    """The parts of the next push, and that."""
    parts = []
    while True:
        message = raw.receive()
        if message.command == "PUSH_PART":
            parts.append(messages.read_part(message))
        elif message.command == "PUSH":
            return parts, messages.read_push(message)
        else:
            assert message.command == "ANNOUNCE"


@pytest.mark.usefixtures("small_parts")
def test_a_delta_is_sent_while_it_is_made_once_it_is_known_how_large_they_are(learner: Learner, raw: RawPeer) -> None:
    parent = learner.publish()
    for number in range(3):
        watch(raw, parent)
        version = learner.publish()
        parts, pushed = arriving(raw)
        delta = learner.store.delta(version, parent)
        assert [part[:2] for part in parts] == [(version, parent)] * (2 if number else 0)  # two blocks have changes
        starts = [sum(part.data.size for part in parts[:i]) for i in range(len(parts) + 1)]
        assert [*(part.start for part in parts), pushed.sent_bytes] == starts
        assert pushed.manifest == delta.manifest
        joined = b"".join(data.tobytes() for data in (*(part.data for part in parts), pushed.rest))
        assert joined == delta.data.tobytes()
        parent = version


@pytest.mark.usefixtures("small_parts")
def test_parts_go_only_to_whom_the_push_will_go(learner: Learner, raw: RawPeer) -> None:
    """Not to one that takes less than the delta before had, nor to one that is behind; a push is a whole for those."""
    old = learner.publish()
    parent = learner.publish()
    size = learner.store.delta(parent, old).data.size
    for have, push_bytes in ((parent, size), (parent, 0), (None, ENOUGH), (old, ENOUGH)):
        while watch(raw, have, push_bytes).command == "PUSH":
            pass
        version = learner.publish()
        while (message := raw.receive()).command == "ANNOUNCE":
            if parse_body(message, messages.Announce).newest == version:
                break
        if message.command == "PUSH":  # of a delta that is no larger than allowed after all
            pushed = messages.read_push(message)
            assert (pushed.sent_bytes, pushed.rest.size) == (0, pushed.manifest.payload_bytes)
        assert message.command in ("ANNOUNCE", "PUSH")
        old, parent = parent, version


@pytest.mark.usefixtures("small_parts")
def test_what_was_sent_of_a_version_that_failed_is_not_taken_for_a_part_of_another(
    learner: Learner, raw: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "MAX_BEGUN", 1)  # so that nothing is read before what was read is compared
    learner.publish()
    have = learner.publish()
    contents = learner.contents[have]
    layout = [(name, dtype, shape) for name, dtype, shape, _ in contents]

    def fail(name: str) -> bytes:
        if name == layout[0][0]:
            raise MemoryError
        return bytes(SIZE // 2)  # all of this block changed

    watch(raw, have)
    with pytest.raises(MemoryError):
        learner.publisher.publish_from(PolicyVersion(have.lineage, have.version + 1), layout, fail)
    assert messages.read_part(raw.expect("PUSH_PART")).start == 0
    anchor = learner.publish()  # the memory of the former version is gone with the attempt
    assert news(raw, anchor) == "ANNOUNCE"
    assert (anchor.version, watch(raw, anchor).command) == (have.version + 1, "ANNOUNCE")
    learner.publish()
    assert arriving(raw)[1].manifest.parent == anchor


@pytest.mark.usefixtures("small_parts")
def test_a_receiver_and_those_behind_its_relay_take_what_came_in_parts(
    start_relay: StartRelay, actor_at: ActorAt
) -> None:
    port = free_port()
    relay = start_relay(port)
    learner = Learner(port)
    try:
        learner.publish()
        actors = [actor_at(learner.publisher.endpoint), actor_at(relay.endpoint)]
        for actor in actors:
            actor.follow(learner)
        taken, chunks = total(RECEIVED, outcome="taken"), total("ergon_weights_served_chunks_total")
        failures = total("ergon_weights_verify_failures_total")
        for _ in range(4):
            relay.wait_serving(learner.version)
            threading.Event().wait(2 * HEARTBEAT_S)  # until everybody's WATCH should have arrived
            parent = learner.version
            learner.publish()
            assert [actor.follow(learner) for actor in actors] == [parent] * 2
        assert total(RECEIVED, outcome="taken") >= taken + 6
        assert total("ergon_weights_served_chunks_total") <= chunks + 2
        assert total("ergon_weights_verify_failures_total") == failures
    finally:
        learner.publisher.close()


def test_what_was_announced_is_not_pushed(learner: Learner, raw: RawPeer) -> None:
    first = learner.publish()
    watch(raw, first, push_bytes=0)
    second = learner.publish()
    assert news(raw, second) == "ANNOUNCE"
    assert watch(raw, first).command == "ANNOUNCE"
    assert following(raw) == {"ANNOUNCE"}


def test_who_comes_back_gets_what_he_missed(learner: Learner, raw: RawPeer) -> None:
    first = learner.publish()
    second = learner.publish()
    raw.send(messages.Watch(have=first, push_bytes=ENOUGH).pack())
    assert news(raw, second) == "PUSH"


@pytest.mark.parametrize("what", ["none", "too large", "no base", "unknown base", "behind", "fetching", "anchor"])
def test_where_a_push_is_not_allowed_or_not_possible(learner: Learner, raw: RawPeer, what: str) -> None:
    old = learner.publish()
    first = learner.publish()
    have = {"no base": None, "unknown base": PolicyVersion(1, 77), "behind": old}.get(what, first)
    credit = {"none": 0, "too large": 100}.get(what, ENOUGH)
    while watch(raw, have, credit).command == "PUSH":  # of the version before, to who is behind
        pass
    if what == "fetching":
        raw.send(messages.manifest_request(first, None))
        raw.expect("MANIFEST_REPLY")
    reason = {"too large": "large", "behind": "behind", "anchor": "behind", "fetching": "busy"}.get(what)
    sent, before = total(SENT), withheld(reason) if reason else 0
    newest = learner.publish(lineage=2) if what == "anchor" else learner.publish()
    assert news(raw, newest) == "ANNOUNCE"
    assert following(raw) == {"ANNOUNCE"}
    assert total(SENT) == sent
    assert reason is None or withheld(reason) > before


def test_a_peer_that_does_not_read_has_one_push_in_its_queue(learner: Learner, raw: RawPeer) -> None:
    first = learner.publish()
    watch(raw, first)
    sent = total(SENT)
    learner.publish()
    until(lambda: total(SENT) > sent)
    for _ in range(20):
        learner.publish()
    with RawPeer(learner.publisher.endpoint) as other:  # the server has been at all of them by now
        other.hello()
        other.send(messages.Watch(have=None, push_bytes=0).pack())
        assert news(other, learner.version) == "ANNOUNCE"
    assert news(raw, PolicyVersion(1, 2)) == "PUSH"
    assert news(raw, learner.version) == "ANNOUNCE"
    assert total(SENT) == sent + 1


def test_a_receiver_may_not_push(learner: Learner, raw: RawPeer) -> None:
    learner.publish()
    learner.publish()
    delta = learner.store.delta(learner.version, PolicyVersion(1, 1))
    raw.send(Message("PUSH", messages.push(delta.manifest, delta.data).body))
    assert parse_body(raw.expect("ERROR"), ErrorBody).code == "UNKNOWN_COMMAND"


@pytest.mark.parametrize("push_bytes", [-1, 2**63, None, 1.5])
def test_a_credit_that_is_none_is_refused(raw: RawPeer, push_bytes: object) -> None:
    raw.send(Message("WATCH", msgpack.encode({"have": None, "push_bytes": push_bytes})))
    error = parse_body(raw.expect("ERROR"), ErrorBody)
    assert error.code == "BAD_MESSAGE"
    assert "push_bytes" in error.message


def test_a_push_is_fetched_without_a_word(learner: Learner, actor_at: ActorAt) -> None:
    actor = actor_at(learner.publisher.endpoint)
    learner.publish()
    actor.follow(learner)
    for _ in range(4):
        until(lambda: has_watched(learner, learner.version))
        chunks, taken = total("ergon_weights_served_chunks_total"), total(RECEIVED, outcome="taken")
        parent = learner.version
        learner.publish()
        assert actor.follow(learner) == parent
        assert total("ergon_weights_served_chunks_total") == chunks
        assert total(RECEIVED, outcome="taken") == taken + 1


def test_an_actor_that_is_busy_skips_what_was_pushed(learner: Learner, actor_at: ActorAt) -> None:
    actor = actor_at(learner.publisher.endpoint)
    have = learner.publish()
    actor.follow(learner)
    until(lambda: has_watched(learner, have))
    dropped = total(RECEIVED, outcome="dropped")
    sent = total(SENT)
    learner.publish()  # meanwhile it adopts
    until(lambda: total(SENT) > sent)
    for _ in range(4):
        learner.publish()
    assert actor.follow(learner) == have
    assert total(RECEIVED, outcome="dropped") == dropped + 1
    until(lambda: has_watched(learner, learner.version))
    parent = learner.version
    learner.publish()
    assert actor.follow(learner) == parent


def test_pushes_go_through_a_chain_of_relays(start_relay: StartRelay, actor_at: ActorAt) -> None:
    port = free_port()
    near = start_relay(port)
    far = start_relay(near.port)
    learner = Learner(port)
    try:
        learner.publish()
        actors = [actor_at(endpoint) for endpoint in (near.endpoint, far.endpoint, far.endpoint)]
        for actor in actors:
            actor.follow(learner)
        taken = total(RECEIVED, outcome="taken")
        num = 8
        for _ in range(num):
            for relay in (near, far):
                relay.wait_serving(learner.version)
            threading.Event().wait(2 * HEARTBEAT_S)  # until everybody's WATCH should have arrived
            parent = learner.version
            learner.publish()
            assert [actor.follow(learner) for actor in actors] == [parent] * 3
        most = num * 3 // 4  # a WATCH that was late on a busy machine costs its receiver one push
        assert total(RECEIVED, outcome="taken") >= taken + most * len(actors)
        for relay in (near, far):
            text = relay.metrics()
            assert sample(text, 'ergon_weights_pushes_received_total{outcome="taken"}') >= most
            assert sample(text, "ergon_weights_pushes_sent_total") >= 2 * most
            assert sample(text, 'ergon_weights_fetched_total{kind="delta"}') == num
    finally:
        learner.publisher.close()


def sample(text: str, name: str) -> float:
    """A figure of a process's metrics page."""
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[-1])


@pytest.mark.parametrize("damage", [False, True])
def test_a_relay_passes_a_push_on_before_it_has_applied_it(learner: Learner, damage: bool) -> None:
    first = learner.publish()
    base = learner.store.base
    store = WeightStore(64 << 20)
    draft = store.begin(base.data.size)
    draft.data[:] = base.data
    store.commit(draft, describe_as(base.manifest, draft.data), None)
    second = learner.publish()
    delta = learner.store.delta(second, first)
    server = WeightServer("tcp://127.0.0.1:*", RUN, store, heartbeat_s=HEARTBEAT_S, liveness=100)
    try:
        with RawPeer(server.endpoint) as raw:
            raw.hello()
            raw.expect("WELCOME")
            assert watch(raw, first).command == "ANNOUNCE"
            if damage:
                data = delta.data.copy()
                data[3] ^= 1
                push_on(server, None, Payload(delta.manifest, data))
            else:
                push_on(server, None, delta)
                manifest, _, payload = messages.read_push(raw.expect("PUSH"))
                assert (manifest, payload.tobytes()) == (delta.manifest, delta.data.tobytes())
            draft = store.begin(base.data.size, copy=True)
            draft.data[:] = learner.store.base.data
            store.commit(draft, describe_as(delta.manifest, draft.data), delta)
            server.announce()
            assert news(raw, second) == ("PUSH" if damage else "ANNOUNCE")
    finally:
        server.close()


def test_a_slow_peers_payloads_are_counted(learner: Learner, raw: RawPeer) -> None:
    """What it asked for and does not read is memory, though the chain has forgotten it."""
    learner.publish()
    parent = learner.version
    version = learner.publish(num_changes=60_000)
    size = learner.store.delta(version, parent).data.size
    for _ in range(SLOW_REQUESTS):
        raw.send(messages.chunk_request(version, parent, 0))
    served = -1.0
    while served != (served := total("ergon_weights_served_chunks_total")):  # until all queues are full
        threading.Event().wait(0.3)
    learner.publish(lineage=2)
    until(lambda: total("ergon_weights_held_delta_bytes") >= size)
    assert learner.store.delta(version, parent) is None

    def read_and_look() -> bool:
        raw.receive()
        return total("ergon_weights_held_delta_bytes") == 0

    until(read_and_look)
