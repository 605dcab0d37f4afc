"""The clients over a real socket, with a broker that does what the test wants: parcels, refusals, windows."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

import numpy as np
import pytest

from broker.client import ActorClient, DeadLetter, LearnerClient
from broker.protocol.codec import array_bytes, pack_trajectories, unpack_trajectories
from broker.protocol.commands import (
    OFFER_BYTES,
    Ack,
    Acked,
    Clear,
    Credit,
    Dead,
    Deliver,
    Durable,
    Heartbeat,
    Lease,
    Offer,
    Resume,
    Resumed,
    SendStatus,
    Status,
    StatusReply,
    TicketBody,
    parse_body,
)
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.trajectory import Mode, Ticket, Trajectory
from tests.integration.broker.conftest import RUN_ID
from tests.integration.broker.raw_broker import RawBroker, raw_broker
from tests.unit.broker.samples import make_ticket, make_trajectory
from tests.unit.broker.test_parcels import TOKEN_BYTES, make


def ids(message: Message) -> list[str]:
    return [trajectory.ticket.ticket_id for trajectory in unpack_trajectories(message)]


async def settled(sends: Sequence[asyncio.Task[SendStatus]]) -> list[SendStatus]:
    return await asyncio.wait_for(asyncio.gather(*sends), 30)


class Rig:
    """An actor that holds tickets, and the broker's end of its connection."""

    def __init__(self, broker: RawBroker, actor: ActorClient) -> None:
        self.broker, self.actor = broker, actor

    async def tell(self, *messages: Message | Durable | Clear) -> None:
        for message in messages:
            self.broker.send(message)

    async def expect(self, *commands: str) -> list[Message]:
        return await asyncio.to_thread(self.broker.expect, *commands)

    async def lease(self, *ticket_ids: str) -> list[Ticket]:
        """So many calls at once, and one TICKET for all of them."""
        calls = [asyncio.create_task(self.actor.lease()) for _ in ticket_ids]
        (message,) = await self.expect("LEASE")
        assert parse_body(message, Lease).credit == len(ticket_ids)
        self.broker.send(TicketBody(tickets=tuple(make_ticket(ticket_id) for ticket_id in ticket_ids)))
        return await asyncio.wait_for(asyncio.gather(*calls), 30)

    def send(self, *trajectories: Trajectory) -> list[asyncio.Task[SendStatus]]:
        return [asyncio.create_task(self.actor.send(trajectory)) for trajectory in trajectories]

    async def reconnect(self) -> frozenset[str]:
        """Forget the actor; the leases that it names when it is back."""
        self.broker.forget()
        await asyncio.to_thread(self.broker.welcome)
        (heartbeat,) = await self.expect("HEARTBEAT")
        return frozenset(parse_body(heartbeat, Heartbeat).leases)


@asynccontextmanager
async def connected() -> AsyncIterator[Rig]:
    with raw_broker() as broker:
        actor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
        connecting = asyncio.create_task(actor.connect(30))
        await asyncio.to_thread(broker.welcome)
        await connecting
        try:
            yield Rig(broker, actor)
        finally:
            with actor._connection.lock:
                actor._leases.forget(actor.leases)  # nobody would answer the release
            await actor.close()


async def test_results_of_one_moment_are_one_parcel_and_each_has_its_own_answer() -> None:
    async with connected() as rig:
        tickets = await rig.lease("a1", "a2", "a3", "a4")
        sends = rig.send(*(make_trajectory(ticket) for ticket in tickets))
        (parcel,) = await rig.expect("TRAJECTORY")
        assert ids(parcel) == ["a1", "a2", "a3", "a4"]
        late = rig.send(make("b1"))
        assert ids((await rig.expect("TRAJECTORY"))[0]) == ["b1"]
        await rig.tell(Durable(results=(("a3", "late"), ("a1", "accepted"))))
        await rig.tell(Durable(results=(("b1", "unwanted"), ("a4", "duplicate"), ("a2", "accepted"))))
        assert await settled(sends) == ["accepted", "accepted", "late", "duplicate"]
        assert await settled(late) == ["unwanted"]
        assert rig.actor.leases == frozenset()


async def test_only_the_bad_one_of_a_refused_parcel_fails() -> None:
    async with connected() as rig:
        sends = rig.send(*(make(ticket_id) for ticket_id in ("a1", "a2", "a3", "a4")))
        await rig.expect("TRAJECTORY")
        rig.broker.refuse(ErrorCode.BAD_MESSAGE, "a1")
        singles = await rig.expect(*["TRAJECTORY"] * 4)
        assert [ids(single) for single in singles] == [["a1"], ["a2"], ["a3"], ["a4"]]
        await rig.tell(Durable(results=(("a1", "accepted"), ("a2", "accepted"))))
        rig.broker.refuse(ErrorCode.BAD_MESSAGE, "a3")
        await rig.tell(Durable(results=(("a4", "accepted"),)))
        with pytest.raises(ProtocolError, match="a3 is refused"):
            await asyncio.wait_for(sends.pop(2), 30)
        assert await settled(sends) == ["accepted"] * 3

        sends = rig.send(make("b1"), make("b2"))  # and where the first one is the bad one
        await rig.expect("TRAJECTORY")
        rig.broker.refuse(ErrorCode.BAD_MESSAGE, "b1")
        await rig.expect("TRAJECTORY", "TRAJECTORY")
        rig.broker.refuse(ErrorCode.BAD_MESSAGE, "b1")
        await rig.tell(Durable(results=(("b2", "late"),)))
        with pytest.raises(ProtocolError, match="b1 is refused"):
            await asyncio.wait_for(sends[0], 30)
        assert await settled(sends[1:]) == ["late"]


