"""Results on their way through: kept in memory from the commit that stored them until they are delivered.

Spares the store a read where the learner is waiting already. Only a shortcut: bounded in bytes, empty after a restart,
and whatever is not here is read from the store.
"""

from __future__ import annotations

from typing import Final

from broker.protocol.commands import Deliver
from broker.protocol.frames import Message

MAX_BYTES: Final = 64 << 20


class FreshResults:
    """DELIVER messages by ticket id. Results go out in the order of their arrival, so the oldest are kept."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._messages: dict[str, Message] = {}

    def add(self, ticket_id: str, trajectory: Message) -> None:
        """A TRAJECTORY was stored. It refers to the frames that it came in, and copies nothing."""
        self.discard(ticket_id)
        num_bytes = trajectory.array_bytes
        if self._num_bytes + num_bytes <= self._max_bytes:
            self._messages[ticket_id] = Message(Deliver.COMMAND, trajectory.body, trajectory.arrays)
            self._num_bytes += num_bytes

    def take(self, ticket_id: str) -> Message | None:
        """The DELIVER of a ticket, once; None where it is not here."""
        message = self._messages.pop(ticket_id, None)
        if message is not None:
            self._num_bytes -= message.array_bytes
        return message

    def discard(self, ticket_id: str) -> None:
        """This result is not to be delivered any more, or is another one now."""
        self.take(ticket_id)

    def clear(self) -> None:
        """The store took nothing of this round, or the order of delivery has changed."""
        self._messages.clear()
        self._num_bytes = 0
