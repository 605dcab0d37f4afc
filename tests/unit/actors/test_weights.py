from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from actors.engine import AdoptionError, AdoptionFailedError, EngineDeadError
from actors.weights import MAX_SKIPPED, Subscriber, WeightAdopter
from broker.process.lifecycle import ErgonError
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Manifest
from broker.weights.basefile import BaseFile
from broker.weights.fetch import WeightsSupersededError
from broker.weights.subscriber import WeightsTimeoutError
from broker.weights.vouching import WeightsCorruptError, WeightsForgedError
from tests.unit.actors.support import ScriptedEngine, make_renderer

V1, V2, V3 = PolicyVersion(1, 1), PolicyVersion(1, 2), PolicyVersion(2, 0)


class ScriptedSubscriber(Subscriber):
    """Announces what a test puts in `announced`; fetches fail with what stands in `errors`, first come first served."""

    def __init__(self) -> None:
        self.announced: queue.Queue[PolicyVersion] = queue.Queue()
        self.errors: list[Exception] = []
        self.fetched: list[PolicyVersion] = []
        self.newest: PolicyVersion | None = None
        self.newer_during_fetch: PolicyVersion | None = None
        self.asked_than: list[PolicyVersion | None] = []
        self.bases: set[BaseFile] = set()
        self.held: list[Manifest | None] = []  # what the base held when a fetch began

    def wait_coming(self, than: PolicyVersion | None, timeout_s: float) -> PolicyVersion | None:
        self.asked_than.append(than)
        if self.newest is None or (than is not None and self.newest <= than):
            try:
                self.newest = self.announced.get(timeout=0.05)
            except queue.Empty:
                return None
        return self.newest

    def latest(self) -> PolicyVersion | None:
        return self.newest

    def fetch_base(self, version: PolicyVersion, base: BaseFile, timeout_s: float) -> Manifest:
        self.fetched.append(version)
        if self.errors:
            raise self.errors.pop(0)
        self.bases.add(base)
        self.held.append(base.manifest)
        base.path.write_text(f"{version.lineage}.{version.version}")
        if self.newer_during_fetch is not None:
            self.newest, self.newer_during_fetch = self.newer_during_fetch, None
        manifest = Manifest("run", version, None, (), 0, 4096, (), bytes([version.version]), 0.0)
        base._held = manifest
        return manifest

    def close(self) -> None:
        pass


@asynccontextmanager
async def adopting(
    tmp_path: Path, subscriber: ScriptedSubscriber, engine: ScriptedEngine
) -> AsyncIterator[tuple[WeightAdopter, asyncio.Task[None]]]:
    adopter = WeightAdopter(engine, subscriber, tmp_path / "own")
    task = asyncio.create_task(adopter.run())
    try:
        yield adopter, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await adopter.close()
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(make_renderer(), [])


@pytest.fixture
def subscriber() -> ScriptedSubscriber:
    return ScriptedSubscriber()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.weights.RETRY_S", 0.01)


async def test_adopts_what_is_announced_and_opens_the_gate(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber
) -> None:
    async with adopting(tmp_path, subscriber, engine) as (adopter, _):
        any_version = asyncio.create_task(adopter.at_least(PolicyVersion(0, 0)))
        await asyncio.sleep(0.1)
        assert not any_version.done()  # what the engine was started with does not count
        assert adopter.adopted is None
        subscriber.announced.put(V1)
        await asyncio.wait_for(any_version, 5)
        assert adopter.adopted == V1
        later = asyncio.create_task(adopter.at_least(V2))
        await asyncio.sleep(0)
        assert not later.done()
        subscriber.announced.put(V3)  # another lineage: newer than any version of an older one
        await asyncio.wait_for(later, 5)
        assert engine.adopted == [V1, V3]
        (base,) = subscriber.bases  # one file is kept for all versions
        assert [path.name for path in base.path.parent.iterdir()] == [base.path.name]
        assert engine.adopted_bytes == [b"1.1", b"2.0"]
        assert engine.digests == ["01", "00"]  # of the manifests


async def test_what_a_new_engine_has_lost_is_adopted_again_before_anything_waits_less(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber
) -> None:
    subscriber.announced.put(V1)
    async with adopting(tmp_path, subscriber, engine) as (adopter, _):
        await asyncio.wait_for(adopter.at_least(V1), 5)
        subscriber.announced.put(V2)
        await asyncio.wait_for(adopter.at_least(V2), 5)
        adopter.forget()
        assert (adopter.adopted, adopter.newest) == (None, V2)
        await asyncio.wait_for(adopter.at_least(V1), 5)
        assert engine.adopted == [V1, V2, V2]


async def test_a_version_superseded_while_it_is_fetched_is_skipped(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber
) -> None:
    subscriber.newer_during_fetch = V2
    subscriber.announced.put(V1)
    async with adopting(tmp_path, subscriber, engine) as (adopter, _):
        await asyncio.wait_for(adopter.at_least(V2), 5)
    assert engine.adopted == [V2]