async def test_a_malformed_result_fails_at_its_sender_and_harms_nobody_else() -> None:
    async with connected() as rig:
        bad = make("bad")
        bad.segments[0].logprobs_T[1] = np.nan
        sends = rig.send(make("a1"), bad, make("a2"))
        with pytest.raises(ProtocolError, match="ticket bad: segment 0: log-prob nan"):
            await sends.pop(1)
        (parcel,) = await rig.expect("TRAJECTORY")
        assert ids(parcel) == ["a1", "a2"]
        await rig.tell(Durable(results=(("a1", "accepted"), ("a2", "accepted"))))
        assert await settled(sends) == ["accepted"] * 2


async def test_all_that_is_unanswered_is_sent_again_after_a_reconnection_and_nothing_else() -> None:
    async with connected() as rig:
        tickets = await rig.lease("a1", "a2", "big", "b1", "runs")
        large = dataclasses.replace(make_trajectory(tickets[2]), segments=make("", 1 + OFFER_BYTES // 9).segments)
        first = rig.send(make_trajectory(tickets[0]), make_trajectory(tickets[1]), large)
        assert ids((await rig.expect("OFFER", "TRAJECTORY"))[1]) == ["a1", "a2"]
        second = rig.send(make_trajectory(tickets[3]))
        given_up = rig.send(make("given-up"))
        await rig.expect("TRAJECTORY")
        given_up[0].cancel()
        await rig.tell(Durable(results=(("a2", "accepted"),)))
        assert await settled(first[1:2]) == ["accepted"]

        assert await rig.reconnect() == {"a1", "big", "b1", "runs"}
        offer, parcel = await rig.expect("OFFER", "TRAJECTORY")
        assert parse_body(offer, Offer).num_bytes == array_bytes(large)
        assert ids(parcel) == ["a1", "b1"]
        await rig.tell(Clear(ticket_id="big"))
        assert ids((await rig.expect("TRAJECTORY"))[0]) == ["big"]

        assert await rig.reconnect() == {"a1", "big", "b1", "runs"}
        await rig.expect("OFFER", "TRAJECTORY")
        rig.broker.refuse(ErrorCode.BAD_MESSAGE, "a1")  # the parcel of this connection
        singles = await rig.expect("TRAJECTORY", "TRAJECTORY")
        assert [ids(single) for single in singles] == [["a1"], ["b1"]]
        await rig.tell(Durable(results=(("big", "accepted"), ("b1", "accepted"), ("a1", "accepted"))))
        assert await settled([first[0], first[2], *second]) == ["accepted"] * 3
        assert rig.actor.leases == {"runs"}


async def test_a_large_result_that_is_given_up_takes_its_offer_back() -> None:
    async with connected() as rig:
        (send,) = rig.send(make("big", 1 + OFFER_BYTES // TOKEN_BYTES))
        await rig.expect("OFFER")
        send.cancel()
        await asyncio.gather(send, return_exceptions=True)
        await rig.tell(Clear(ticket_id="big"))
        (message,) = await rig.expect("OFFER")
        assert parse_body(message, Offer).num_bytes == 0


async def test_what_is_handed_in_just_before_the_end_is_sent() -> None:
    with raw_broker() as broker:
        actor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
        connecting = asyncio.create_task(actor.connect(30))
        await asyncio.to_thread(broker.welcome)
        await connecting
        send = asyncio.create_task(actor.send(make("a1")))
        await asyncio.sleep(0)
        closing = asyncio.create_task(actor.close())
        (message,) = await asyncio.to_thread(broker.expect, "TRAJECTORY")
        assert ids(message) == ["a1"]
        await closing
        assert "was closed" in str((await asyncio.gather(send, return_exceptions=True))[0])


class LearnerRig:
    """A learner, resumed, and the broker's end of its connection. `background` runs a call that waits for an answer."""

    def __init__(self, broker: RawBroker, learner: LearnerClient, background: ThreadPoolExecutor) -> None:
        self.broker, self.learner = broker, learner
        self._background = background

    def deliver(self, *trajectories: Trajectory) -> None:
        self.broker.send(pack_trajectories(trajectories, Deliver))

    def credit(self) -> tuple[int, int | None]:
        """The last CREDIT that was sent."""
        body = self.broker.body(Credit)
        return body.credit, body.credit_bytes

    def ask_status(self) -> Future[StatusReply]:
        """The answer will come; everything that the learner sent before is to be expected first."""
        return self._background.submit(self.learner.status)

    def answer_status(self, asked: Future[StatusReply]) -> None:
        request_id = self.broker.body(Status).request_id
        self.broker.send(StatusReply(request_id=request_id, tickets={}, totals={}, peers={}, full=False))
        asked.result(30)

    def ack(self, *ticket_ids: str) -> None:
        asked = self._background.submit(self.learner.ack, ticket_ids)
        body = self.broker.body(Ack)
        assert body.ticket_ids == ticket_ids
        self.broker.send(Acked(request_id=body.request_id, count=len(ticket_ids)))
        assert asked.result(30) == len(ticket_ids)

    def receive(self, num: int) -> list[str]:
        items = [self.learner.receive(30) for _ in range(num)]
        assert all(isinstance(item, Trajectory) for item in items)
        return [item.ticket.ticket_id for item in items if isinstance(item, Trajectory)]

    def reconnect(self) -> Resume:
        self.broker.forget()
        self.broker.welcome(lineage=1)
        return self.broker.body(Resume)


@contextmanager
def resumed(window: int, window_bytes: int) -> Iterator[LearnerRig]:
    with raw_broker() as broker, ThreadPoolExecutor(1) as background:
        learner = LearnerClient(broker.endpoint, RUN_ID, window=window, window_bytes=window_bytes)
        try:
            connecting = background.submit(learner.connect, 30)
            broker.welcome(lineage=1)
            connecting.result(30)
            resuming = background.submit(learner.resume)
            request_id = broker.body(Resume).request_id
            broker.send(Resumed(request_id=request_id, count=0, returned=0))
            assert resuming.result(30) == 0
            yield LearnerRig(broker, learner, background)
        finally:
            learner.close()


def test_each_trajectory_of_a_delivery_counts_in_the_window() -> None:
    sizes = (4, 40, 400, 4000)
    trajectories = [make(f"a{num_tokens}", num_tokens) for num_tokens in sizes]
    num_bytes = TOKEN_BYTES * sum(sizes)
    with resumed(window=8, window_bytes=1 << 20) as rig:
        assert rig.credit() == (8, 1 << 20)
        rig.deliver(*trajectories)
        assert rig.receive(1) == ["a4"]
        asked = rig.ask_status()  # one of eight is less than a quarter: no credit for that
        rig.answer_status(asked)
        assert rig.receive(1) == ["a40"]
        left = TOKEN_BYTES * (400 + 4000)
        assert rig.credit() == (4 + 8 - 2, num_bytes + (1 << 20) - left)
        rig.broker.send(Dead(ticket_id="dead", group_id="g", mode=Mode.TRAIN, error="no sandbox"))
        assert rig.receive(2) == ["a400", "a4000"]
        assert rig.learner.receive(30) == DeadLetter("dead", "g", Mode.TRAIN, "no sandbox")
        while (credit := rig.credit()) != (5 + 8, num_bytes + (1 << 20)):
            assert credit < (5 + 8, num_bytes + (1 << 20))


def test_what_is_held_already_is_dropped_from_a_delivery_and_the_rest_is_taken() -> None:
    with resumed(window=4, window_bytes=1 << 20) as rig:
        assert rig.credit()[0] == 4
        rig.deliver(make("a1"), make("a2"))
        assert rig.receive(2) == ["a1", "a2"]
        resume = rig.reconnect()
        assert sorted(resume.held) == ["a1", "a2"]
        rig.broker.send(Resumed(request_id=resume.request_id, count=0, returned=0))
        assert rig.credit()[0] == 4
        rig.deliver(make("a2"), make("a3"), make("a1"))
        assert rig.receive(1) == ["a3"]
        assert rig.learner.receive(0) is None


def test_no_more_is_held_than_a_resume_can_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.client.learner.MAX_IDS", 6)
    with resumed(window=4, window_bytes=1 << 20) as rig:
        assert rig.credit()[0] == 4
        rig.deliver(*(make(f"a{number}") for number in range(4)))
        assert len(rig.receive(4)) == 4
        while rig.credit()[0] < 6:  # and never more, or the next message would be another CREDIT
            pass
        rig.deliver(make("a4"), make("a5"))
        assert len(rig.receive(2)) == 2
        assert rig.learner.full
        rig.answer_status(rig.ask_status())

        resume = rig.reconnect()
        assert sorted(resume.held) == [f"a{number}" for number in range(6)]
        rig.broker.send(Resumed(request_id=resume.request_id, count=0, returned=0))
        assert rig.credit() == (0, 1 << 20)
        rig.ack("a0", "a1", "a2")
        assert not rig.learner.full
        assert rig.credit()[0] == 3
        rig.deliver(make("b1"))
        assert rig.receive(1) == ["b1"]
        rig.answer_status(rig.ask_status())


def test_a_request_that_the_broker_would_refuse_is_not_sent() -> None:
    with resumed(window=4, window_bytes=1 << 20) as rig:
        rig.credit()
        with pytest.raises(ProtocolError, match=r"ISSUE: tickets\[1\]\.ticket_id is ''"):
            rig.learner.issue([make_ticket("a1"), make_ticket("")])
        rig.answer_status(rig.ask_status())
