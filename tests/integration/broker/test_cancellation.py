"""Cancelled tickets, refused outcomes and the monitor, against a real broker over real sockets."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import msgspec
import pytest

from broker.client import ActorClient, DeadLetter
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.trajectory import Mode, Outcome, Ticket, Trajectory
from tests.integration.broker.conftest import RUN_ID, BrokerProcess
from tests.unit.broker.samples import make_ticket, make_trajectory


def ended(ticket: Ticket, **facts: object) -> Trajectory:
    trajectory = make_trajectory(ticket)
    return dataclasses.replace(trajectory, head=msgspec.structs.replace(trajectory.head, **facts))


async def test_an_actor_hears_that_its_tickets_are_cancelled_also_after_the_broker_was_killed(
    broker: BrokerProcess,
) -> None:
    learner = broker.learner()
    learner.resume([])
    learner.issue([make_ticket(ticket_id) for ticket_id in ("a1", "a2", "b1", "c1")])
    actor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
    await actor.connect()
    tickets = {ticket.ticket_id: ticket for ticket in [await actor.tickets.lease() for _ in range(4)]}
    told = {key: asyncio.create_task(actor.tickets.withdrawn(key)) for key in tickets}

    assert await asyncio.to_thread(learner.cancel, [], []) == 0
    assert await asyncio.to_thread(learner.cancel, ["b1", "never"]) == 1
    await asyncio.wait_for(told["b1"], 30)
    assert actor.leases == {"a1", "a2", "c1"}
    broker.kill()
    broker.start()
    assert await asyncio.to_thread(learner.cancel, None, ["group-a"]) == 2
    await asyncio.wait_for(asyncio.gather(told["a1"], told["a2"]), 30)
    assert not told["c1"].done()
    assert await actor.send(make_trajectory(tickets["a1"])) == "unwanted"
    assert await actor.send(make_trajectory(tickets["c1"])) == "accepted"
    told["c1"].cancel()

    items = [await asyncio.to_thread(learner.receive, 30) for _ in range(4)]
    letters = {item.ticket_id: item for item in items if isinstance(item, DeadLetter)}
    assert letters.keys() == {"a1", "a2", "b1"}
    assert letters["a1"] == DeadLetter("a1", "group-a", Mode.TRAIN, "cancelled by the learner")
    assert await asyncio.to_thread(learner.ack, ["a1", "a2", "b1", "c1"]) == 4
    await actor.close()
    learner.close()


async def test_a_ticket_that_waits_to_be_run_is_taken_back(broker: BrokerProcess) -> None:
    learner = broker.learner()
    learner.resume([])
    actor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
    await actor.connect()
    waiting = asyncio.create_task(actor.lease())
    await asyncio.sleep(0)
    waiting.cancel()  # the broker has been asked; what it sends is for the next call
    await asyncio.to_thread(learner.issue, [make_ticket("t0")])
    while "t0" not in actor.leases:
        await asyncio.sleep(0.01)
    assert await asyncio.to_thread(learner.cancel) == 1
    while actor.leases:
        await asyncio.sleep(0.01)
    await asyncio.to_thread(learner.issue, [make_ticket("t1")])
    assert (await asyncio.wait_for(actor.lease(), 30)).ticket_id == "t1"
    await actor.close()
    learner.close()


async def test_outcomes_have_their_rules_and_are_counted(broker: BrokerProcess) -> None:
    learner = broker.learner()
    learner.resume([])
    learner.issue([make_ticket("t0"), make_ticket("t1")])
    actor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
    await actor.connect()
    first, second = await actor.lease(), await actor.lease()
    with pytest.raises(ProtocolError, match="RELEASE with reason infra_failure") as refusal:
        await actor.send(ended(first, outcome=Outcome.INFRA_FAILURE))
    assert refusal.value.code is ErrorCode.BAD_MESSAGE
    assert await actor.send(ended(first, outcome=Outcome.TIMEOUT)) == "accepted"
    assert await actor.send(ended(second, outcome=Outcome.EXPLOIT)) == "accepted"
    status = await asyncio.to_thread(learner.status)
    assert {name: status.total(f"outcome_{name}") for name in ("timeout", "exploit", "completed")} == {
        "timeout": 1,
        "exploit": 1,
        "completed": 0,
    }
    assert 'ergon_broker_outcomes_total{env="shop",outcome="timeout"} 1.0' in broker.http("/metrics")
    assert 'ergon_broker_groups_closed_total{end="complete",env="shop"} 1.0' in broker.http("/metrics")
    await actor.close()
    learner.close()


async def test_one_bad_result_of_many_that_are_sent_together_fails_alone(broker: BrokerProcess) -> None:
    learner = broker.learner()
    learner.resume([])
    learner.issue([make_ticket(f"t{number}") for number in range(8)])
    actor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
    await actor.connect()
    tickets = await asyncio.wait_for(asyncio.gather(*(actor.lease() for _ in range(8))), 30)
    outcomes = [Outcome.INFRA_FAILURE if number == 3 else Outcome.COMPLETED for number in range(8)]
    sends = [actor.send(ended(ticket, outcome=outcome)) for ticket, outcome in zip(tickets, outcomes, strict=True)]
    statuses = await asyncio.wait_for(asyncio.gather(*sends, return_exceptions=True), 30)
    refused = statuses.pop(3)
    assert isinstance(refused, ProtocolError)
    assert f"ticket {tickets[3].ticket_id} is infra_failure" in refused.message
    assert statuses == ["accepted"] * 7
    items = [await asyncio.to_thread(learner.receive, 30) for _ in statuses]
    received = {item.ticket.ticket_id for item in items if isinstance(item, Trajectory)}
    assert received == {ticket.ticket_id for ticket in tickets} - {tickets[3].ticket_id}
    await actor.close()
    learner.close()


async def test_a_learner_that_drops_slow_episodes_raises_the_alarm(broker: BrokerProcess) -> None:
    learner = broker.learner(window=256)
    learner.resume([])
    ids = [f"t{number}" for number in range(120)]
    learner.issue([make_ticket(ticket_id) for ticket_id in ids])
    actor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
    await actor.connect()
    for number in range(len(ids)):
        ticket = await actor.lease()
        seconds = 60.0 if number % 2 else 1.0
        await actor.send(ended(ticket, timings_s={"total": seconds, "model": 0.0, "tool": 0.0}))
    items = [await asyncio.to_thread(learner.receive, 30) for _ in ids]
    results = [item for item in items if isinstance(item, Trajectory)]
    assert "ergon_broker_drift_alarm 0.0" in broker.http("/metrics")
    slow = [item.ticket.ticket_id for item in results if item.head.timings_s["total"] > 10]
    assert await asyncio.to_thread(learner.ack, ids, slow) == len(ids)
    deadline = time.monotonic() + 30
    while "ergon_broker_drift_alarm 1.0" not in (page := broker.http("/metrics")):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert 'ergon_broker_drift{env="shop",quantity="duration"} 0.5' in page
    await actor.close()
    learner.close()
