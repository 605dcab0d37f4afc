"""The leases that an actor holds, and those that it is giving back: what it says of them, and says again.

Owns which tickets a heartbeat names, and the messages that give leases back until they are answered. Knows no event
loop and no thread: whoever holds the connection's lock calls, and `send` puts a message on that connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from broker.protocol.commands import OFFER_BYTES, Heartbeat, Offer, Release, ReleaseReason, check
from broker.protocol.frames import Message
from broker.protocol.partials import Partial
from broker.protocol.trajectory import Ticket


class Leases:
    """Of one process, over all its connections."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send
        # Not yet durable or given back; with what another actor has begun of it until it is asked for.
        self._held: dict[str, Partial | None] = {}
        self._handovers: dict[str, Message] = {}  # unanswered, by ticket id
        self._releases: dict[str, tuple[tuple[str, ...], Message]] = {}  # unanswered, by request id
        self._given_back: set[str] = set()  # on this connection, unanswered: a heartbeat would take them back

    @property
    def ids(self) -> frozenset[str]:
        """Tickets held."""
        return frozenset(self._held)

    def grant(self, tickets: Iterable[tuple[Ticket, Partial | None]]) -> list[Ticket]:
        """These have come: those that were not held yet."""
        new = []
        for ticket, partial in tickets:
            if ticket.ticket_id not in self._held:
                new.append(ticket)
                self._held[ticket.ticket_id] = partial
        return new

    def take_partial(self, ticket_id: str) -> Partial | None:
        """What another actor has begun of this ticket, once."""
        partial = self._held.get(ticket_id)
        if partial is not None:
            self._held[ticket_id] = None
        return partial

    def forget(self, ticket_ids: Iterable[str]) -> None:
        """These are held no more: before a TICKET is read that may bring one of them again."""
        for ticket_id in ticket_ids:
            self._held.pop(ticket_id, None)
            self._given_back.discard(ticket_id)

    def heartbeat(self) -> Message:
        """The leases that are to be renewed."""
        return Heartbeat(leases=tuple(key for key in self._held if key not in self._given_back)).pack()

    def say_again(self) -> None:
        """A new connection: leases first, for what the broker granted and this list does not name was lost on the
        way; `give_back_again` is due."""
        self._given_back.clear()
        self._send(self.heartbeat())

    def give_back_again(self) -> None:
        """Repeat what gives leases back and was not answered."""
        for ticket_id in self._handovers:
            self._hand_over(ticket_id)
        for request_id in self._releases:
            self._release(request_id)

    # --- giving back

    def release(self, request_id: str, ticket_ids: tuple[str, ...], reason: ReleaseReason, error: str) -> None:
        """Give these back. Raises ProtocolError where that is not well-formed."""
        body = Release(request_id=request_id, ticket_ids=ticket_ids, reason=reason, error=error)
        self._releases[request_id] = ticket_ids, check(body).pack()
        self._release(request_id)

    def released(self, request_id: str) -> None:
        """That was answered, or nobody waits for an answer any more: these run out by themselves. Idempotent."""
        self.forget(self._releases.pop(request_id, ((), None))[0])

    def hand_over(self, ticket_id: str, message: Message) -> None:
        """Give this one back with what its episode is so far. A large partial is offered first, as a large trajectory
        is."""
        self._handovers[ticket_id] = message
        self._hand_over(ticket_id)

    def cleared(self, ticket_id: str) -> bool:
        """The broker has room for what was offered: whether that was a partial, which is sent then."""
        if ticket_id not in self._handovers:
            return False
        self._hand_over(ticket_id, cleared=True)
        return True

    def handed_over(self, ticket_id: str) -> None:
        """That was answered. Idempotent."""
        if self._handovers.pop(ticket_id, None) is not None:
            self.forget((ticket_id,))

    def keep(self, ticket_id: str) -> None:
        """A handover that was not answered was refused, or given up: the lease, where it is held, is as before."""
        if self._handovers.pop(ticket_id, None) is not None:
            self._given_back.discard(ticket_id)

    def withdraw(self, named: Sequence[str], sending: Callable[[str], bool]) -> list[str]:
        """The broker wants no results of these: which were held, but for those whose result is on its way, which will
        be answered."""
        ids = [key for key in named if key in self._held and not sending(key)]
        self.forget(ids)
        return ids

    def _hand_over(self, ticket_id: str, *, cleared: bool = False) -> None:
        message = self._handovers[ticket_id]
        if message.array_bytes > OFFER_BYTES and not cleared:
            self._send(Offer(ticket_id=ticket_id, num_bytes=message.array_bytes).pack())
        else:
            self._given_back.add(ticket_id)
            self._send(message)

    def _release(self, request_id: str) -> None:
        ticket_ids, message = self._releases[request_id]
        self._given_back.update(ticket_ids)
        self._send(message)
