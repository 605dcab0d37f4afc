"""An engine that dies is followed by another one; what it had is lost, what waited goes on, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from actors import restarting
from actors.engine import AdoptionFailedError, EngineDeadError, Sample
from actors.restarting import RequestLostError, RestartingEngine
from broker.protocol.trajectory import PolicyVersion, Sampling
from tests.digest import data_digest
from tests.unit.actors.support import ScriptedEngine, make_renderer

RENDERER = make_renderer()
VERSION = PolicyVersion(3, 1)


class Mortal(ScriptedEngine):
    """Dies when it is told to; of its requests, the ones that hang never hear of it."""

    def __init__(self, script: list[Any]) -> None:
        super().__init__(RENDERER, script)
        self.shut_down = 0

    @property
    def dead(self) -> str | None:  # type: ignore[override]
        return self._reason

    @dead.setter
    def dead(self, reason: str | None) -> None:
        self._reason = reason

    def check(self) -> None:
        if self._reason is not None:
            raise EngineDeadError(self._reason)

    async def adopt(self, version: PolicyVersion, weights: Path, digest: str) -> float:
        self.check()
        return await super().adopt(version, weights, digest)

    def shutdown(self) -> None:
        self.shut_down += 1


class Rig:
    """Engines by number, and the clock that they live by."""

    def __init__(self, *scripts: Any, max_restarts: int = 2) -> None:
        self.scripts, self.engines, self.now, self.deaths = list(scripts), [], 0.0, 0  # type: ignore[var-annotated]
        self.engine = RestartingEngine(self.start, max_restarts, 100.0, lambda: self.now)
        self.engine.on_death = self.mourn

    def start(self) -> Mortal:
        script = self.scripts.pop(0)
        if isinstance(script, Exception):
            raise script
        self.engines.append(Mortal(script))
        return self.engines[-1]

    def mourn(self) -> None:
        self.deaths += 1

    def ask(self, name: str = "r") -> asyncio.Task[Sample]:
        return asyncio.create_task(self.engine.generate([1], Sampling(), 20, (), name))

    def kill(self) -> None:
        self.engines[-1].dead = "killed"
        self.engine.check()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarting, "BACKOFF_S", 0.001)


@pytest.fixture
def adopt(tmp_path: Path) -> Callable[[RestartingEngine], Coroutine[Any, Any, float]]:
    path = tmp_path / "weights"
    path.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return lambda engine: engine.adopt(VERSION, path, data_digest(path))


async def test_what_was_in_a_dead_engine_is_lost_and_what_waited_is_served_by_the_next(adopt: Any) -> None:
    rig = Rig(["<hang>"], ["w3"])
    in_flight = rig.ask("in-flight")
    await rig.engines[0].hanging.wait()
    rig.kill()
    waiting = rig.ask("waiting")
    with pytest.raises(RequestLostError, match="died with the request in-flight: killed"):
        await in_flight
    assert (rig.engine.dead, rig.deaths) == ("killed", 1)
    await until(lambda: rig.engine.dead == "it has no version to serve yet")
    await asyncio.sleep(0)
    assert not waiting.done()
    assert rig.engines[1].prompts == []
    await adopt(rig.engine)
    assert (await waiting).version_runs[0][:2] == VERSION
    assert (rig.engine.dead, rig.engine.policy_version, rig.engines[0].shut_down) == (None, VERSION, 1)


async def test_a_request_that_hears_of_the_death_is_how_it_is_noticed(adopt: Any) -> None:
    rig = Rig([EngineDeadError("gone")], ["w3"])
    with pytest.raises(RequestLostError):
        await rig.ask()
    await adopt(rig.engine)
    assert len((await rig.ask()).token_ids_N) > 0
    rig.engine.check()


async def test_an_adoption_that_it_dies_of_is_tried_again_on_the_next(adopt: Any) -> None:
    rig = Rig([], ["w3"])
    rig.engines[0].adopt_error = EngineDeadError("half loaded")
    with pytest.raises(AdoptionFailedError, match="half loaded"):
        await adopt(rig.engine)
    await adopt(rig.engine)  # waits for it
    assert rig.engines[1].adopted == [VERSION]


async def test_so_is_one_that_a_dead_engine_never_answers(adopt: Any) -> None:
    rig = Rig([], ["w3"])
    rig.engines[0].adopt_gate.clear()
    adoption = asyncio.create_task(adopt(rig.engine))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    rig.kill()
    with pytest.raises(AdoptionFailedError, match="killed"):
        await adoption
    await adopt(rig.engine)
    assert rig.engines[1].adopted == [VERSION]


async def test_a_request_that_cannot_wait_any_longer_is_lost_and_not_answered_late() -> None:
    rig = Rig([], [])
    rig.kill()
    waiting = rig.ask("late")
    await asyncio.sleep(0)
    await rig.engine.abort("late")
    with pytest.raises(RequestLostError, match="no engine for the request late in time"):
        await waiting


async def test_restarts_in_a_row_are_bounded_and_those_that_fail_count() -> None:
    rig = Rig([], RuntimeError("no memory"), RuntimeError("no memory"))
    rig.kill()
    waiting = rig.ask()
    with pytest.raises(EngineDeadError, match="RuntimeError: no memory; it was restarted 2 times in a row"):
        await waiting
    with pytest.raises(EngineDeadError, match="no memory"):
        rig.engine.check()
    with pytest.raises(EngineDeadError, match="no memory"):
        await rig.engine.adopt(VERSION, Path("nowhere"), "")


async def test_an_engine_that_lived_long_may_be_restarted_as_often_again(adopt: Any) -> None:
    rig = Rig([], [], [], [], [])
    for number, lived_s in enumerate((1.0, 1.0, 200.0, 1.0), start=1):
        rig.now += lived_s
        rig.kill()
        await until(lambda number=number: len(rig.engines) == number + 1)  # type: ignore[misc]
        await adopt(rig.engine)
    rig.now += 1.0
    rig.kill()
    await until(lambda: rig.engine._given_up is not None)
    assert len(rig.engines) == 5


async def test_without_restarts_it_is_given_up_at_once() -> None:
    rig = Rig([], max_restarts=0)
    rig.kill()
    await until(lambda: rig.engine._given_up is not None)
    with pytest.raises(EngineDeadError, match="killed; it was restarted 0 times"):
        rig.engine.check()
    await rig.engine.close()
