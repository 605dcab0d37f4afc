from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Literal, cast

import pytest

from actors import metrics
from actors.actor import Actor
from actors.engine import EngineDeadError, EngineLoad
from actors.weights import WeightAdopter
from broker.client import HandoverStatus
from broker.process.settings import ActorSection
from broker.protocol.partials import Partial
from broker.protocol.trajectory import Mode, Outcome, PolicyVersion, TaskRef, Ticket, Trajectory
from envs.interface import Action, SandboxError
from tests.unit.actors.support import ScriptedEngine, WordEnvironment, WordEpisode, make_renderer, make_ticket

RENDERER = make_renderer()


class ScriptedClient:
    """Leases the given tickets, then none; remembers what came back."""

    def __init__(self, tickets: list[Ticket]) -> None:
        self.left = tickets
        self.sent: list[Trajectory] = []
        self.released: list[tuple[str, str, str]] = []
        self.begun: dict[str, Partial] = {}
        self.handed_over: list[tuple[str, Partial]] = []
        self.unwanted: dict[str, asyncio.Event] = {}
        self.changed = asyncio.Condition()

    async def lease(self) -> Ticket:
        if self.left:
            return self.left.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    def take_partial(self, ticket_id: str) -> Partial | None:
        return self.begun.pop(ticket_id, None)

    async def hand_over(self, ticket_id: str, partial: Partial) -> HandoverStatus:
        self.handed_over.append((ticket_id, partial))
        return "kept"

    async def withdrawn(self, ticket_id: str) -> None:
        await self.unwanted.setdefault(ticket_id, asyncio.Event()).wait()

    async def release(self, ticket_id: str, reason: Literal["drain", "infra_failure"], error: str = "") -> None:
        self.released.append((ticket_id, reason, error))
        async with self.changed:
            self.changed.notify_all()

    async def send(self, trajectory: Trajectory) -> str:
        self.sent.append(trajectory)
        async with self.changed:
            self.changed.notify_all()
        return "accepted"

    async def until(self, condition: Callable[[], bool]) -> None:
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(condition), 10)


