"""What one round of the server has caused: written together, and told to nobody before it is durable. Data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from broker.exchange.outbox import Outbox
from broker.exchange.peers import Peer
from broker.ledger.events import Deliver, GoOn
from broker.protocol.frames import Frame, Message
from broker.store.journal import JournalAction


class Write(NamedTuple):
    """An action for the journal. `frames`, `message` and `num_items`: of the parcel that brought it, if one did."""

    action: JournalAction
    frames: Sequence[Frame] = ()
    message: Message | None = None
    num_items: int = 0


class Outgoing(NamedTuple):
    """What a peer is to get over this connection of its: the learner results of the store, or a message in their order;
    an actor a partial of the store."""

    peer: Peer
    item: Deliver | GoOn | Message


@dataclass(slots=True)
class Round:
    """`ended`: tickets that leave the ledger in it, of which the journal does not know yet."""

    writes: list[Write] = field(default_factory=list)
    outbox: Outbox = field(default_factory=Outbox)
    outgoing: list[Outgoing] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    num_bytes: int = 0

    def write(self, write: Write) -> None:
        """Add an action for the journal."""
        self.writes.append(write)
        self.num_bytes += sum(map(len, write.frames))

    def __bool__(self) -> bool:
        return bool(self.writes or self.outgoing or self.outbox)