async def test_an_actor_that_can_never_fetch_fast_enough_adopts_nevertheless(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While each fetch lasts another version is published, for ever."""
    fetch_base = subscriber.fetch_base

    def slowly(version: PolicyVersion, base: BaseFile, timeout_s: float) -> Manifest:
        subscriber.newer_during_fetch = PolicyVersion(version.lineage, version.version + 1)
        return fetch_base(version, base, timeout_s)

    monkeypatch.setattr(subscriber, "fetch_base", slowly)
    subscriber.announced.put(V1)
    async with adopting(tmp_path, subscriber, engine) as (adopter, _):
        await asyncio.wait_for(adopter.at_least(PolicyVersion(1, 1 + 2 * MAX_SKIPPED)), 5)
    step = MAX_SKIPPED + 1
    assert engine.adopted[:2] == [PolicyVersion(1, step), PolicyVersion(1, 2 * step)]


async def test_the_file_is_left_alone_while_the_engine_reads_it(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber
) -> None:
    engine.adopt_gate.clear()
    subscriber.announced.put(V1)
    async with adopting(tmp_path, subscriber, engine) as (adopter, _):
        while not subscriber.fetched:
            await asyncio.sleep(0.01)
        subscriber.announced.put(V2)
        await asyncio.sleep(0.2)
        assert (subscriber.fetched, adopter.adopted) == ([V1], None)
        engine.adopt_gate.set()
        await asyncio.wait_for(adopter.at_least(V2), 5)
    assert engine.adopted_bytes == [b"1.1", b"1.2"]


@pytest.mark.parametrize(
    "error",
    [WeightsTimeoutError("slow"), WeightsCorruptError("bad"), ErgonError("disk full"), WeightsSupersededError(V1, V2)],
)
async def test_a_failed_fetch_keeps_the_old_version_and_is_repeated(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber, error: Exception
) -> None:
    subscriber.announced.put(V1)
    async with adopting(tmp_path, subscriber, engine) as (adopter, _):
        await asyncio.wait_for(adopter.at_least(V1), 5)
        subscriber.errors = [error, error]
        subscriber.announced.put(V2)
        await asyncio.wait_for(adopter.at_least(V2), 5)
    assert subscriber.fetched == [V1, V2, V2, V2]
    assert engine.adopted == [V1, V2]


async def test_refused_weights_are_not_fetched_again_but_newer_ones_are(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber
) -> None:
    engine.adopt_error = AdoptionError("tensor x has shape [1]")
    subscriber.announced.put(V1)
    async with adopting(tmp_path, subscriber, engine) as (adopter, _):
        while V1 not in subscriber.asked_than:
            await asyncio.sleep(0.01)
        assert (adopter.adopted, subscriber.fetched) == (None, [V1])
        engine.adopt_error = None
        subscriber.announced.put(V2)
        await asyncio.wait_for(adopter.at_least(V2), 5)
    assert engine.adopted == [V2]


@pytest.mark.parametrize("damaged", [False, True])
async def test_an_adoption_that_failed_before_the_switch_is_tried_again(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber, damaged: bool
) -> None:
    engine.adopt_errors = [AdoptionFailedError("no memory", damaged=damaged), AdoptionFailedError("no memory")]
    subscriber.announced.put(V1)
    async with adopting(tmp_path, subscriber, engine) as (adopter, _):
        await asyncio.wait_for(adopter.at_least(V1), 5)
    assert (engine.adopted, subscriber.fetched) == ([V1], [V1, V1, V1])
    # What the engine found to be damaged is not what a delta may be applied to, nor what is held already.
    assert [held is None for held in subscriber.held] == [True, damaged, False]


@pytest.mark.parametrize("what", ["engine", "server"])
async def test_an_engine_that_keeps_failing_and_a_server_that_keeps_lying_are_asked_more_and_more_rarely(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    if what == "engine":
        engine.adopt_errors = [AdoptionFailedError("no memory") for _ in range(5)]
    else:
        subscriber.errors = [WeightsForgedError("not signed") for _ in range(5)]
    monkeypatch.setattr("actors.weights.MAX_RETRY_S", 0.1)
    monkeypatch.setattr("actors.weights.asyncio.sleep", note)
    subscriber.announced.put(V1)
    async with adopting(tmp_path, subscriber, engine) as (adopter, _):
        await asyncio.wait_for(adopter.at_least(V1), 5)
    assert waits == [0.02, 0.04, 0.08, 0.1, 0.1]


async def test_a_dead_engine_ends_the_loop(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber
) -> None:
    engine.adopt_error = EngineDeadError("half loaded")
    subscriber.announced.put(V1)
    async with adopting(tmp_path, subscriber, engine) as (_, task):
        with pytest.raises(EngineDeadError, match="half loaded"):
            await asyncio.wait_for(task, 5)


async def test_a_staging_directory_that_does_not_exist_is_told(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber
) -> None:
    with pytest.raises(ErgonError, match=r"actor\.staging = .*nowhere cannot be used"):
        WeightAdopter(engine, subscriber, tmp_path / "nowhere" / "own")


async def test_leftovers_of_a_killed_process_are_removed(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber
) -> None:
    leftover = tmp_path / "own" / "1.1.safetensors"
    leftover.parent.mkdir()
    leftover.touch()
    async with adopting(tmp_path, subscriber, engine):
        assert not leftover.exists()
