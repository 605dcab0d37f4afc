"""What goes into the ledger and what comes out: small frozen events and actions. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from broker.protocol.commands import HandoverStatus, ReleaseReason, SendStatus, TicketState
from broker.protocol.trajectory import Mode, Outcome, Ticket


@dataclass(frozen=True, slots=True)
class Settled:
    """What the journal knows of a ticket that is not in the ledger: how it ended and whose result was taken."""

    state: TicketState
    source: str | None = None


class Finish(NamedTuple):
    """What a result says of its episode, for the counts and the monitor."""

    outcome: Outcome
    reward: float
    duration_s: float


# --- events


@dataclass(frozen=True, slots=True)
class Issue:
    """New tickets. `settled_ids`: those of them that the journal knows as ended."""

    tickets: tuple[Ticket, ...]
    settled_ids: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ActorJoined:
    """HELLO of an actor. Its first Renew after this says which leases it really holds."""

    session: str
    actor_id: str


@dataclass(frozen=True, slots=True)
class Want:
    """The actor is ready for `credit` tickets in all since it joined."""

    session: str
    credit: int


@dataclass(frozen=True, slots=True)
class Renew:
    """A heartbeat naming every lease its sender holds."""

    session: str
    ticket_ids: tuple[str, ...]


class Arrived(NamedTuple):
    """One trajectory of a message. `settled`: the journal's word where the ledger does not know the ticket."""

    ticket_id: str
    finish: Finish
    settled: Settled | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """The trajectories of one message arrived, in its order."""

    session: str
    results: tuple[Arrived, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Leases given back."""

    session: str
    ticket_ids: tuple[str, ...]
    reason: ReleaseReason
    error: str = ""


@dataclass(frozen=True, slots=True)
class HandOver:
    """A lease given back with a partial, whose arrays have `num_bytes`."""

    session: str
    ticket_id: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PartialLost:
    """The stored partial of a leased ticket cannot be read: its episode is run from the start."""

    ticket_id: str


@dataclass(frozen=True, slots=True)
class PeerGone:
    """A peer is not reachable any more. It gets nothing until it joins again; its leases run on."""

    session: str


@dataclass(frozen=True, slots=True)
class LearnerJoined:
    """HELLO of the learner; nothing is delivered before its Resume."""

    session: str


@dataclass(frozen=True, slots=True)
class Resume:
    """What the learner has trained on for good, and what it holds in memory."""

    session: str
    acked: tuple[str, ...]
    held: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Credit:
    """The learner is ready for `credit` deliveries in all since it joined."""

    session: str
    credit: int


@dataclass(frozen=True, slots=True)
class Ack:
    """These are in a complete checkpoint. `dropped`: those of them that the learner threw away unused."""

    ticket_ids: tuple[str, ...]
    dropped: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Cancel:
    """Withdraw the tickets without a result: these, those of these groups, or `everything`."""

    ticket_ids: tuple[str, ...] = ()
    group_ids: tuple[str, ...] = ()
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Damaged:
    """The stored trajectory of a ticket that was to be delivered to `session` is not what was written."""

    session: str
    ticket_id: str


@dataclass(frozen=True, slots=True)
class Requeue:
    """The operator issues dead tickets again: these, or `everything`. `settled`: what became of those of them that the
    ledger does not know, by the journal's word."""

    ticket_ids: tuple[str, ...] = ()
    everything: bool = False
    settled: Mapping[str, Settled] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Purge:
    """The operator gives dead letters up; fields as in Requeue."""

    ticket_ids: tuple[str, ...] = ()
    everything: bool = False
    settled: Mapping[str, Settled] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hold:
    """Stop granting tickets (the store runs out of room), or go on."""

    on: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Issue
    | ActorJoined
    | Want
    | Renew
    | Results
    | Release
    | HandOver
    | PartialLost
    | PeerGone
    | LearnerJoined
    | Resume
    | Credit
    | Ack
    | Cancel
    | Damaged
    | Requeue
    | Purge
    | Hold
    | Tick
)


# --- actions, in the order in which they must be carried out
#
# `seq` is the place of a ticket in the queue, for ever, and its key in the journal; `result_seq` the place of a
# trajectory or a dead letter among the results.


