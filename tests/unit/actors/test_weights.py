from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from actors.engine import AdoptionError, EngineDeadError
from actors.weights import Subscriber, WeightAdopter
from broker.process.lifecycle import ErgonError
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Manifest
from broker.weights.basefile import BaseFile
from broker.weights.fetch import WeightsSupersededError
from broker.weights.sinks import WeightsCorruptError
from broker.weights.subscriber import WeightsTimeoutError
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

    def wait_newer(self, than: PolicyVersion | None, timeout_s: float) -> PolicyVersion | None:
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
        base.path.write_text(f"{version.lineage}.{version.version}")
        if self.newer_during_fetch is not None:
            self.newest, self.newer_during_fetch = self.newer_during_fetch, None
        return Manifest("run", version, None, (), 0, 4096, (), b"", 0.0)

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


async def test_a_version_superseded_while_it_is_fetched_is_skipped(
    tmp_path: Path, engine: ScriptedEngine, subscriber: ScriptedSubscriber
) -> None:
    subscriber.newer_during_fetch = V2
    subscriber.announced.put(V1)
    async with adopting(tmp_path, subscriber, engine) as (adopter, _):
        await asyncio.wait_for(adopter.at_least(V2), 5)
    assert engine.adopted == [V2]


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
