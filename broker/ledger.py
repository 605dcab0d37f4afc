"""The life of every ticket, as a pure state machine: `Ledger.handle(event, now) -> actions`.

Owns who gets which ticket and which result, and when. Does no I/O, reads no clock (`now` is any monotonic number of
seconds) and never holds a token array. Memory and the cost of an event grow with the tickets that are alive, not with
those that are done: an ended ticket leaves the ledger, and what became of it is the journal's to know. Events that may
meet an ended ticket therefore carry the journal's word, `settled`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.ledger_types import (
    Ack,
    Action,
    ActorJoined,
    AnnounceDead,
    Cancel,
    Count,
    Credit,
    Deliver,
    Event,
    Grant,
    Hold,
    Issue,
    JournalAttempt,
    JournalEnd,
    JournalResult,
    JournalTicket,
    LearnerJoined,
    PeerGone,
    Release,
    Renew,
    Reply,
    Restored,
    Result,
    Resume,
    Settled,
    Tick,
    Want,
)
from broker.protocol.commands import TicketState as T
from broker.protocol.trajectory import Mode
from broker.ticket_table import OPEN, Entry, TicketTable


@dataclass(slots=True)
class _Actor:
    actor_id: str
    joined: bool = True
    fresh: bool = True  # has not yet said which leases it holds
    want: int = 0
    granted: int = 0
    leases: set[str] = field(default_factory=set)


class Ledger:
    """The ledger of one broker. `restored`, `ended` and `next_seq` come from the journal.

    Until `grant_from`, no ticket is granted: after a restart, actors that still run an episode get the chance to say so
    before it is given to another.
    """

    def __init__(
        self,
        lease_s: float,
        max_attempts: int,
        restored: Iterable[Restored] = (),
        ended: Mapping[tuple[T, Mode], int] | None = None,
        next_seq: int = 1,
        grant_from: float = float("-inf"),
    ) -> None:
        self._lease_s, self._max_attempts, self._grant_from = lease_s, max_attempts, grant_from
        self._table = TicketTable(restored, ended or {}, next_seq)
        self._actors: dict[str, _Actor] = {}  # by session
        self._session_of: dict[str, str] = {}  # by actor id
        self._waiting: OrderedDict[str, None] = OrderedDict()  # sessions that want tickets, the longest waiting first
        self._on_hold = False
        self._learner = ""
        self._resumed = False
        self._credit = self._sent = 0
        self._handlers: Mapping[type, Callable[[Any, float], list[Action]]] = {
            Issue: self._issue,
            ActorJoined: self._actor_joined,
            Want: self._want,
            Renew: self._renew,
            Result: self._result,
            Release: self._release,
            PeerGone: self._peer_gone,
            LearnerJoined: self._learner_joined,
            Resume: self._resume,
            Credit: self._add_credit,
            Ack: self._ack,
            Cancel: self._cancel,
            Hold: self._hold,
            Tick: self._tick,
        }

    @property
    def counts(self) -> Counter[tuple[T, Mode]]:
        """Tickets by state and mode: a gauge for live states, a total for ends."""
        return self._table.counts

    def __contains__(self, ticket_id: str) -> bool:
        return ticket_id in self._table.entries

    def __len__(self) -> int:
        return len(self._table.entries)

    def handle(self, event: Event, now: float) -> list[Action]:
        """The actions that this event causes, in order. The reply to the event, if any, is among them."""
        return [*self._handlers[type(event)](event, now), *self._grant(now), *self._deliver()]

    # --- actors

    def _actor_joined(self, event: ActorJoined, _now: float) -> list[Action]:
        actions: list[Action] = []
        session = self._session_of.get(event.actor_id, event.session)
        if session != event.session:  # the actor's process was restarted: what it ran is gone
            actor = self._actors[session]
            for ticket_id in sorted(actor.leases):
                actions += [*self._fail(ticket_id, "its actor was restarted"), Count("expired")]
            self._leave(session, actor)
        actor = self._actors.setdefault(event.session, _Actor(event.actor_id))
        actor.joined = actor.fresh = True
        actor.want = actor.granted = 0
        self._waiting.pop(event.session, None)
        self._session_of[event.actor_id] = event.session
        return actions

    def _leave(self, session: str, actor: _Actor) -> None:
        actor.joined = False
        self._waiting.pop(session, None)
        self._forget_idle(session, actor)

    def _forget_idle(self, session: str, actor: _Actor) -> None:
        if not actor.joined and not actor.leases:
            self._actors.pop(session, None)
            if self._session_of.get(actor.actor_id) == session:
                del self._session_of[actor.actor_id]

    def _want(self, event: Want, _now: float) -> list[Action]:
        actor = self._actors.get(event.session)
        if actor is not None and actor.joined:
            actor.want = max(actor.want, event.credit)
            self._queue_actor(event.session, actor)
        return []

    def _queue_actor(self, session: str, actor: _Actor) -> None:
        if actor.want > actor.granted and not actor.fresh:
            self._waiting.setdefault(session)

    def _renew(self, event: Renew, now: float) -> list[Action]:
        actor = self._actors.get(event.session)
        if actor is None or not actor.joined:
            return []
        actions: list[Action] = []
        for ticket_id in event.ticket_ids:
            entry = self._table.entries.get(ticket_id)
            if entry is not None and entry.state is T.ISSUED:
                self._lease(ticket_id, "reclaim", event.session, now)
                actions.append(Count("reclaimed"))
            elif entry is not None and entry.holder == event.session:
                entry.expires_at = now + self._lease_s
        if actor.fresh:
            actor.fresh = False
            for ticket_id in sorted(actor.leases.difference(event.ticket_ids)):  # lost on the way to the actor
                self._unlease(ticket_id, "return")
            self._queue_actor(event.session, actor)
        return actions

    def _lease(self, ticket_id: str, transition: str, session: str, now: float) -> Entry:
        self._actors[session].leases.add(ticket_id)
        return self._table.lease(ticket_id, transition, session, now + self._lease_s)

    def _unlease(self, ticket_id: str, transition: str) -> Entry:
        """A transition out of leased (or issued, where there is no lease to drop)."""
        session = self._table.entries[ticket_id].holder
        if session:
            actor = self._actors[session]
            actor.leases.discard(ticket_id)
            self._forget_idle(session, actor)
        return self._table.move(ticket_id, transition)

    def _result(self, event: Result, _now: float) -> list[Action]:
        entry = self._table.entries.get(event.ticket_id)
        if entry is not None and entry.state in OPEN:
            # A late result is as good as any: the first one counts, whoever sends it.
            late = entry.holder != event.session
            entry = self._unlease(event.ticket_id, "result")
            entry.source = event.session
            journal = JournalResult(entry.result_seq, event.ticket_id, event.session)
            return [journal, Count("late" if late else "accepted"), Reply(status="late" if late else "accepted")]
        known = Settled(entry.state, entry.source) if entry is not None else event.settled
        if known is None or known.state in (T.DEAD, T.CANCELLED):
            return [Count("unwanted"), Reply(status="unwanted")]
        if known.source == event.session:  # the same send again, after a reconnection
            return [Count("repeated"), Reply(status="accepted")]
        return [Count("duplicate"), Reply(status="duplicate")]

    def _release(self, event: Release, _now: float) -> list[Action]:
        actions: list[Action] = []
        num = 0
        for ticket_id in event.ticket_ids:
            entry = self._table.entries.get(ticket_id)
            if entry is None or entry.state is not T.LEASED or entry.holder != event.session:
                continue
            num += 1
            if event.reason == "drain":
                self._unlease(ticket_id, "return")
            else:
                actions += self._fail(ticket_id, event.error)
        actor = self._actors.get(event.session)
        if event.reason == "drain" and actor is not None:
            # It is stopping: without this the ticket would be leased to the same actor at once.
            actor.want = actor.granted
            self._waiting.pop(event.session, None)
        return [*actions, Count(f"released_{event.reason}", num), Reply(count=num)]

    def _fail(self, ticket_id: str, error: str) -> list[Action]:
        """An attempt is used up: issue the ticket again, or bury it."""
        entry = self._table.entries[ticket_id]
        attempt = entry.ticket.attempt + 1
        entry.ticket = entry.ticket.model_copy(update={"attempt": attempt})
        entry.error = error
        if attempt < self._max_attempts:
            self._unlease(ticket_id, "return")
            return [JournalAttempt(ticket_id, attempt, error)]
        self._unlease(ticket_id, "exhaust")
        return [JournalAttempt(ticket_id, attempt, error, dead=True, seq=entry.result_seq), Count("dead")]

    def _peer_gone(self, event: PeerGone, _now: float) -> list[Action]:
        if event.session == self._learner:
            self._learner, self._resumed = "", False
        actor = self._actors.get(event.session)
        if actor is not None:
            self._leave(event.session, actor)
        return []

    def _hold(self, event: Hold, _now: float) -> list[Action]:
        self._on_hold = event.on
        return []

    def _tick(self, _event: Tick, now: float) -> list[Action]:
        actions: list[Action] = []
        while (ticket_id := self._table.pop_expired(now)) is not None:
            actions += [*self._fail(ticket_id, "its lease ran out"), Count("expired")]
        return actions

    def _grant(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._waiting and not self._on_hold and now >= self._grant_from:
            if (ticket_id := self._table.pop_issued()) is None:
                break
            session, _ = self._waiting.popitem(last=False)
            actor = self._actors[session]
            actor.granted += 1
            self._queue_actor(session, actor)  # at the end: actors take turns
            entry = self._lease(ticket_id, "grant", session, now)
            actions += [Grant(session, entry.ticket), Count("granted")]
        return actions

    # --- learner

    def _issue(self, event: Issue, _now: float) -> list[Action]:
        actions: list[Action] = []
        for ticket in event.tickets:
            if ticket.ticket_id not in self._table.entries and ticket.ticket_id not in event.settled_ids:
                actions.append(JournalTicket(self._table.add(ticket).seq, ticket))
        return [*actions, Count("issued", len(actions)), Reply(count=len(actions))]

    def _learner_joined(self, event: LearnerJoined, _now: float) -> list[Action]:
        self._learner, self._resumed = event.session, False
        self._credit = self._sent = 0
        return []

    def _resume(self, event: Resume, _now: float) -> list[Action]:
        if event.session != self._learner:
            return [Reply()]
        actions, num_acked = self._ack_ids(event.acked)
        held = frozenset(event.held)
        returned = sorted(self._table.assigned - held)
        for ticket_id in returned:
            self._table.move(ticket_id, "redeliver")
        for ticket_id, entry in self._table.entries.items():
            if entry.state is T.DEAD:
                entry.announced = ticket_id in held
                self._table.remind(ticket_id)
        for ticket_id in sorted(held & self._table.entries.keys()):
            if self._table.entries[ticket_id].state is T.DELIVERED:
                self._table.move(ticket_id, "keep")
        self._resumed = True
        return [*actions, Reply(count=num_acked, returned=len(returned))]

    def _add_credit(self, event: Credit, _now: float) -> list[Action]:
        if event.session == self._learner:
            self._credit = max(self._credit, event.credit)
        return []

    def _deliver(self) -> list[Action]:
        actions: list[Action] = []
        while self._resumed and self._sent < self._credit:
            entry = self._table.pop_result()
            if entry is None:
                break
            ticket = entry.ticket
            if entry.state is T.DELIVERED:
                self._table.move(ticket.ticket_id, "deliver")
                actions.append(Deliver(self._learner, ticket.ticket_id))
            else:
                entry.announced = True
                actions.append(AnnounceDead(self._learner, ticket.ticket_id, ticket.group_id, ticket.mode, entry.error))
            self._sent += 1
        return actions

    def _ack(self, event: Ack, _now: float) -> list[Action]:
        actions, num = self._ack_ids(event.ticket_ids)
        return [*actions, Reply(count=num)]

    def _ack_ids(self, ticket_ids: Iterable[str]) -> tuple[list[Action], int]:
        actions: list[Action] = []
        for ticket_id in ticket_ids:
            entry = self._table.entries.get(ticket_id)
            if entry is None or entry.state in OPEN:
                continue
            if entry.state is T.DEAD:
                self._table.bury(ticket_id)
            else:
                self._table.move(ticket_id, "ack")
            actions.append(JournalEnd(ticket_id, entry.state))
        return [*actions, Count("acked", len(actions))], len(actions)

    def _cancel(self, _event: Cancel, _now: float) -> list[Action]:
        open_ids = [ticket_id for ticket_id, entry in self._table.entries.items() if entry.state in OPEN]
        for ticket_id in open_ids:
            self._unlease(ticket_id, "cancel")
        ends: list[Action] = [JournalEnd(ticket_id, T.CANCELLED) for ticket_id in open_ids]
        return [*ends, Count("cancelled", len(open_ids)), Reply(count=len(open_ids))]
