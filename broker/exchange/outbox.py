"""The answers of one round, kept back until the round is durable. Owns their order and their gathering; never sends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from broker.protocol.commands import MAX_IDS, MAX_TICKETS, Durable, SendStatus, TicketBody
from broker.protocol.frames import Message
from broker.protocol.trajectory import Ticket

Statuses = Sequence[tuple[str, SendStatus]]


class Outbox:
    """Messages by connection. What a peer is told of many results or tickets in one round goes out as one message."""

    def __init__(self) -> None:
        self._messages: list[tuple[bytes, Message]] = []
        self._statuses: dict[bytes, list[tuple[str, SendStatus]]] = {}
        self._tickets: dict[bytes, list[Ticket]] = {}

    def add(self, routing: bytes, message: Message) -> None:
        """A message, after those that were added before."""
        self._messages.append((routing, message))

    def durable(self, routing: bytes, statuses: Statuses) -> None:
        """What became of results. A peer is told after all other messages of the round: it was welcomed by then."""
        self._statuses.setdefault(routing, []).extend(statuses)

    def grant(self, routing: bytes, tickets: Sequence[Ticket]) -> None:
        """Tickets for an actor, after what became of its results."""
        self._tickets.setdefault(routing, []).extend(tickets)

    def take(self) -> Iterator[tuple[bytes, Message]]:
        """Everything, once."""
        messages, statuses, tickets = self._messages, self._statuses, self._tickets
        self._messages, self._statuses, self._tickets = [], {}, {}
        yield from messages
        for routing, results in statuses.items():
            for start in range(0, len(results), MAX_IDS):
                yield routing, Durable(results=tuple(results[start : start + MAX_IDS])).pack()
        for routing, granted in tickets.items():
            for start in range(0, len(granted), MAX_TICKETS_SENT):
                yield routing, TicketBody(tickets=tuple(granted[start : start + MAX_TICKETS_SENT])).pack()

    def __bool__(self) -> bool:
        return bool(self._messages or self._statuses or self._tickets)


MAX_TICKETS_SENT: Final = min(MAX_TICKETS, 512)  # at most 4 KiB each, and an envelope has 4 MiB
