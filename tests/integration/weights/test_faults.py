"""Servers killed at each phase, messages damaged or kept back: a receiver holds the old version or the new one, bit for
bit, and gets the next one in the end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from broker.protocol.errors import ProtocolError
from broker.protocol.frames import Message
from broker.protocol.trajectory import PolicyVersion
from broker.weights import publisher
from broker.weights.basefile import BaseFile
from broker.weights.fetch import WeightsSupersededError
from broker.weights.subscriber import WeightSubscriber
from broker.weights.vouching import WeightsCorruptError
from tests.integration.weights.ends import (
    HEARTBEAT_S,
    LIVENESS,
    ROOT,
    RUN,
    Actor,
    ActorAt,
    Learner,
    RelayProcess,
    file_holds,
    total,
    until,
)
from tests.integration.weights.meddlers import Cut, Cutter, Meddler
from tests.integration.weights.publisher_process import content
from tests.ports import free_port

NUM_CHANGES = 60_000  # bytes of a version that differ: a delta of three chunks, which pays
MANIFEST, CHUNK, WATCH = (Cut(command, from_server=False) for command in (b"MANIFEST", b"CHUNK", b"WATCH"))
RELAY_PHASES = {
    "an anchor, inside the manifest": ("anchor", Cut(b"MANIFEST_REPLY", after=20), None),
    "an anchor, inside a chunk": ("anchor", Cut(b"CHUNK_REPLY", count=10, after=30_000), None),
    "a delta, before the manifest": ("pull", MANIFEST, "old"),
    "a delta, inside the manifest": ("pull", Cut(b"MANIFEST_REPLY", after=20), "old"),
    "a delta, before the chunks": ("pull", CHUNK, "old"),
    "a delta, inside the second chunk": ("pull", Cut(b"CHUNK_REPLY", count=2, after=30_000), "old"),
    "a delta, after the last chunk": ("pull", WATCH, "new"),
    "a push, at its beginning": ("push", Cut(b"PUSH"), "old"),
    "a push, in the middle": ("push", Cut(b"PUSH", after=100_000), "old"),
    "a push, after it": ("push", WATCH, "new"),
    "a push, inside a part of it": ("parts", Cut(b"PUSH_PART", after=300), "old"),
    "a push, between its parts": ("parts", Cut(b"PUSH_PART", count=2), "old"),
}


class Stage:
    """A learner here, a relay in a process of its own, and the wire to it, which can be cut."""

    def __init__(self, directory: Path) -> None:
        port = free_port()
        self.learner = Learner(port)
        self.relay = RelayProcess(directory, port)
        self.cutter = Cutter(self.relay.port)

    def close(self) -> None:
        self.cutter.close()
        self.relay.dispose()
        self.learner.publisher.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("stage"))
    yield stage
    stage.close()


def holds(base: BaseFile, version: PolicyVersion, learner: Learner) -> bool:
    """Whether it says so, and that is true."""
    return base.version == version and file_holds(base.path, learner.contents[version])


@pytest.mark.parametrize("phase", RELAY_PHASES)
def test_a_relay_is_killed(stage: Stage, actor_at: ActorAt, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, cut, expected = RELAY_PHASES[phase]
    if kind == "parts":
        monkeypatch.setattr(publisher, "PART_BYTES", 1)
    learner, relay, cutter = stage.learner, stage.relay, stage.cutter
    learner.publish()
    old = learner.publish()  # as a delta, so that the next one may be sent ahead
    relay.wait_serving(old)
    actor = actor_at(cutter.endpoint, push_bytes=(1 << 20) if kind in ("push", "parts") else 0)
    if kind != "anchor":
        actor.follow(learner)
        threading.Event().wait(2 * HEARTBEAT_S)  # until its WATCH has arrived
    cutter.arm(cut, relay.kill)
    new = learner.publish(NUM_CHANGES)
    with ThreadPoolExecutor(1) as pool:
        fetch = pool.submit(actor.follow, learner)
        assert cutter.fired.wait(20), "the phase was never reached"
        until(lambda: not actor.subscriber.connected)
        if expected == "new":
            fetch.result(20)
        held = {"old": old, "new": new, None: None}[expected]
        assert actor.base.version == held
        assert held is None or holds(actor.base, held, learner)
        relay.start()
        fetch.result(60)
    assert holds(actor.base, new, learner)
    learner.publish()
    actor.follow(learner)


PUBLISHER_PHASES: dict[str, tuple[str, Cut | None, int]] = {
    "between two tensors": ("tensor", None, 0),
    "before it is announced": ("commit", None, 0),
    "when it has been announced": ("nowhere", MANIFEST, 0),
    "inside a chunk": ("nowhere", Cut(b"CHUNK_REPLY", count=2, after=30_000), 0),
    "in the middle of a push": ("nowhere", Cut(b"PUSH", after=30_000), 1 << 20),
    "after a push": ("nowhere", WATCH, 1 << 20),
}


class PublisherProcess:
    """`publisher_process.py` on a port that stays the same."""

    def __init__(self, port: int, lineage: int, hold: str = "nowhere") -> None:
        words = [sys.executable, "-m", "tests.integration.weights.publisher_process", str(port), str(lineage), hold]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.line() == "published 0"

    def line(self) -> str:
        """What it says next."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def go_on(self) -> None:
        """Let it publish version 1."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.mark.parametrize("phase", PUBLISHER_PHASES)
def test_a_publisher_is_killed(actor_at: ActorAt, phase: str) -> None:
    hold, cut, push_bytes = PUBLISHER_PHASES[phase]
    port = free_port()
    first = PublisherProcess(port, 1, hold)
    cutter = Cutter(port)
    actor = actor_at(cutter.endpoint, push_bytes=push_bytes)
    old, new = PolicyVersion(1, 0), PolicyVersion(1, 1)
    fetched = ThreadPoolExecutor(1)
    second = None
    try:
        assert actor.subscriber.wait_newer(None, 20) == old
        actor.subscriber.fetch_base(old, actor.base, 20)
        threading.Event().wait(2 * HEARTBEAT_S)  # until its WATCH has arrived
        if cut is not None:
            cutter.arm(cut, first.kill)
        following = fetched.submit(newest, actor, old)
        first.go_on()
        if cut is None:
            assert first.line() == f"held {hold}"
            threading.Event().wait(3 * HEARTBEAT_S)  # heartbeats, which announce what there is
            first.kill()
        else:
            assert cutter.fired.wait(20), "the phase was never reached"
        until(lambda: not actor.subscriber.connected)
        held = new if phase == "after a push" else old
        until(lambda: actor.base.version == held)
        assert file_holds(actor.base.path, content(*held))
        second = PublisherProcess(port, 2)
        assert following.result(60) in (new, PolicyVersion(2, 0))
        assert newest(actor, PolicyVersion(1, 1)) == PolicyVersion(2, 0)
        assert file_holds(actor.base.path, content(2, 0))
        second.go_on()
        assert newest(actor, PolicyVersion(2, 0)) == PolicyVersion(2, 1)
        assert file_holds(actor.base.path, content(2, 1))
    finally:
        first.kill()
        if second is not None:
            second.kill()
        fetched.shutdown()
        cutter.close()


def newest(actor: Actor, than: PolicyVersion) -> PolicyVersion:
    """Fetch what is newer than this, as an actor does: what is superseded is let go of. The version held then."""
    while actor.base.version is None or actor.base.version <= than:
        version = actor.subscriber.wait_newer(than, 60)
        assert version is not None
        try:
            actor.subscriber.fetch_base(version, actor.base, 60)
        except WeightsSupersededError:
            continue
    return actor.base.version


# --- messages damaged, cut or kept back -------------------------------------------------------------------------------


@pytest.fixture
def meddler(learner: Learner) -> Iterator[Meddler]:
    meddler = Meddler(learner.publisher.endpoint)
    yield meddler
    meddler.close()


@pytest.fixture
def impatient(meddler: Meddler, tmp_path: Path) -> Iterator[Callable[[int], Actor]]:
    """An actor behind the meddler that asks again soon."""
    actors: list[Actor] = []

    def make(push_bytes: int) -> Actor:
        actor = Actor.__new__(Actor)
        actor.subscriber = WeightSubscriber(
            meddler.endpoint, RUN, "a", push_bytes=push_bytes, heartbeat_s=HEARTBEAT_S, liveness=LIVENESS
        )
        actor.base = BaseFile(tmp_path / "impatient")
        actors.append(actor)
        return actor

    yield make
    for actor in actors:
        actor.subscriber.close()


def flip(message: Message) -> Message:
    """One bit of the last array is wrong."""
    data = message.arrays[-1].copy()
    data.reshape(-1)[data.size // 2] ^= 8
    return replace(message, arrays=(*message.arrays[:-1], data))


def cut_short(message: Message) -> Message:
    """The last array lacks its end."""
    return replace(message, arrays=(*message.arrays[:-1], message.arrays[-1][:-7].copy()))


def keep_back(_: Message) -> None:
    """It never arrives."""


def times(num: int, command: str, change: Callable[[Message], Message | None]) -> Callable[[Message], Message | None]:
    """A rule: the first `num` messages of this command are changed so."""
    count = 0

    def rule(message: Message) -> Message | None:
        nonlocal count
        if message.command != command or count == num:
            return message
        count += 1
        return change(message)

    return rule


@pytest.mark.parametrize("change", [flip, cut_short, keep_back])
@pytest.mark.parametrize("whole", [False, True], ids=["delta", "anchor"])
def test_wrong_chunks_are_asked_for_again(
    learner: Learner, meddler: Meddler, impatient: Callable[[int], Actor], change: Callable[..., None], whole: bool
) -> None:
    actor = impatient(0)
    old = learner.publish()
    if not whole:
        actor.follow(learner)
        learner.publish(NUM_CHANGES)
    meddler.rule = times(2, "CHUNK_REPLY", change)
    assert actor.follow(learner) == (None if whole else old)


@pytest.mark.parametrize("change", [flip, cut_short])
def test_chunks_that_are_always_wrong_leave_the_old_version(
    learner: Learner, meddler: Meddler, impatient: Callable[[int], Actor], change: Callable[..., None]
) -> None:
    actor = impatient(0)
    old = learner.publish()
    actor.follow(learner)
    meddler.rule = times(-1, "CHUNK_REPLY", change)
    learner.publish(NUM_CHANGES)
    with pytest.raises(WeightsCorruptError, match="3 times with wrong bytes"):
        actor.follow(learner)
    assert holds(actor.base, old, learner)
    meddler.rule = lambda message: message
    learner.publish()
    assert actor.follow(learner) == old


@pytest.mark.parametrize("command", ["MANIFEST_REPLY", "ANNOUNCE"])
def test_what_is_kept_back_is_asked_for_or_said_again(
    learner: Learner, meddler: Meddler, impatient: Callable[[int], Actor], command: str
) -> None:
    actor = impatient(0)
    old = learner.publish()
    actor.follow(learner)
    meddler.rule = times(2, command, keep_back)
    learner.publish()
    assert actor.follow(learner) == old


def taking_pushes(learner: Learner, impatient: Callable[[int], Actor]) -> tuple[Actor, PolicyVersion]:
    """An actor to which the next small delta is pushed, and the version that it holds."""
    actor = impatient(1 << 20)
    old = learner.publish()
    actor.follow(learner)
    threading.Event().wait(2 * HEARTBEAT_S)  # until its WATCH has arrived
    return actor, old


def test_a_push_that_is_kept_back_is_asked_for(
    learner: Learner, meddler: Meddler, impatient: Callable[[int], Actor]
) -> None:
    actor, old = taking_pushes(learner, impatient)
    sent = total("ergon_weights_pushes_sent_total")
    meddler.rule = times(1, "PUSH", keep_back)
    learner.publish(NUM_CHANGES)
    assert actor.follow(learner) == old
    assert total("ergon_weights_pushes_sent_total") == sent + 1


def test_a_wrong_chunk_of_a_push_is_asked_for(
    learner: Learner, meddler: Meddler, impatient: Callable[[int], Actor]
) -> None:
    actor, old = taking_pushes(learner, impatient)
    served = total("ergon_weights_served_chunks_total")
    meddler.rule = times(1, "PUSH", flip)
    learner.publish(NUM_CHANGES)
    assert actor.follow(learner) == old
    assert total("ergon_weights_served_chunks_total") == served + 1


@pytest.mark.parametrize("change", [keep_back, flip, cut_short])
def test_a_part_of_a_push_that_is_lost_or_wrong_is_asked_for(
    learner: Learner,
    meddler: Meddler,
    impatient: Callable[[int], Actor],
    change: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publisher, "PART_BYTES", 1)
    actor, _ = taking_pushes(learner, impatient)
    old = learner.publish()
    actor.follow(learner)
    threading.Event().wait(2 * HEARTBEAT_S)
    chunks = total("ergon_weights_served_chunks_total")
    meddler.rule = times(1, "PUSH_PART", change)
    learner.publish(NUM_CHANGES)
    assert actor.follow(learner) == old
    assert total("ergon_weights_served_chunks_total") > chunks


def test_a_push_that_is_cut_short_breaks_the_protocol_and_leaves_the_old_version(
    learner: Learner, meddler: Meddler, impatient: Callable[[int], Actor]
) -> None:
    """TCP and ZeroMQ deliver no such message: whoever sends it is another program."""
    actor, old = taking_pushes(learner, impatient)
    meddler.rule = times(1, "PUSH", cut_short)
    learner.publish(NUM_CHANGES)
    with pytest.raises(ProtocolError, match=r"PUSH: a payload of \d+ bytes behind sent_bytes, 0; allowed"):
        actor.subscriber.wait_newer(old, 20)
    assert holds(actor.base, old, learner)
