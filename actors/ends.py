"""What the actor's loop needs of the experience channel: where tickets come from, and where trajectories go.

`broker.client` has the real ones; unit tests bring scripted ones. Owns nothing.
"""

from __future__ import annotations

from typing import Protocol

from broker.client import HandoverStatus, ReleaseReason
from broker.protocol.partials import Partial
from broker.protocol.trajectory import Ticket, Trajectory


class Tickets(Protocol):
    """broker.client's TicketSource."""

    async def lease(self) -> Ticket:
        """Wait for a ticket; its lease is renewed until it is sent or released."""
        ...

    def take_partial(self, ticket_id: str) -> Partial | None:
        """What another actor has begun of a leased ticket, once."""
        ...

    async def hand_over(self, ticket_id: str, partial: Partial) -> HandoverStatus:
        """Give a lease back with what its episode is so far."""
        ...

    async def withdrawn(self, ticket_id: str) -> None:
        """Wait until the result of a leased ticket is not wanted any more."""
        ...

    async def release(self, ticket_id: str, reason: ReleaseReason, error: str = "") -> None:
        """Give a lease back."""
        ...


class Sender(Protocol):
    """broker.client's TrajectorySender."""

    async def send(self, trajectory: Trajectory) -> str:
        """Hand over a trajectory; returns its status once it is durable."""
        ...