@dataclass(frozen=True, slots=True)
class JournalTickets:
    """Write new tickets, each with its `seq`."""

    rows: tuple[tuple[int, Ticket], ...]


class TakenRow(NamedTuple):
    """The index-th trajectory of the message that the event brought is the result of this ticket."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    seq: int
    result_seq: int
    ticket_id: str


@dataclass(frozen=True, slots=True)
class JournalResults:
    """Write the message that the event brought, and that these of its trajectories are results, of this session."""

    source: str
    rows: tuple[TakenRow, ...]


@dataclass(frozen=True, slots=True)
class JournalPartial:
    """Write the message that the event brought: it is the partial of this ticket now; or, where it is `lost`, that the
    ticket has none. A result, a new attempt and the end of the ticket end its partial, too."""

    seq: int
    ticket_id: str
    lost: bool = False


@dataclass(frozen=True, slots=True)
class JournalAttempt:
    """Write a ticket's new attempt; `dead` where there is none left, which puts its letter at `result_seq`."""

    seq: int
    ticket_id: str
    attempt: int
    error: str
    dead: bool = False
    result_seq: int = 0


class EndedRow(NamedTuple):
    """A ticket that leaves the ledger."""

    seq: int
    ticket_id: str
    mode: Mode
    state: TicketState


@dataclass(frozen=True, slots=True)
class JournalEnds:
    """Write that these tickets have left the ledger; their trajectories are deleted."""

    rows: tuple[EndedRow, ...]


@dataclass(frozen=True, slots=True)
class JournalRecall:
    """Write that a ticket is issued again, its attempt unchanged; its trajectory, which is damaged, is deleted."""

    seq: int
    ticket_id: str


@dataclass(frozen=True, slots=True)
class JournalPurge:
    """Write that a dead letter was given up: its error now says so. The learner is still to be told."""

    seq: int
    ticket_id: str
    error: str


@dataclass(frozen=True, slots=True)
class Grant:
    """Send the tickets to this actor."""

    session: str
    tickets: tuple[Ticket, ...]


@dataclass(frozen=True, slots=True)
class GoOn:
    """Send the ticket to this actor, with the journal's partial."""

    session: str
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Tell this actor that the results of these tickets are not wanted any more."""

    session: str
    ticket_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Deliver:
    """Send the journal's trajectories of these tickets to the learner, in this order."""

    session: str
    ticket_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AnnounceDead:
    """Tell the learner that this ticket will have no trajectory."""

    session: str
    ticket_id: str
    group_id: str
    mode: Mode
    error: str


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer the event's sender once the journal is durable: a count (with `returned` for a Resume, and (ticket id,
    reason) of what was `refused` to an operator), the `statuses` of results by ticket, in their order, or what became
    of a `handover`."""

    count: int = 0
    returned: int = 0
    statuses: tuple[tuple[str, SendStatus], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    handover: HandoverStatus = "unwanted"


@dataclass(frozen=True, slots=True)
class Count:
    """Add to a total, see `exchange/metrics.py`; `env` where it is counted by environment."""

    name: str
    num: int = 1
    env: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """The first results of these tickets were taken; for the monitor."""

    results: tuple[tuple[Ticket, Finish], ...]


@dataclass(frozen=True, slots=True)
class Settle:
    """The learner is done with these trajectories, and threw those that are `dropped` away unused; for the monitor."""

    ticket_ids: tuple[str, ...]
    dropped: frozenset[str] = frozenset()


Action = (
    JournalTickets
    | JournalResults
    | JournalPartial
    | JournalAttempt
    | JournalEnds
    | JournalRecall
    | JournalPurge
    | Grant
    | GoOn
    | Withdraw
    | Deliver
    | AnnounceDead
    | Reply
    | Count
    | Finished
    | Settle
)


@dataclass(frozen=True, slots=True)
class Restored:
    """One live ticket as the journal has it, for rebuilding the ledger: issued, delivered or dead.

    A lease and an assignment are not written: actors name their leases in the next heartbeat, the learner what it holds
    in the RESUME of its next connection. `result_seq` is the place of a trajectory or dead letter among the results.
    `partial_bytes`: of the partial that the next lease begins with, 0 where there is none."""

    seq: int
    ticket: Ticket
    state: TicketState
    result_seq: int = 0
    source: str = ""
    error: str = ""
    partial_bytes: int = 0
