"""The results that an actor has finished and the broker has not yet answered, and the messages that carry them.

Small results that are handed in together travel together; a large one is offered first and travels alone. Owns which
results wait for an answer, and how many bytes of them may be on their way; never sends, never waits, never looks at a
ticket's state. Not thread-safe: whoever owns it guards it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from broker.protocol.codec import pack_trajectories
from broker.protocol.commands import MAX_ITEMS, OFFER_BYTES, PARCEL_BYTES, Offer
from broker.protocol.frames import Message
from broker.protocol.trajectory import Trajectory

# What a broker has not answered it may have to hold. Beyond this, results wait here and travel in fuller parcels.
WINDOW_BYTES: Final = 2 * PARCEL_BYTES


class _Result(NamedTuple):
    """The trajectory itself is kept, and packed anew for each sending: a message would hold its tokens once more."""

    trajectory: Trajectory
    array_bytes: int
    body_bytes: int

    @property
    def num_bytes(self) -> int:
        """Heads count like arrays, so that a parcel keeps the bound of an envelope too."""
        return self.array_bytes + self.body_bytes

    @property
    def large(self) -> bool:
        """Whether it is offered before it is sent."""
        return self.array_bytes > OFFER_BYTES


class Parcels:
    """The unanswered results of one actor, by ticket."""

    def __init__(self) -> None:
        self._results: dict[str, _Result] = {}
        self._fresh: dict[str, None] = {}  # ids that are in no message yet, in order
        self._on_the_way: dict[str, int] = {}  # bytes of those that were sent without being asked for
        self._num_bytes = 0  # of them all
        # Ids of the parcels of several that are on their way, by the first one, which an ERROR names.
        self._sent: dict[str, tuple[str, ...]] = {}

    def __contains__(self, ticket_id: str) -> bool:
        return ticket_id in self._results

    def add(self, trajectory: Trajectory) -> None:
        """A result to be sent. Raises ProtocolError where it is not well-formed; it is not taken then."""
        message = pack_trajectories((trajectory,))
        ticket_id = trajectory.ticket.ticket_id
        self._results[ticket_id] = _Result(trajectory, message.array_bytes, len(message.body))
        self._fresh[ticket_id] = None

    def discard(self, ticket_id: str) -> None:
        """Nobody waits for the answer any more, or it has come."""
        self._results.pop(ticket_id, None)
        self._num_bytes -= self._on_the_way.pop(ticket_id, 0)

    def take(self) -> list[Message]:
        """The messages that carry what was added since and what had no room; what has none now waits for the next
        call, which is due after `answered`."""
        messages: list[Message] = []
        parcel: list[str] = []
        room = PARCEL_BYTES
        for ticket_id in list(self._fresh):
            result = self._results.get(ticket_id)
            if result is None:
                del self._fresh[ticket_id]
            elif result.large:
                del self._fresh[ticket_id]
                messages.append(Offer(ticket_id=ticket_id, num_bytes=result.array_bytes).pack())
            elif self._num_bytes < WINDOW_BYTES:
                del self._fresh[ticket_id]
                if parcel and (len(parcel) == MAX_ITEMS or result.num_bytes > room):
                    messages.append(self._parcel(parcel))
                    parcel, room = [], PARCEL_BYTES
                parcel.append(ticket_id)
                room -= result.num_bytes
                self._on_the_way[ticket_id] = result.num_bytes
                self._num_bytes += result.num_bytes
        if parcel:
            messages.append(self._parcel(parcel))
        return messages

    def again(self) -> list[Message]:
        """The messages of a new connection: what is unanswered, as far as there is room."""
        self._fresh = dict.fromkeys(self._results)
        self._sent.clear()
        self._on_the_way.clear()
        self._num_bytes = 0
        return self.take()

    def cleared(self, ticket_id: str) -> Message:
        """The answer to a CLEAR: the large result, or the OFFER of nothing where it is not to be sent any more."""
        result = self._results.get(ticket_id)
        if result is None or not result.large:
            return Offer(ticket_id=ticket_id, num_bytes=0).pack()
        return pack_trajectories((result.trajectory,))

    def answered(self, ticket_ids: Iterable[str]) -> None:
        """These need no repeating."""
        for ticket_id in ticket_ids:
            self.discard(ticket_id)
        self._sent = {first: ids for first, ids in self._sent.items() if any(key in self._results for key in ids)}

    def refused(self, about: str) -> list[Message] | None:
        """What an ERROR about this ticket calls for: the items of the parcel that began with it, each alone, because
        one of them may be to blame for all. None where the result travelled alone: it is the one."""
        ids = self._sent.pop(about, None)
        if ids is None:
            return None
        return [self._parcel((ticket_id,)) for ticket_id in dict.fromkeys(ids) if ticket_id in self._results]

    def _parcel(self, ticket_ids: Iterable[str]) -> Message:
        ids = tuple(ticket_ids)
        if len(ids) > 1:
            # A send that was given up and begun again may put a ticket first twice: an ERROR is then about either.
            self._sent[ids[0]] = (*self._sent.get(ids[0], ()), *ids)
        return pack_trajectories([self._results[ticket_id].trajectory for ticket_id in ids])
