"""The loop's part of a handover: when a drain hands over, and what is done with a ticket that comes with a partial."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors import metrics
from broker.client import HandoverStatus
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.partials import Partial
from broker.protocol.trajectory import Outcome, PolicyVersion, VersionRun
from envs.interface import Action
from tests.unit.actors.support import WordEnvironment, make_ticket
from tests.unit.actors.test_actor import Rig
from tests.unit.actors.test_handover import Counting


async def drained(environment: WordEnvironment, script: list[str], **settings: Any) -> Rig:
    """An actor that was told to stop while its last request hung."""
    rig = Rig([make_ticket("slow")], script, environment, drain_s=0.2, **settings)
    rig.gate.opened.set()
    task = rig.start()
    await asyncio.wait_for(rig.engine.hanging.wait(), 5)
    rig.stop.set()
    await asyncio.wait_for(task, 5)
    assert rig.environment.opened == rig.environment.closed == 1
    assert rig.client.sent == []
    return rig


async def handed_over() -> Partial:
    rig = await drained(Counting(), ["<tool>look 3</tool>", "<hang>"])
    ((ticket_id, partial),) = rig.client.handed_over
    assert (ticket_id, rig.client.released) == ("slow", [])
    return partial


async def test_a_drain_hands_over_what_is_unfinished_at_its_end() -> None:
    before = metrics.handover_tokens._value.get()
    partial = await handed_over()
    assert (partial.head.num_turns, partial.snapshot) == (1, b"1")
    assert partial.head.turn is not None
    assert partial.head.turn.num_tokens == 1  # in the middle of the second turn
    assert metrics.handover_tokens._value.get() - before == partial.num_sampled


@pytest.mark.parametrize(
    "changes", [{"handover": False}, {"environment": WordEnvironment()}], ids=("off", "no snapshots")
)
async def test_what_cannot_be_handed_over_is_given_back(changes: dict[str, Any]) -> None:
    rig = await drained(**{"environment": Counting(), "script": ["<hang>"], **changes})
    assert rig.client.handed_over == []
    assert [released[:2] for released in rig.client.released] == [("slow", "drain")]


async def test_what_is_in_a_tool_when_its_time_is_up_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    environment, entered = Counting(), asyncio.Event()

    async def slow(_self: Any, _action: Action) -> None:
        entered.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("tests.unit.actors.test_handover.CountingEpisode.step", slow)
    rig = Rig([make_ticket("slow")], ["<tool>look 3</tool>"], environment, drain_s=0.1)
    rig.gate.opened.set()
    task = rig.start()
    await asyncio.wait_for(entered.wait(), 5)
    rig.stop.set()
    await asyncio.wait_for(task, 5)
    assert [released[:2] for released in rig.client.released] == [("slow", "drain")]


async def test_a_partial_that_the_broker_refuses_costs_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_self: Any, _ticket_id: str, _partial: Partial) -> HandoverStatus:
        raise ProtocolError(ErrorCode.BAD_MESSAGE, "head is wrong")

    monkeypatch.setattr("tests.unit.actors.test_actor.ScriptedClient.hand_over", refuse)
    rig = await drained(Counting(), ["<tool>look 3</tool>", "<hang>"])
    assert [released[:2] for released in rig.client.released] == [("slow", "drain")]


async def continued(partial: Partial, version: int, max_staleness: int) -> Rig:
    """Another actor, which serves this version, and gets the ticket with the partial."""
    rig = Rig([make_ticket("slow", sampling={"max_turns": 2})], ["w3"] * 2, Counting(), max_staleness)
    rig.engine.version = PolicyVersion(1, version)
    rig.client.begun["slow"] = partial
    rig.gate.opened.set()
    task = rig.start()
    await rig.client.until(lambda: len(rig.client.sent) == 1)
    rig.stop.set()
    await asyncio.wait_for(task, 5)
    return rig


async def test_the_next_actor_goes_on_with_the_same_tokens() -> None:
    partial = await handed_over()
    rig = await continued(partial, version=6, max_staleness=2)
    (trajectory,) = rig.client.sent
    (segment,), head = trajectory.segments, trajectory.head
    begun = partial.segments[0].token_ids_T.tolist()
    assert segment.token_ids_T[: len(begun)].tolist() == begun == rig.engine.prompts[0]
    num_after = trajectory.num_sampled - partial.num_sampled
    assert segment.version_runs == (VersionRun(1, 4, partial.num_sampled), VersionRun(1, 6, num_after))
    assert (head.outcome, head.reward, head.num_turns) == (Outcome.TRUNCATED_TURNS, 2.0, 2)
    assert rig.engine.priorities[0] < 0  # before what has only begun


async def test_what_is_too_old_to_be_trained_on_begins_anew() -> None:
    rig = await continued(await handed_over(), version=7, max_staleness=2)
    assert {run.version for segment in rig.client.sent[0].segments for run in segment.version_runs} == {7}
    assert rig.client.sent[0].head.reward == 2.0
