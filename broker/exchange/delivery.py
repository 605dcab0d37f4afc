"""What goes to the learner: parcels from memory or from the store, as far as its credit and the network allow.

Owns the choice of bytes: a parcel that goes out whole is passed on as it came, one that goes out in part is cut. Never
decides what is delivered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from broker.exchange.dispatch import Request
from broker.exchange.executor import Executor
from broker.exchange.outflow import Run
from broker.exchange.peers import Peer, Peers
from broker.ledger.events import Damaged
from broker.protocol.codec import pick
from broker.protocol.commands import Deliver, parse_body
from broker.protocol.frames import Message
from broker.store.blobs import DamagedError
from broker.store.journal import Journal
from broker.store.parcels import Place

log = logging.getLogger(__name__)


class Delivery:
    """The way from the store to the learner."""

    def __init__(self, journal: Journal, peers: Peers, executor: Executor, max_queued_bytes: int) -> None:
        self._journal, self._peers, self._executor = journal, peers, executor
        self._max_queued_bytes = max_queued_bytes

    def blocked(self) -> bool:
        """Whether a result waits for the network, which does not wake the loop when it is ready."""
        learner = self._peers.learner()
        return learner is not None and learner.outflow.blocked(self._max_queued_bytes)

    def deliver(self, send: Callable[[bytes, Message], bool]) -> None:
        """Send the learner what waits for it."""
        learner = self._peers.learner()
        while learner is not None and (item := learner.outflow.next(self._max_queued_bytes)) is not None:
            message = self._load(learner, item) if isinstance(item, Run) else item
            if message is None:
                continue
            if not send(learner.routing, message):
                return
            learner.outflow.sent(message)

    def _load(self, learner: Peer, run: Run) -> Message | None:
        """The DELIVER of a run; None where nothing is left of it: acked meanwhile, or damaged, and so issued again."""
        place = self._journal.place
        indexes = [i for i, key in zip(run.indexes, run.ticket_ids, strict=True) if place(key) == Place(run.parcel, i)]
        if not indexes:
            return None
        fresh = self._executor.fresh.get(run.parcel)
        if fresh is not None:
            message, num_items = fresh.message, fresh.num_items
            if indexes[-1] == num_items - 1:
                self._executor.fresh.discard(run.parcel)
            if len(indexes) == num_items:
                return Message(Deliver.COMMAND, message.body, message.arrays, message.raw)
        else:
            try:
                message = self._journal.load(run.parcel)
            except DamagedError as error:
                self._damaged(learner, run, error)
                return None
        content = parse_body(message, Deliver)
        if len(indexes) == len(content.items):
            return Message(Deliver.COMMAND, message.body, message.arrays, message.raw)
        return pick(message, content, indexes)

    def _damaged(self, learner: Peer, run: Run, error: DamagedError) -> None:
        for ticket_id in run.ticket_ids:
            log.error(
                "A stored trajectory is damaged; its ticket is issued again. ticket=%s error=%s", ticket_id, error
            )
            self._executor.execute(Request(Damaged(learner.session, ticket_id)))
