"""Carries out what the ledger decides: journal, answers, deliveries, metrics.

Owns the ledger, the round that is being gathered and the one that is being written. Nothing leaves from here before the
round that caused it is durable.

Rounds overlap: while one is written, the next is gathered, so the processor does not wait for the disk. They are
written and told in their order. The ledger is ahead of the store by these two rounds; who needs the store's word of
what they changed waits for them (`barrier`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from broker.exchange import metrics
from broker.exchange.committer import Committer
from broker.exchange.dispatch import Request
from broker.exchange.drift import DriftMonitor
from broker.exchange.fresh import FreshParcels
from broker.exchange.peers import Peer, Peers
from broker.exchange.rounds import Outgoing, Round, Write
from broker.ledger.events import (
    AnnounceDead,
    Count,
    Deliver,
    Finished,
    GoOn,
    Grant,
    JournalEnds,
    JournalPartial,
    JournalRecall,
    JournalResults,
    PartialLost,
    PeerGone,
    Reply,
    Results,
    Settle,
    Settled,
    Withdraw,
)
from broker.ledger.ledger import Ledger
from broker.process.settings import BrokerSection
from broker.protocol import commands as wire
from broker.protocol.frames import Frame, Message
from broker.protocol.partials import pack_continue
from broker.protocol.trajectory import Ticket
from broker.store.blobs import DamagedError
from broker.store.journal import Journal, StoreFullError

log = logging.getLogger(__name__)

ROUND_BYTES = 64 << 20  # gathered at most while another round is written
FRESH_SHARE = 2  # of what may be on its way to the learner: as much may wait for it in memory
GRACE_HEARTBEATS = 2  # after a restart, for actors to name the leases they still hold


class Executor:
    """The ledger, and everything that its actions touch. For the server's thread; the commits have one of their own."""

    def __init__(self, settings: BrokerSection, journal: Journal, peers: Peers) -> None:
        self._settings, self._journal, self._peers = settings, journal, peers
        self.committer = Committer(journal.flush)
        self.round = Round()
        self._written: Round | None = None  # being made durable
        self._durable: list[Round] = []  # to be told
        self._started_at = 0.0
        self.fresh = FreshParcels((settings.max_inflight_mb << 20) // FRESH_SHARE)
        self.drift = DriftMonitor()
        self.totals: Counter[str] = Counter()
        self.ledger = self._restore()

    def _restore(self) -> Ledger:
        live = list(self._journal.live())
        grace_s = GRACE_HEARTBEATS * self._settings.heartbeat_s if live else 0.0
        log.info("Ledger restored. live_tickets=%d store=%s", len(live), self._journal.path)
        return Ledger(
            self._settings.lease_s,
            self._settings.max_attempts,
            live,
            self._journal.ended(),
            self._journal.next_seq(),
            time.monotonic() + grace_s,
            self._settings.partials_mb << 20,
        )

    def close(self) -> None:
        """End the thread of the commits."""
        self.committer.close()

    def start_over(self) -> None:
        """The store refused a round: forget it and the one after it, and everybody who waits for an answer."""
        if self.committer.busy:
            with contextlib.suppress(StoreFullError):
                self._await()
        self.round, self._written = Round(), None
        self._durable.clear()
        self.fresh.clear()
        self._peers.clear()
        self.ledger = self._restore()

    def drop(self, peer: Peer, reason: str) -> None:
        """Forget a connection."""
        if self._peers.drop(peer):
            log.info("Peer left. role=%s peer_id=%s reason=%s", peer.role, peer.peer_id, reason)
            self.execute(Request(PeerGone(peer.session)))

    # --- a round is gathered

    def execute(
        self, request: Request, routing: bytes = b"", frames: Sequence[Frame] = (), message: Message | None = None
    ) -> None:
        """Hand an event to the ledger and carry out what follows. `frames` and `message`: those that brought it."""
        for action in self.ledger.handle(request.event, time.monotonic()):
            match action:
                case Reply():
                    if action.statuses:
                        self.round.outbox.durable(routing, action.statuses)
                    elif request.reply is not None:
                        self.round.outbox.add(routing, request.reply(action))
                case Count(name, num):
                    self.totals[name] += num
                    metrics.count(action)
                case Finished() | Settle():
                    self.drift.observe(action)
                case JournalResults():
                    assert isinstance(request.event, Results), "only trajectories are written as results"
                    self.round.write(Write(action, frames, message, len(request.event.results)))
                case JournalRecall(_, ticket_id):
                    self.drift.recalled(ticket_id)
                    self.round.write(Write(action))
                case JournalPartial(lost=False):
                    self.round.write(Write(action, frames))
                case Grant() | GoOn() | Withdraw() | Deliver() | AnnounceDead():
                    self._post(action)
                case JournalEnds(rows):
                    self.round.write(Write(action))
                    self.round.ended.update([row.ticket_id for row in rows])
                case _:
                    self.round.write(Write(action))

    def _post(self, action: Grant | GoOn | Withdraw | Deliver | AnnounceDead) -> None:
        peer = self._peers.by_session(action.session)
        if peer is None:
            raise AssertionError(f"the ledger serves session {action.session}, which is not connected")
        match action:
            case Grant(_, tickets):
                self.round.outbox.grant(peer.routing, tickets)
            case Withdraw(_, ticket_ids):
                self.round.outbox.add(peer.routing, wire.Withdrawn(ticket_ids=ticket_ids).pack())
            case Deliver() | GoOn():
                self.round.outgoing.append(Outgoing(peer, action))
            case AnnounceDead(_, ticket_id, group_id, mode, error):
                letter = wire.Dead(ticket_id=ticket_id, group_id=group_id, mode=mode, error=error)
                self.round.outgoing.append(Outgoing(peer, letter.pack()))

    # --- a round is written

    def commit(self) -> None:
        """Begin to write what was gathered, unless the round before is still being written. Raises StoreFullError."""
        if self.committer.busy:
            if not self.committer.ended and self.round.num_bytes < ROUND_BYTES:
                return
            self._await()
        if self.round:
            self._seal()

    def barrier(self) -> None:
        """Write everything, and wait until the store has it. Raises StoreFullError."""
        if self.committer.busy:
            self._await()
        if self.round:
            self._seal()
        if self.committer.busy:
            self._await()

    def settled(self, ticket_ids: Sequence[str]) -> Mapping[str, Settled]:
        """How those of the tickets ended that are known and not live."""
        ended = self.ledger.without(ticket_ids)
        if not ended:
            return {}
        self._know(ended)
        return {key: known for key in ended if (known := self._journal.settled(key)) is not None}

    def settled_ids(self, ticket_ids: Iterable[str]) -> frozenset[str]:
        """Those of the ids that are not live but known."""
        ended = self.ledger.without(ticket_ids)
        self._know(ended)
        return self._journal.settled_ids(ended)

    def _know(self, ticket_ids: Collection[str]) -> None:
        """See to it that the journal knows how these ended."""
        if not self.round.ended.isdisjoint(ticket_ids) or (
            self._written is not None and not self._written.ended.isdisjoint(ticket_ids)
        ):
            self.barrier()

    def _seal(self) -> None:
        """The round is complete: give it to the journal."""
        sealed, self.round = self.round, Round()
        for action, frames, message, num_items in sealed.writes:
            self._journal.apply(action, frames)
            if message is not None and isinstance(action, JournalResults):
                self._keep(action, message, num_items)
        if self._journal.prepare():
            self._written, self._started_at = sealed, time.perf_counter()
            self.committer.start()
        else:
            self._durable.append(sealed)

    def _keep(self, action: JournalResults, message: Message, num_items: int) -> None:
        """The learner may be waiting for it already."""
        ticket_ids = tuple([row.ticket_id for row in action.rows])
        if (place := self._journal.place(ticket_ids[0])) is not None:
            self.fresh.add(place.parcel, message, num_items, ticket_ids)

    def _await(self) -> None:
        """Wait for the end of the commit."""
        try:
            self.committer.finish()
        except Exception as error:  # noqa: BLE001  the journal says what it means
            self._written = None
            self._journal.fail(error)
        self._journal.finish()
        metrics.commit_seconds.observe(time.perf_counter() - self._started_at)
        assert self._written is not None, "a commit has its round"
        self._durable.append(self._written)
        self._written = None

    # --- a round is told

    def take(self) -> Iterator[tuple[bytes, Message]]:
        """The answers of the rounds that are durable; what the learner gets of them joins its outflow."""
        durable, self._durable = self._durable, []
        for told in durable:
            yield from told.outbox.take()
            for peer, item in told.outgoing:
                if self._peers.get(peer.routing) is not peer:
                    continue  # that connection has ended
                if isinstance(item, GoOn):
                    yield peer.routing, self._continued(item.ticket)
                    continue
                if isinstance(item, Message):
                    peer.outflow.add(item)
                    continue
                place_of = self._journal.place
                peer.outflow.add_results(
                    [
                        (place.parcel, place.index, key)
                        for key in item.ticket_ids
                        if (place := place_of(key)) is not None
                    ]
                )

    def _continued(self, ticket: Ticket) -> Message:
        """The ticket with its partial; alone where that is damaged, or was ended by what has happened meanwhile."""
        parcel = self._journal.partial(ticket.ticket_id)
        if parcel is not None:
            try:
                return pack_continue(ticket, self._journal.load(parcel))
            except DamagedError as error:
                log.error("A partial is damaged; its episode begins anew. ticket=%s error=%s", ticket.ticket_id, error)
                self.execute(Request(PartialLost(ticket.ticket_id)))
        return wire.TicketBody(tickets=(ticket,)).pack()
