"""An actor's side of the experience channel: tickets in, trajectories out, on asyncio.

Owns which leases this process holds and which results are not yet durable; sends them again after every reconnection.
Never runs an episode. The connection's thread hands everything to the event loop; all state lives on the loop, but for
what a reconnection needs at once, which is guarded by the connection's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import deque
from typing import Any

from broker.client.connection import Connection, ConnectionClosedError
from broker.process.lifecycle import ErgonError
from broker.process.security import OPEN, Security
from broker.protocol.codec import trajectory_to_message
from broker.protocol.commands import (
    OFFER_BYTES,
    Clear,
    Durable,
    ErrorBody,
    Heartbeat,
    Hello,
    Lease,
    Offer,
    Release,
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
from broker.protocol.trajectory import Ticket, Trajectory

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 5.0


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
        self._held: dict[str, Ticket] = {}  # leased, and not yet durable or given back
        self._unanswered: dict[str, Message] = {}  # results by ticket id, releases by request id
        self._offered: dict[str, Message] = {}  # large results, whose OFFER is what is repeated
        self._credit = 0  # tickets asked for since HELLO
        self._received = 0  # tickets received since HELLO
        self._epoch = 0  # HELLOs so far
        # On the loop only.
        self._ready: deque[Ticket] = deque()
        self._waiting: deque[asyncio.Future[Ticket]] = deque()
        self._answers: dict[str, asyncio.Future[SendStatus | int]] = {}
        self._withdrawn: dict[str, asyncio.Event] = {}  # of tickets that somebody waits for to be withdrawn
        self.tickets = TicketSource(self)
        self.sender = TrajectorySender(self)

    @property
    def leases(self) -> frozenset[str]:
        """Ids of the tickets held."""
        with self._connection.lock:
            return frozenset(self._held)

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
        if self._ready:
            return self._ready.popleft()
        assert self._loop is not None, "connect() comes first"
        future: asyncio.Future[Ticket] = self._loop.create_future()
        self._waiting.append(future)
        self._ask()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._hand_out(future.result())  # it came in the very moment of the cancellation
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(future)

    async def withdrawn(self, ticket_id: str) -> None:
        """Wait until the result of a ticket that was leased here is not wanted any more. It is held no more then."""
        if ticket_id not in self.leases:
            return
        event = self._withdrawn.setdefault(ticket_id, asyncio.Event())
        try:
            await event.wait()
        finally:
            self._withdrawn.pop(ticket_id, None)

    async def send(self, trajectory: Trajectory) -> SendStatus:
        """Hand in the result of a ticket; returns when it is durable, however often the broker restarts meanwhile.

        "accepted"; "late": taken although the lease had run out; "duplicate": another result was there before;
        "unwanted": the ticket was cancelled or is dead. Raises ProtocolError where the trajectory is not well-formed,
        ErgonError where the connection has ended for good.
        """
        ticket_id = trajectory.ticket.ticket_id
        if ticket_id in self._answers:
            raise ValueError(f"the trajectory of ticket {ticket_id} is being sent already")
        try:
            message = trajectory_to_message(trajectory)
            if message.array_bytes > OFFER_BYTES:  # the broker says when it has room for it
                with self._connection.lock:
                    self._offered[ticket_id] = message
                message = Offer(ticket_id=ticket_id, num_bytes=message.array_bytes).pack()
            status = await self._request(ticket_id, message)
        finally:
            with self._connection.lock:
                self._offered.pop(ticket_id, None)
                self._held.pop(ticket_id, None)
        assert isinstance(status, str)
        return status

    async def release(self, ticket_id: str, reason: ReleaseReason, error: str = "") -> None:
        """Give a lease back: "drain" costs the ticket no attempt, "infra_failure" costs one.

        Waits up to RELEASE_TIMEOUT_S for the broker's answer; without one the lease runs out by itself.
        """
        if ticket_id in self.leases:
            await self._release((ticket_id,), reason, error)

    async def close(self) -> None:
        """Give back every lease whose result is not being sent, and end the connection. Idempotent."""
        held = tuple(key for key in self.leases if key not in self._answers)
        if held and self._failure is None and self._connection.connected:
            await self._release(held, "drain", "")
        await asyncio.to_thread(self._connection.close)
        self._fail_waiters(ErgonError("this actor's connection to the broker was closed"))

    async def _release(self, ticket_ids: tuple[str, ...], reason: ReleaseReason, error: str) -> None:
        request_id = uuid.uuid4().hex
        body = Release(request_id=request_id, ticket_ids=ticket_ids, reason=reason, error=error[:4096])
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                await self._request(request_id, body.pack())
        except TimeoutError:
            log.warning("Release not answered; the leases will run out. tickets=%d", len(ticket_ids))
        finally:
            with self._connection.lock:
                for ticket_id in ticket_ids:
                    self._held.pop(ticket_id, None)

    async def _request(self, key: str, message: Message) -> SendStatus | int:
        """Send a message and wait for its answer, over reconnections."""
        self._check()
        assert self._loop is not None, "connect() comes first"
        future: asyncio.Future[SendStatus | int] = self._loop.create_future()
        self._answers[key] = future
        with self._connection.lock:
            self._unanswered[key] = message
            self._send(message)
        try:
            return await future
        finally:
            del self._answers[key]
            with self._connection.lock:
                del self._unanswered[key]

    # --- on the loop

    def _send(self, message: Message) -> None:
        with contextlib.suppress(ConnectionClosedError):  # _on_failure and close() tell everybody who waits
            self._connection.send(message)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _ask(self) -> None:
        """Ask for as many tickets as calls wait for; the credit is counted since HELLO."""
        with self._connection.lock:
            wanted = self._received + len(self._waiting) - len(self._ready)
            if wanted > self._credit:
                self._credit = wanted
                self._send(Lease(credit=wanted).pack())

    def _take(self, ticket: Ticket, epoch: int, held_already: bool) -> None:
        with self._connection.lock:
            self._received += epoch == self._epoch
        # A ticket that is being run here still, though its lease had run out, is not run twice.
        self._ask() if held_already else self._hand_out(ticket)

    def _withdraw(self, ticket_ids: tuple[str, ...]) -> None:
        for ticket in [ticket for ticket in self._ready if ticket.ticket_id in ticket_ids]:
            self._ready.remove(ticket)
        for ticket_id in ticket_ids:
            if ticket_id in self._withdrawn:
                self._withdrawn[ticket_id].set()

    def _hand_out(self, ticket: Ticket) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(ticket)
                return
        self._ready.append(ticket)

    def _settle(self, key: str, outcome: SendStatus | int | Exception) -> None:
        future = self._answers.get(key)
        if future is None or future.done():
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _fail_waiters(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._failed.set()
        futures: list[asyncio.Future[Any]] = [*self._waiting, *self._answers.values()]
        for future in futures:
            if not future.done():
                future.set_exception(self._failure)

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

    def _hello(self) -> dict[str, Any]:
        return Hello(role=Role.ACTOR, peer_id=self.actor_id, run_id=self._run_id, session=self.session).pack().body

    def _heartbeat(self) -> Message:
        with self._connection.lock:
            return Heartbeat(leases=tuple(self._held)).pack()

    def _on_welcome(self, _welcome: dict[str, Any], _first: bool) -> None:
        # Leases first: what the broker granted and this list does not name was lost on the way.
        self._send(self._heartbeat())
        for message in self._unanswered.values():
            self._send(message)
        self._credit = self._received = 0
        self._epoch += 1
        self._post(self._ask)

    def _on_message(self, message: Message) -> None:
        if message.command == TicketBody.COMMAND:
            ticket = parse_body(message, TicketBody).ticket
            with self._connection.lock:
                held_already = ticket.ticket_id in self._held
                self._held[ticket.ticket_id] = ticket
            self._post(self._take, ticket, self._epoch, held_already)
        elif message.command == Withdrawn.COMMAND:
            with self._connection.lock:  # a result on its way will be answered
                ids = [key for key in parse_body(message, Withdrawn).ticket_ids if key not in self._unanswered]
                ids = [key for key in ids if self._held.pop(key, None) is not None]
            self._post(self._withdraw, tuple(ids))
        elif message.command == Clear.COMMAND:
            ticket_id = parse_body(message, Clear).ticket_id
            with self._connection.lock:  # a send that was cancelled meanwhile takes its offer back
                self._send(self._offered.get(ticket_id) or Offer(ticket_id=ticket_id, num_bytes=0).pack())
        elif message.command == Durable.COMMAND:
            durable = parse_body(message, Durable)
            self._post(self._settle, durable.ticket_id, durable.status)
        elif message.command == Released.COMMAND:
            released = parse_body(message, Released)
            self._post(self._settle, released.request_id, released.count)
        elif message.command == ErrorBody.COMMAND:
            body = parse_body(message, ErrorBody)
            log.error("The broker refused a message. about=%s code=%s reason=%s", body.about, body.code, body.message)
            self._post(self._settle, body.about, ProtocolError(body.known_code, body.message))
        else:
            raise ProtocolError(ErrorCode.UNKNOWN_COMMAND, f"the broker sent {message.command!r:.40} to an actor")

    def _on_failure(self, error: Exception) -> None:
        failure = ErgonError(f"the connection to the broker at {self._endpoint} has failed: {error}")
        failure.__cause__ = error
        self._post(self._fail_waiters, failure)


class TicketSource:
    """Where an actor's loop gets its tickets."""

    def __init__(self, client: ActorClient) -> None:
        self._client = client

    async def lease(self) -> Ticket:
        """See ActorClient.lease."""
        return await self._client.lease()

    async def withdrawn(self, ticket_id: str) -> None:
        """See ActorClient.withdrawn."""
        await self._client.withdrawn(ticket_id)

    async def release(self, ticket_id: str, reason: ReleaseReason, error: str = "") -> None:
        """See ActorClient.release."""
        await self._client.release(ticket_id, reason, error)


class TrajectorySender:
    """Where an actor's loop puts its trajectories."""

    def __init__(self, client: ActorClient) -> None:
        self._client = client

    async def send(self, trajectory: Trajectory) -> SendStatus:
        """See ActorClient.send."""
        return await self._client.send(trajectory)
