"""An actor's side of the experience channel: tickets in, trajectories and partials out, on asyncio.

Owns which leases this process holds and which results are not yet durable; sends them again after every reconnection.
What is asked and handed in within one turn of the event loop travels together. Never runs an episode. The connection's
thread hands everything to the event loop; all state lives on the loop, but for what a reconnection needs at once, which
is guarded by the connection's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Sequence
from typing import Any, Final, cast, get_args

from broker.client.answers import Answers
from broker.client.connection import Connection, ConnectionClosedError
from broker.client.halves import TicketSource, TrajectorySender
from broker.client.leases import Leases
from broker.client.parcels import Parcels
from broker.client.tickets import TicketQueue
from broker.process.lifecycle import ErgonError
from broker.process.security import OPEN, Security
from broker.protocol.commands import (
    Clear,
    Continue,
    Durable,
    ErrorBody,
    HandedOver,
    HandoverStatus,
    Hello,
    Lease,
    Released,
    ReleaseReason,
    Role,
    SendStatus,
    TicketBody,
    Withdrawn,
    parse_body,
)
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.partials import Partial, pack_handover, unpack_continue
from broker.protocol.trajectory import Ticket, Trajectory

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 5.0

SEND_STATUSES: Final = get_args(SendStatus)
HANDOVER_STATUSES: Final = get_args(HandoverStatus)

Answer = SendStatus | HandoverStatus | int


class ActorClient:
    """One actor's connection to the broker. `session` is drawn per process, so that a restarted actor is a new one.

    `tickets` and `sender` are the two halves that the actor's loop uses.
    """

    def __init__(
        self,
        endpoint: str,
        run_id: str,
        actor_id: str,
        *,
        heartbeat_s: float = 1.0,
        liveness: int = 15,
        security: Security = OPEN,
    ) -> None:
        self.actor_id = actor_id
        self.session = uuid.uuid4().hex
        self._endpoint, self._run_id = endpoint, run_id
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: Exception | None = None
        self._failed = asyncio.Event()
        self._connection = Connection(
            endpoint,
            hello=self._hello,
            on_welcome=self._on_welcome,
            on_message=self._on_message,
            on_failure=self._on_failure,
            heartbeat=self._heartbeat,
            heartbeat_s=heartbeat_s,
            liveness=liveness,
            name=f"actor-{actor_id}",
            security=security,
        )
        # Guarded by the connection's lock: what `_on_welcome` repeats.
        self._leases = Leases(self._send)
        self._parcels = Parcels()  # results that are not answered
        self._credit = 0  # tickets asked for since HELLO
        self._received = 0  # tickets received since HELLO
        self._epoch = 0  # HELLOs so far
        # On the loop only.
        self._queue = TicketQueue()
        self._answers = Answers[Answer]()
        self._flushing = False  # `_flush` is about to run
        self.tickets = TicketSource(self)
        self.sender = TrajectorySender(self)

    @property
    def leases(self) -> frozenset[str]:
        """Ids of the tickets held."""
        with self._connection.lock:
            return self._leases.ids

    @property
    def connected(self) -> bool:
        """Whether the broker answers at present."""
        return self._connection.connected

    async def connect(self, timeout_s: float = 60.0) -> None:
        """Say HELLO and wait for the WELCOME. Raises ErgonError where the broker refuses or does not answer in time."""
        self._loop = asyncio.get_running_loop()
        self._connection.start()
        try:
            await asyncio.to_thread(self._connection.wait_welcome, timeout_s)
        except ProtocolError as error:
            await asyncio.to_thread(self._connection.close)
            raise ErgonError(f"the broker at {self._endpoint} refuses this actor: {error.message}") from error
        except ErgonError:
            await asyncio.to_thread(self._connection.close)
            raise

    async def lease(self) -> Ticket:
        """The next ticket; waits for one. Cancelling the wait loses no ticket: the next call gets it."""
        self._check()
        return await self._queue.get(self._flush_soon)

    async def withdrawn(self, ticket_id: str) -> None:
        """Wait until the result of a ticket that was leased here is not wanted any more. It is held no more then."""
        if ticket_id in self.leases:
            await self._queue.withdrawn(ticket_id)

    def take_partial(self, ticket_id: str) -> Partial | None:
        """What another actor has begun of a ticket that was leased here, once; None where its episode begins anew."""
        with self._connection.lock:
            return self._leases.take_partial(ticket_id)

    async def send(self, trajectory: Trajectory) -> SendStatus:
        """Hand in the result of a ticket; returns when it is durable, however often the broker restarts meanwhile.
        Results of other tickets that are handed in at the same time may share its message, and never its fate.

        "accepted"; "late": taken although the lease had run out; "duplicate": another result was there before;
        "unwanted": the ticket was cancelled or is dead. Raises ProtocolError where the trajectory is not well-formed,
        ErgonError where the connection has ended for good.
        """
        ticket_id = trajectory.ticket.ticket_id
        if ticket_id in self._answers:
            raise ValueError(f"the trajectory of ticket {ticket_id} is being sent already")
        try:
            self._check()
            with self._answers.expect(ticket_id) as answer:
                with self._connection.lock:
                    self._parcels.add(trajectory)
                self._flush_soon()
                status = await answer
        finally:
            with self._connection.lock:
                self._parcels.discard(ticket_id)
                self._leases.forget((ticket_id,))
        assert status in SEND_STATUSES
        return cast(SendStatus, status)

    async def hand_over(self, ticket_id: str, partial: Partial) -> HandoverStatus:
        """Give a lease back, at no cost, with what its episode is so far; another actor may go on with it.

        "kept": that is durable; "refused": the broker has no room, the lease is given back without it; "unwanted": the
        lease had run out, or the ticket was withdrawn. Waits up to RELEASE_TIMEOUT_S for the broker's answer, and is
        "unwanted" without one: the lease runs out by itself. Raises ProtocolError where the partial is not well-formed,
        ErgonError where the connection has ended for good; the lease is held then as before.
        """
        self._check()
        message = pack_handover(ticket_id, partial)
        try:
            with self._answers.expect(ticket_id) as answer:
                with self._connection.lock:
                    self._leases.hand_over(ticket_id, message)
                async with asyncio.timeout(RELEASE_TIMEOUT_S):
                    status = await answer
        except TimeoutError:
            log.warning("Handover not answered; the lease will run out. ticket=%s", ticket_id)
            status = "unwanted"
            with self._connection.lock:
                self._leases.forget((ticket_id,))
        finally:
            with self._connection.lock:
                self._leases.keep(ticket_id)
        assert status in HANDOVER_STATUSES
        return cast(HandoverStatus, status)

    async def release(self, ticket_id: str, reason: ReleaseReason, error: str = "") -> None:
        """Give a lease back: "drain" costs the ticket no attempt, "infra_failure" costs one.

        Waits up to RELEASE_TIMEOUT_S for the broker's answer; without one the lease runs out by itself.
        """
        if ticket_id in self.leases:
            await self._release((ticket_id,), reason, error)

    async def close(self) -> None:
        """Give back every lease whose result is not being sent, and end the connection. Idempotent."""
        self._send_results()
        held = tuple(key for key in self.leases if key not in self._answers)
        if held and self._failure is None and self._connection.connected:
            await self._release(held, "drain", "")
        await asyncio.to_thread(self._connection.close)
        self._fail(ErgonError("this actor's connection to the broker was closed"))

    async def _release(self, ticket_ids: tuple[str, ...], reason: ReleaseReason, error: str) -> None:
        self._check()
        request_id = uuid.uuid4().hex
        try:
            with self._answers.expect(request_id) as answer:
                with self._connection.lock:
                    self._leases.release(request_id, ticket_ids, reason, error[:4096])
                async with asyncio.timeout(RELEASE_TIMEOUT_S):
                    await answer
        except TimeoutError:
            log.warning("Release not answered; the leases will run out. tickets=%d", len(ticket_ids))
        finally:
            with self._connection.lock:
                self._leases.released(request_id)

    # --- on the loop

    def _send(self, message: Message) -> None:
        with contextlib.suppress(ConnectionClosedError):  # _on_failure and close() tell everybody who waits
            self._connection.send(message)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _flush_soon(self) -> None:
        """Send results and ask for tickets, together with what others are about to at this very moment."""
        if not self._flushing:
            assert self._loop is not None, "connect() comes first"
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._send_results()
        self._ask()

    def _send_results(self) -> None:
        with self._connection.lock:
            for message in self._parcels.take():
                self._send(message)

    def _ask(self) -> None:
        """Ask for as many tickets as calls wait for; the credit is counted since HELLO."""
        with self._connection.lock:
            wanted = self._received + self._queue.num_wanted
            if wanted > self._credit:
                self._credit = wanted
                self._send(Lease(credit=wanted).pack())

    def _take(self, num: int, new: Sequence[Ticket], epoch: int) -> None:
        """So many tickets came, of which these are new: a ticket that is being run here still, though its lease had run
        out, is not run twice."""
        with self._connection.lock:
            if epoch == self._epoch:
                self._received += num
        for ticket in new:
            self._queue.put(ticket)
        if len(new) < num:
            self._ask()

    def _settle_all(self, results: Sequence[tuple[str, SendStatus]]) -> None:
        for ticket_id, status in results:
            self._answers.settle(ticket_id, status)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._failed.set()
        self._queue.fail(self._failure)
        self._answers.fail(self._failure)

    async def wait_failed(self) -> Exception:
        """Wait until the connection has ended for good, and return why."""
        await self._failed.wait()
        assert self._failure is not None
        return self._failure

    # --- in the connection's thread

    def _post(self, callback: Any, *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: the process ends without having closed this client
            log.debug("Message dropped. reason=the event loop is closed")

    def _hello(self) -> Message:
        return Hello(role=Role.ACTOR, peer_id=self.actor_id, run_id=self._run_id, session=self.session).pack()

    def _heartbeat(self) -> Message:
        with self._connection.lock:
            return self._leases.heartbeat()

    def _on_welcome(self, _welcome: Message, _first: bool) -> None:
        self._leases.say_again()
        for message in self._parcels.again():
            self._send(message)
        self._leases.give_back_again()
        self._credit = self._received = 0
        self._epoch += 1
        self._post(self._ask)

    def _on_message(self, message: Message) -> None:
        if message.command == TicketBody.COMMAND:
            self._on_tickets([(ticket, None) for ticket in parse_body(message, TicketBody).tickets])
        elif message.command == Continue.COMMAND:
            self._on_tickets([unpack_continue(message)])
        elif message.command == Withdrawn.COMMAND:
            with self._connection.lock:
                ids = self._leases.withdraw(parse_body(message, Withdrawn).ticket_ids, self._parcels.__contains__)
            self._post(self._queue.withdraw, ids)
        elif message.command == Clear.COMMAND:
            ticket_id = parse_body(message, Clear).ticket_id
            with self._connection.lock:
                if not self._leases.cleared(ticket_id):
                    self._send(self._parcels.cleared(ticket_id))
        elif message.command == Durable.COMMAND:
            results = parse_body(message, Durable).results
            with self._connection.lock:
                self._parcels.answered(ticket_id for ticket_id, _ in results)
                for message in self._parcels.take():  # what had no room before
                    self._send(message)
            self._post(self._settle_all, results)
        elif message.command in (Released.COMMAND, HandedOver.COMMAND):
            self._on_given_back(message)
        elif message.command == ErrorBody.COMMAND:
            self._on_error(parse_body(message, ErrorBody))
        else:
            raise ProtocolError(ErrorCode.UNKNOWN_COMMAND, f"the broker sent {message.command!r:.40} to an actor")

    def _on_given_back(self, message: Message) -> None:
        """The answer to a RELEASE or HANDOVER, of a former connection perhaps, to which it was answered already."""
        if message.command == Released.COMMAND:
            released = parse_body(message, Released)
            with self._connection.lock:
                self._leases.released(released.request_id)
            self._post(self._answers.settle, released.request_id, released.count)
            return
        handed_over = parse_body(message, HandedOver)
        with self._connection.lock:
            self._leases.handed_over(handed_over.ticket_id)
        self._post(self._answers.settle, handed_over.ticket_id, handed_over.status)

    def _on_tickets(self, tickets: Sequence[tuple[Ticket, Partial | None]]) -> None:
        with self._connection.lock:
            new = self._leases.grant(tickets)
        self._post(self._take, len(tickets), new, self._epoch)

    def _on_error(self, body: ErrorBody) -> None:
        with self._connection.lock:
            singles = self._parcels.refused(body.about)
            for message in singles or ():
                self._send(message)
        if singles is None:
            log.error("The broker refused a message. about=%s code=%s reason=%s", body.about, body.code, body.message)
            self._post(self._answers.settle, body.about, ProtocolError(body.known_code, body.message))
        else:
            log.warning("A parcel was refused; its items go alone. num=%d reason=%s", len(singles), body.message)

    def _on_failure(self, error: Exception) -> None:
        failure = ErgonError(f"the connection to the broker at {self._endpoint} has failed: {error}")
        failure.__cause__ = error
        self._post(self._fail, failure)
