"""The two halves of an actor's client that its loop uses: where its tickets come from, where its trajectories go.

Own nothing: both are the client, seen from one side each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.protocol.commands import HandoverStatus, ReleaseReason, SendStatus
from broker.protocol.partials import Partial
from broker.protocol.trajectory import Ticket, Trajectory

if TYPE_CHECKING:
    from broker.client.actor import ActorClient


class TicketSource:
    """Where an actor's loop gets its tickets."""

    def __init__(self, client: ActorClient) -> None:
        self._client = client

    async def lease(self) -> Ticket:
        """See ActorClient.lease."""
        return await self._client.lease()

    def take_partial(self, ticket_id: str) -> Partial | None:
        """See ActorClient.take_partial."""
        return self._client.take_partial(ticket_id)

    async def hand_over(self, ticket_id: str, partial: Partial) -> HandoverStatus:
        """See ActorClient.hand_over."""
        return await self._client.hand_over(ticket_id, partial)

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
