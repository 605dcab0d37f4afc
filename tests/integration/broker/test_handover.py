"""An episode goes from one actor to another over a real broker, which is killed in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from broker.client import ActorClient, LearnerClient
from broker.protocol.commands import (
    OFFER_BYTES,
    Clear,
    HandedOver,
    Handover,
    HandoverStatus,
    Heartbeat,
    Offer,
    PartialHead,
    Release,
    Released,
    TicketBody,
    TicketState,
    UnfinishedTurn,
    parse_body,
)
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.partials import Partial, read_handover
from broker.protocol.trajectory import Segment, Trajectory, VersionRun
from broker.store.segments import ALIGNMENT
from tests.integration.broker.conftest import HEARTBEAT_S, LIVENESS, RUN_ID, BrokerProcess
from tests.integration.broker.test_clients import connected
from tests.unit.broker.samples import make_ticket, make_trajectory


def make_partial(num_tokens: int = 100, seed: int = 0, snapshot: bytes = b"state") -> Partial:
    rng = np.random.default_rng(seed)
    mask_T = np.arange(num_tokens) >= 10
    logprobs_T = np.where(mask_T, -rng.random(num_tokens), 0).astype(np.float32)
    token_ids_T = rng.integers(0, 1000, num_tokens, np.int32)
    runs = (VersionRun(1, 2, 5), VersionRun(1, 3, num_tokens - 15))
    head = PartialHead(num_turns=3, turn=UnfinishedTurn(num_tokens=4), total_s=1.5)
    return Partial(head, (Segment(token_ids_T, mask_T, logprobs_T, runs),), snapshot)


def same(one: Partial, other: Partial | None) -> bool:
    return (
        other is not None
        and (one.head, one.snapshot) == (other.head, other.snapshot)
        and [segment.version_runs for segment in one.segments] == [segment.version_runs for segment in other.segments]
        and all(
            np.array_equal(getattr(mine, name), getattr(theirs, name))
            for mine, theirs in zip(one.segments, other.segments, strict=True)
            for name in ("token_ids_T", "loss_mask_T", "logprobs_T")
        )
    )


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    """Leases last, however busy the machine is."""
    running = BrokerProcess(tmp_path, lease_s=120.0)
    yield running
    running.kill()


@asynccontextmanager
async def actor_of(broker: BrokerProcess, name: str) -> AsyncIterator[ActorClient]:
    client = ActorClient(broker.endpoint, RUN_ID, name, heartbeat_s=HEARTBEAT_S, liveness=LIVENESS)
    await client.connect(30)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def learner_of(broker: BrokerProcess) -> AsyncIterator[LearnerClient]:
    learner = await asyncio.to_thread(broker.learner)
    try:
        yield learner
    finally:
        learner.close()


async def restart(broker: BrokerProcess) -> None:
    await asyncio.to_thread(broker.kill)
    broker.start()


async def test_another_actor_goes_on_byte_for_byte_over_a_killed_broker(broker: BrokerProcess) -> None:
    small, large = make_partial(), make_partial(200_000, seed=1, snapshot=bytes(range(256)) * 16)
    partials = {"a1": small, "b1": large}
    async with learner_of(broker) as learner:
        await asyncio.to_thread(learner.resume)
        await asyncio.to_thread(learner.issue, [make_ticket("a1"), make_ticket("b1")])
        async with actor_of(broker, "first") as first:
            leased = {(await first.lease()).ticket_id for _ in range(2)}
            assert leased == set(partials)
            assert [first.take_partial(key) for key in partials] == [None, None]
            kept = await asyncio.gather(*(first.hand_over(key, partials[key]) for key in partials))
            assert kept == ["kept", "kept"]
            assert first.leases == frozenset()
        await restart(broker)
        async with actor_of(broker, "second") as second:
            tickets = {(ticket := await second.lease()).ticket_id: ticket for _ in range(2)}
            for key, partial in partials.items():
                assert same(partial, second.take_partial(key))
                assert second.take_partial(key) is None  # once
                assert tickets[key] == make_ticket(key)
            # It is killed before it has got anywhere: the attempt is used up, and the partial of it.
            assert await second.hand_over("b1", make_partial(50, seed=2)) == "kept"
            assert await second.sender.send(make_trajectory(tickets["a1"])) == "accepted"
        async with actor_of(broker, "third") as third:
            ticket = await third.lease()
            assert ticket.ticket_id == "b1"
            assert same(make_partial(50, seed=2), third.take_partial("b1"))
            await third.release("b1", "infra_failure", "engine")
            again = await third.lease()
            assert (again.attempt, third.take_partial("b1")) == (1, None)
            assert await third.sender.send(make_trajectory(ticket)) == "accepted"
        received = [await asyncio.to_thread(learner.receive, 30) for _ in range(2)]
        assert all(isinstance(item, Trajectory) for item in received)
        assert await asyncio.to_thread(learner.receive, 0.2) is None
        status = await asyncio.to_thread(learner.status)
        assert status.count(TicketState.ISSUED) == status.count(TicketState.LEASED) == 0
        totals = {name: status.total(name) for name in ("handover_kept", "continued", "partial_damaged", "accepted")}
        assert totals == {"handover_kept": 1, "continued": 3, "partial_damaged": 0, "accepted": 2}
        assert await asyncio.to_thread(learner.ack, [item.ticket.ticket_id for item in received]) == 2  # type: ignore[union-attr]


async def test_a_damaged_partial_costs_what_was_sampled_and_not_the_ticket(broker: BrokerProcess) -> None:
    async with learner_of(broker) as learner:
        await asyncio.to_thread(learner.resume)
        await asyncio.to_thread(learner.issue, [make_ticket("a1")])
        async with actor_of(broker, "first") as first:
            await first.lease()
            assert await first.hand_over("a1", make_partial(20_000)) == "kept"
        (path,) = (broker.settings.run_dir / "broker" / "blobs").glob("*.segment")
        with path.open("r+b") as file:
            file.seek(ALIGNMENT // 2)
            file.write(b"\xff" * 8)
        async with actor_of(broker, "second") as second:
            assert await second.lease() == make_ticket("a1")
            assert second.take_partial("a1") is None
        assert (await asyncio.to_thread(learner.status)).total("partial_damaged") == 1


async def test_where_all_partials_have_no_room_the_lease_is_given_back_alone(tmp_path: Path) -> None:
    broker = BrokerProcess(tmp_path, partials_mb=1)
    try:
        async with learner_of(broker) as learner:
            await asyncio.to_thread(learner.resume)
            await asyncio.to_thread(learner.issue, [make_ticket("a1"), make_ticket("b1")])
            async with actor_of(broker, "first") as first:
                await first.lease()
                await first.lease()
                assert await first.hand_over("a1", make_partial(60_000)) == "kept"
                assert await first.hand_over("b1", make_partial(60_000)) == "refused"
            async with actor_of(broker, "second") as second:
                begun = {(await second.lease()).ticket_id: None for _ in range(2)}
                assert {key: second.take_partial(key) is not None for key in begun} == {"a1": True, "b1": False}
    finally:
        broker.kill()


# --- the client, with a broker that does what the test wants

ANSWERS: list[tuple[str, HandoverStatus]] = [("b1", "unwanted"), ("a1", "kept")]


async def test_a_handover_is_repeated_until_it_is_answered_and_a_large_one_is_offered_first() -> None:
    async with connected() as rig:
        await rig.lease("a1", "b1")
        large = make_partial(OFFER_BYTES // 9 + 1000)
        calls = {
            "a1": asyncio.create_task(rig.actor.hand_over("a1", make_partial())),
            "b1": asyncio.create_task(rig.actor.hand_over("b1", large)),
        }
        handover, offer = await rig.expect("HANDOVER", "OFFER")
        assert read_handover(handover).ticket_id == "a1"
        await rig.tell(Clear(ticket_id="b1"))
        (cleared,) = await rig.expect("HANDOVER")
        assert cleared.array_bytes == parse_body(offer, Offer).num_bytes > OFFER_BYTES
        assert await rig.reconnect() == {"a1", "b1"}  # named until they are answered
        again, _ = await rig.expect("HANDOVER", "OFFER")
        assert parse_body(again, Handover).ticket_id == "a1"
        await rig.tell(
            HandedOver(ticket_id="b1", status="unwanted").pack(), HandedOver(ticket_id="a1", status="kept").pack()
        )
        assert [await calls[key] for key in ("a1", "b1")] == ["kept", "unwanted"]
        assert rig.actor.leases == frozenset()


async def test_what_is_given_back_is_named_no_more_on_this_connection() -> None:
    """A heartbeat behind a HANDOVER or RELEASE would take the lease up again, which nobody works at."""
    async with connected() as rig:
        await rig.lease("a1", "b1", "c1")
        calls = [
            asyncio.create_task(rig.actor.hand_over("a1", make_partial())),
            asyncio.create_task(rig.actor.release("b1", "drain")),
        ]
        await rig.expect("HANDOVER")
        (release,) = await rig.expect("RELEASE")
        assert parse_body(rig.actor._heartbeat(), Heartbeat).leases == ("c1",)
        assert await rig.reconnect() == {"a1", "b1", "c1"}  # not answered: the broker may not know of it
        await rig.expect("HANDOVER", "RELEASE")
        assert parse_body(rig.actor._heartbeat(), Heartbeat).leases == ("c1",)
        # Answered, and leased again in the same breath: that is a lease of its own.
        again = asyncio.create_task(rig.actor.lease())
        await rig.expect("LEASE")
        request_id = parse_body(release, Release).request_id
        await rig.tell(
            HandedOver(ticket_id="a1", status="kept").pack(),
            Released(request_id=request_id, count=1).pack(),
            TicketBody(tickets=(make_ticket("b1"),)).pack(),
        )
        assert (await again).ticket_id == "b1"
        await asyncio.gather(*calls)
        assert rig.actor.leases == {"b1", "c1"}


async def test_a_refused_handover_is_its_makers_error() -> None:
    async with connected() as rig:
        await rig.lease("a1")
        call = asyncio.create_task(rig.actor.hand_over("a1", make_partial()))
        await rig.expect("HANDOVER")
        rig.broker.refuse(ErrorCode.BAD_MESSAGE, "a1")
        with pytest.raises(ProtocolError, match="a1 is refused"):
            await call
        assert rig.actor.leases == {"a1"}  # to be given back