class Gate:
    """In the place of the WeightAdopter."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.asked: list[PolicyVersion] = []
        self.error: Exception | None = None

    async def at_least(self, version: PolicyVersion) -> None:
        self.asked.append(version)
        await self.opened.wait()

    async def run(self) -> None:
        if self.error is not None:
            raise self.error
        await asyncio.Event().wait()


class Rig:
    def __init__(
        self,
        tickets: list[Ticket],
        script: list[Any],
        environment: WordEnvironment | None = None,
        max_staleness: int | None = None,
        **settings: Any,
    ) -> None:
        self.client = ScriptedClient(tickets)
        self.gate = Gate()
        self.engine = ScriptedEngine(RENDERER, script)
        self.environment = environment or WordEnvironment()
        self.stop = threading.Event()
        self.actor = Actor(
            "actor-0",
            self.client,
            self.client,
            self.engine,
            cast(WeightAdopter, self.gate),
            RENDERER,
            {"words": self.environment},
            ActorSection(**{"max_num_seqs": 4, "drain_s": 5.0} | settings),
            max_staleness=max_staleness,
        )

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.actor.run(self.stop))


async def test_leased_tickets_become_sent_trajectories_and_a_stop_ends_cleanly() -> None:
    rig = Rig([make_ticket(f"t{i}", min_version=PolicyVersion(2, i)) for i in range(9)], ["w3"] * 9)
    rig.gate.opened.set()
    task = rig.start()
    await rig.client.until(lambda: len(rig.client.sent) == 9)
    rig.stop.set()
    await asyncio.wait_for(task, 5)
    assert {t.ticket.ticket_id for t in rig.client.sent} == {f"t{i}" for i in range(9)}
    assert all(t.head.outcome is Outcome.COMPLETED and t.head.actor_id == "actor-0" for t in rig.client.sent)
    assert sorted(rig.gate.asked) == [PolicyVersion(2, i) for i in range(9)]
    assert rig.client.released == []


async def test_sampling_waits_for_the_version_and_reference_episodes_do_not() -> None:
    rig = Rig([make_ticket("waits"), make_ticket("reference", Mode.REFERENCE)], ["w3"])
    task = rig.start()
    await rig.client.until(lambda: len(rig.client.sent) == 1)
    assert rig.client.sent[0].ticket.ticket_id == "reference"
    assert rig.engine.prompts == []
    rig.gate.opened.set()
    await rig.client.until(lambda: len(rig.client.sent) == 2)
    rig.stop.set()
    await asyncio.wait_for(task, 5)


def failures(cause: str) -> float:
    samples = next(iter(metrics.infra_failures.collect())).samples
    return sum(s.value for s in samples if s.name.endswith("_total") and s.labels["cause"] == cause)


async def test_an_infra_failure_releases_the_ticket_and_the_loop_goes_on() -> None:
    rig = Rig([make_ticket("bad"), make_ticket("good")], ["w3"] * 2, max_episodes=1)
    rig.gate.opened.set()

    async def fail_once() -> None:
        rig.environment.on_start = None
        raise SandboxError("bwrap died")

    rig.environment.on_start = fail_once
    before = failures("sandbox")
    task = rig.start()
    await rig.client.until(lambda: len(rig.client.sent) == 1)
    assert failures("sandbox") == before + 1
    assert rig.client.released == [("bad", "infra_failure", "sandbox: bwrap died")]
    assert rig.client.sent[0].ticket.ticket_id == "good"
    rig.stop.set()
    await asyncio.wait_for(task, 5)


async def test_a_ticket_of_an_unknown_environment_is_released_with_a_sentence() -> None:
    rig = Rig([make_ticket("t", task=TaskRef(env="chess", split="train", index=0))], [])
    rig.gate.opened.set()
    task = rig.start()
    await rig.client.until(lambda: len(rig.client.released) == 1)
    assert rig.client.released[0][1:] == (
        "infra_failure",
        "environment 'chess' is not in this actor's settings, which have words",
    )
    rig.stop.set()
    await asyncio.wait_for(task, 5)


async def test_a_drain_finishes_what_runs_and_gives_back_what_only_waits() -> None:
    rig = Rig([make_ticket("runs", Mode.REFERENCE), make_ticket("waits")], [], max_episodes=3)
    entered, leave = asyncio.Event(), asyncio.Event()

    async def slow(_action: Action) -> None:
        entered.set()
        await leave.wait()

    rig.environment.on_step = slow
    task = rig.start()
    await entered.wait()
    rig.stop.set()
    await rig.client.until(lambda: len(rig.client.released) == 1)
    assert rig.client.released[0][:2] == ("waits", "drain")
    assert not task.done()
    leave.set()
    await asyncio.wait_for(task, 5)
    assert [t.ticket.ticket_id for t in rig.client.sent] == ["runs"]


async def test_what_a_drain_cannot_finish_in_time_is_given_back_and_closed() -> None:
    rig = Rig([make_ticket("slow")], ["<hang>"], drain_s=0.1)
    rig.gate.opened.set()
    task = rig.start()
    await rig.engine.hanging.wait()
    rig.stop.set()
    await asyncio.wait_for(task, 5)
    assert [r[:2] for r in rig.client.released] == [("slow", "drain")]
    assert (rig.client.sent, rig.environment.closed, rig.engine.cancelled) == ([], 1, 1)


async def test_an_episode_whose_ticket_is_withdrawn_stops_and_the_loop_goes_on() -> None:
    rig = Rig([make_ticket("unwanted"), make_ticket("good")], ["<hang>", "w3"], max_episodes=1)
    rig.gate.opened.set()
    task = rig.start()
    await rig.engine.hanging.wait()
    rig.client.unwanted["unwanted"].set()
    await rig.client.until(lambda: len(rig.client.sent) == 1)
    assert rig.client.sent[0].ticket.ticket_id == "good"
    assert (rig.client.released, rig.environment.closed, rig.engine.cancelled) == ([], 2, 1)
    rig.stop.set()
    await asyncio.wait_for(task, 5)


async def test_an_engine_that_dies_in_a_request_ends_the_actor_and_every_ticket_is_released() -> None:
    rig = Rig([make_ticket("dies"), make_ticket("hangs")], [EngineDeadError("gone"), "<hang>"])
    rig.gate.opened.set()
    with pytest.raises(EngineDeadError, match="gone"):
        await asyncio.wait_for(rig.start(), 5)
    assert sorted(r[:2] for r in rig.client.released) == [("dies", "infra_failure"), ("hangs", "infra_failure")]


async def test_an_engine_that_dies_idle_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.actor.HEALTH_POLL_S", 0.01)
    rig = Rig([], [])
    task = rig.start()
    await asyncio.sleep(0.05)
    rig.engine.dead = EngineDeadError("killed")
    with pytest.raises(EngineDeadError, match="killed"):
        await asyncio.wait_for(task, 5)


async def test_a_failed_adoption_ends_the_actor() -> None:
    rig = Rig([], [])
    rig.gate.error = EngineDeadError("half loaded")
    with pytest.raises(EngineDeadError, match="half loaded"):
        await asyncio.wait_for(rig.start(), 5)


async def test_slow_tools_get_company_until_the_engine_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.actor.LOOK_S", 0.001)
    rig = Rig([make_ticket(f"t{i}") for i in range(40)], ["<tool>look 3</tool>"] * 40, max_num_seqs=2, max_episodes=20)
    rig.gate.opened.set()
    in_tools, enough = 0, asyncio.Event()

    async def slow(_action: Action) -> None:
        nonlocal in_tools
        in_tools += 1
        if in_tools == 20:
            enough.set()
        await asyncio.Event().wait()

    rig.environment.on_step = slow
    task = rig.start()
    await asyncio.wait_for(enough.wait(), 5)
    assert len(rig.client.left) == 20
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_no_ticket_is_asked_for_beyond_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.actor.LOOK_S", 0.001)
    rig = Rig([make_ticket(f"t{i}") for i in range(40)], ["<hang>"] * 40, max_num_seqs=2, max_episodes=20)
    looks = asyncio.Semaphore(0)

    def full() -> EngineLoad:
        looks.release()
        return EngineLoad(num_unfinished=2)

    monkeypatch.setattr(rig.engine, "load", full)
    rig.gate.opened.set()
    task = rig.start()
    await rig.engine.hanging.wait()
    for _ in range(30):
        await looks.acquire()
    assert len(rig.client.left) == 38
    rig.stop.set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_does_not_let_itself_be_ended_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.actor.END_LIMIT_S", 0.05)
    rig = Rig([make_ticket("stuck")], ["<hang>"], drain_s=0.0)
    rig.gate.opened.set()
    released = asyncio.Event()
    monkeypatch.setattr(rig.environment.__class__, "episode", lambda self, task: _Stuck(self, task, released))
    task = rig.start()
    await rig.engine.hanging.wait()
    rig.stop.set()
    await asyncio.wait_for(task, 5)
    assert rig.client.released == []  # the connection's end gives it back
    released.set()
    await rig.client.until(lambda: len(rig.client.released) == 1)


class _Stuck(WordEpisode):
    """Closes late."""

    def __init__(self, environment: WordEnvironment, task: Any, released: asyncio.Event) -> None:
        super().__init__(environment, task)
        self._released = released

    async def close(self) -> None:
        await self._released.wait()
        await super().close()


async def test_a_fault_of_our_own_in_one_episode_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig([make_ticket("odd"), make_ticket("good")], ["w3"] * 2, max_episodes=1)
    rig.gate.opened.set()
    run = rig.actor._episode

    async def faulty(ticket: Ticket, begun: Partial | None) -> Trajectory:
        if ticket.ticket_id == "odd":
            raise IndexError("a bug")
        return await run(ticket, begun)

    monkeypatch.setattr(rig.actor, "_episode", faulty)
    task = rig.start()
    await rig.client.until(lambda: len(rig.client.sent) == 1)
    assert rig.client.released == [("odd", "infra_failure", "IndexError: a bug")]
    rig.stop.set()
    await asyncio.wait_for(task, 5)
