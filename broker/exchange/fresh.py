"""Parcels on their way through: kept in memory from the commit that stored them until they are delivered.

Spares the store a read where the learner is waiting already. Only a shortcut: bounded in bytes, empty after a restart,
and whatever is not here is read from the store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from broker.protocol.frames import Message


class Fresh(NamedTuple):
    """A TRAJECTORY message as it came, how many trajectories it carries, and which tickets have their result in it."""

    message: Message
    num_items: int
    ticket_ids: tuple[str, ...]
    num_bytes: int


class FreshParcels:
    """TRAJECTORY messages by their number in the store. Results go out in the order of their arrival, so the oldest are
    kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._parcels: dict[int, Fresh] = {}

    def add(self, parcel: int, message: Message, num_items: int, ticket_ids: tuple[str, ...]) -> None:
        """A parcel was stored. The message refers to the frames that it came in; nothing is copied."""
        num_bytes = message.array_bytes + len(memoryview(message.body))
        if self._num_bytes + num_bytes <= self._max_bytes:
            self._parcels[parcel] = Fresh(message, num_items, ticket_ids, num_bytes)
            self._num_bytes += num_bytes

    def get(self, parcel: int) -> Fresh | None:
        """A parcel, None where it is not here."""
        return self._parcels.get(parcel)

    def discard(self, parcel: int) -> None:
        """A parcel that is not to be delivered any more."""
        fresh = self._parcels.pop(parcel, None)
        if fresh is not None:
            self._num_bytes -= fresh.num_bytes

    def retain(self, parcel_of: Callable[[str], int | None]) -> None:
        """Discard the parcels that hold no result any more: their tickets ended without a delivery.

        `parcel_of`: where the result of a ticket lies in the store."""
        for parcel, fresh in list(self._parcels.items()):
            if all(parcel_of(ticket_id) != parcel for ticket_id in fresh.ticket_ids):
                self.discard(parcel)

    def clear(self) -> None:
        """The store took nothing of this round."""
        self._parcels.clear()
        self._num_bytes = 0
