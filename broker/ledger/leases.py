"""The actors' half of the ledger: who holds which lease, who waits for one, and what the end of a lease costs.

Works on the ledger's `TicketTable`. Owns the actors' sessions; never touches a ticket that has a result.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from broker.ledger.events import (
    Action,
    ActorJoined,
    Count,
    GoOn,
    Grant,
    HandOver,
    JournalAttempt,
    JournalPartial,
    PartialLost,
    Release,
    Renew,
    Reply,
    Want,
    Withdraw,
)
from broker.ledger.table import OPEN, Counts, Entry, TicketTable, totals
from broker.protocol.commands import TicketState as T
from broker.protocol.trajectory import Ticket


@dataclass(slots=True)
class Actor:
    """One process of an actor. `leases` outlive its connection."""

    actor_id: str
    joined: bool = True
    fresh: bool = True  # has not yet said which leases it holds
    want: int = 0
    granted: int = 0
    leases: set[str] = field(default_factory=set)


class Leases:
    """Every lease. `on_hold`: nothing is granted; before `grant_from` neither. `max_partial_bytes`: of all partials."""

    def __init__(
        self, table: TicketTable, lease_s: float, max_attempts: int, grant_from: float, max_partial_bytes: int
    ) -> None:
        self.on_hold = False
        self._max_partial_bytes = max_partial_bytes
        self.actors: dict[str, Actor] = {}  # by session
        self._table, self._lease_s, self._max_attempts, self._grant_from = table, lease_s, max_attempts, grant_from
        self._session_of: dict[str, str] = {}  # by actor id
        self._waiting: OrderedDict[str, None] = OrderedDict()  # sessions that want tickets, the longest waiting first

    # --- sessions

    def joined(self, event: ActorJoined) -> list[Action]:
        """HELLO; another session of the same actor has ended, and its leases with it."""
        actions: list[Action] = []
        session = self._session_of.get(event.actor_id, event.session)
        if session != event.session:  # the actor's process was restarted: what it ran is gone
            actor = self.actors[session]
            lost = [self._table.entries[ticket_id] for ticket_id in sorted(actor.leases)]
            actions += self._expire(lost, "its actor was restarted")
            self._leave(session, actor)
        actor = self.actors.setdefault(event.session, Actor(event.actor_id))
        actor.joined = actor.fresh = True
        actor.want = actor.granted = 0
        self._waiting.pop(event.session, None)
        self._session_of[event.actor_id] = event.session
        return actions

    def gone(self, session: str) -> None:
        """The actor cannot be reached; its leases run on."""
        if (actor := self.actors.get(session)) is not None:
            self._leave(session, actor)

    def _leave(self, session: str, actor: Actor) -> None:
        actor.joined = False
        self._waiting.pop(session, None)
        self._forget_idle(session, actor)

    def _forget_idle(self, session: str, actor: Actor) -> None:
        if not actor.joined and not actor.leases:
            self.actors.pop(session, None)
            if self._session_of.get(actor.actor_id) == session:
                del self._session_of[actor.actor_id]

    # --- who gets what

    def want(self, event: Want) -> None:
        """The actor is ready for tickets."""
        actor = self.actors.get(event.session)
        if actor is not None and actor.joined:
            actor.want = max(actor.want, event.credit)
            self._queue_actor(event.session, actor)

    def _queue_actor(self, session: str, actor: Actor) -> None:
        if actor.want > actor.granted and not actor.fresh:
            self._waiting.setdefault(session)

    def grant(self, now: float) -> list[Action]:
        """Lease what waits to those who wait, in turn."""
        waiting, table = self._waiting, self._table
        if not waiting or self.on_hold or now < self._grant_from:
            return []
        num, expires_at = 0, now + self._lease_s
        granted: dict[str, list[Ticket]] = {}
        going_on: list[Action] = []
        while waiting and (entry := table.pop_issued()) is not None:
            session = next(iter(waiting))
            actor = self.actors[session]
            actor.granted += 1
            if actor.want > actor.granted:
                waiting.move_to_end(session)  # actors take turns
            else:
                del waiting[session]
            actor.leases.add(entry.ticket.ticket_id)
            table.lease(entry, "grant", session, expires_at)
            num += 1
            if entry.partial_bytes:
                going_on.append(GoOn(session, entry.ticket))
            elif session in granted:
                granted[session].append(entry.ticket)
            else:
                granted[session] = [entry.ticket]
        if not num:
            return []
        grants = [Grant(session, tuple(tickets)) for session, tickets in granted.items()]
        if going_on:
            going_on.append(Count("continued", len(going_on)))
        return [*grants, *going_on, Count("granted", num)]

    # --- the life of a lease

    def renew(self, event: Renew, now: float) -> list[Action]:
        """A heartbeat names leases: they last longer, or are taken up again, or are not wanted any more."""
        actor = self.actors.get(event.session)
        if actor is None or not actor.joined:
            return []
        num_reclaimed = 0
        in_vain = []
        for ticket_id in event.ticket_ids:
            entry = self._table.entries.get(ticket_id)
            if entry is None or (entry.state not in OPEN and entry.source != event.session):
                in_vain.append(ticket_id)
            elif entry.state is T.ISSUED:
                actor.leases.add(ticket_id)
                self._table.lease(entry, "reclaim", event.session, now + self._lease_s)
                num_reclaimed += 1
            elif entry.holder == event.session:
                self._table.renew(entry, now + self._lease_s)
        if actor.fresh:
            actor.fresh = False
            for ticket_id in sorted(actor.leases.difference(event.ticket_ids)):  # lost on the way to the actor
                self.end(self._table.entries[ticket_id], "return")
            self._queue_actor(event.session, actor)
        actions: list[Action] = [Count("reclaimed", num_reclaimed)] if num_reclaimed else []
        return [*actions, *([Withdraw(event.session, tuple(in_vain))] if in_vain else [])]

    def end(self, entry: Entry, transition: str) -> None:
        """A transition out of leased (or issued, where there is no lease to drop)."""
        self.drop(entry)
        self._table.move(entry, transition)

    def drop(self, entry: Entry) -> None:
        """Its holder, if any, has this lease no more; the transition out of leased must follow."""
        if session := entry.holder:
            actor = self.actors[session]
            actor.leases.discard(entry.ticket.ticket_id)
            if not actor.joined:
                self._forget_idle(session, actor)

    def _fail(self, entry: Entry, error: str, counts: Counts) -> Action:
        """An attempt is used up: issue the ticket again, or bury it."""
        ticket_id, attempt = entry.ticket.ticket_id, entry.ticket.attempt + 1
        entry.ticket = replace(entry.ticket, attempt=attempt)
        entry.error = error
        self._table.set_partial(entry, 0)  # it may be what made the attempt fail
        if attempt < self._max_attempts:
            self.end(entry, "return")
            return JournalAttempt(entry.seq, ticket_id, attempt, error)
        self.end(entry, "exhaust")
        counts["dead", ""] = counts.get(("dead", ""), 0) + 1
        self._table.count_closing(entry, counts)
        return JournalAttempt(entry.seq, ticket_id, attempt, error, dead=True, result_seq=entry.result_seq)

    def release(self, event: Release) -> list[Action]:
        """Leases given back."""
        actions: list[Action] = []
        counts: Counts = {}
        num = 0
        for ticket_id in event.ticket_ids:
            entry = self._table.entries.get(ticket_id)
            if entry is None or entry.state is not T.LEASED or entry.holder != event.session:
                continue
            num += 1
            if event.reason == "drain":
                self.end(entry, "return")
            else:
                actions.append(self._fail(entry, event.error, counts))
        if event.reason == "drain":
            self._stops(event.session)
        return [*actions, *totals(counts), Count(f"released_{event.reason}", num), Reply(count=num)]

    def hand_over(self, event: HandOver) -> list[Action]:
        """A lease given back with what its episode is so far, which is kept where there is room. One that was kept
        before and cannot be replaced stays: it is the beginning of the same attempt."""
        entry, table = self._table.entries.get(event.ticket_id), self._table
        self._stops(event.session)
        if entry is None or entry.state is not T.LEASED or entry.holder != event.session:
            return [Reply(handover="unwanted")]
        actions: list[Action] = []
        kept = table.partial_bytes - entry.partial_bytes + event.num_bytes <= self._max_partial_bytes
        if kept:
            table.set_partial(entry, event.num_bytes)
            actions.append(JournalPartial(entry.seq, event.ticket_id))
        self.end(entry, "return")
        name: Literal["kept", "refused"] = "kept" if kept else "refused"
        return [*actions, Count("released_drain"), Count(f"handover_{name}"), Reply(handover=name)]

    def partial_lost(self, event: PartialLost) -> list[Action]:
        """The next lease begins with nothing."""
        entry = self._table.entries.get(event.ticket_id)
        if entry is None or not entry.partial_bytes:
            return []
        self._table.set_partial(entry, 0)
        return [JournalPartial(entry.seq, event.ticket_id, lost=True), Count("partial_damaged")]

    def _stops(self, session: str) -> None:
        """The actor drains: without this a ticket that it gives back would be leased to it again at once."""
        if (actor := self.actors.get(session)) is not None:
            actor.want = actor.granted
            self._waiting.pop(session, None)

    def expire(self, now: float) -> list[Action]:
        """Fail the leases that have run out."""
        return self._expire(self._table.expired(now), "its lease ran out")

    def _expire(self, lost: Iterable[Entry], error: str) -> list[Action]:
        counts: Counts = {}
        actions = [self._fail(entry, error, counts) for entry in lost]
        return [*actions, *totals(counts), Count("expired", len(actions))] if actions else []

    def withdrawals(self, held: Iterable[tuple[str, str]]) -> list[Action]:
        """Tell those actors that can be reached that the tickets they hold are not wanted any more.

        held: (session, ticket id), the session "" where nobody held it.
        """
        by_session: defaultdict[str, list[str]] = defaultdict(list)
        for session, ticket_id in held:
            if (actor := self.actors.get(session)) is not None and actor.joined:
                by_session[session].append(ticket_id)
        return [Withdraw(session, tuple(ticket_ids)) for session, ticket_ids in by_session.items()]
