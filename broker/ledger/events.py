"""What goes into the ledger and what comes out: small frozen events and actions. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from broker.protocol.commands import ReleaseReason, SendStatus, TicketState
from broker.protocol.trajectory import Mode, Outcome, Ticket


@dataclass(frozen=True, slots=True)
class Settled:
    """What the journal knows of a ticket that is not in the ledger: how it ended and whose result was taken."""

    state: TicketState
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Finish:
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


@dataclass(frozen=True, slots=True)
class Result:
    """A trajectory arrived. `settled`: the journal's word where the ledger does not know the ticket."""

    session: str
    ticket_id: str
    settled: Settled | None = None
    finish: Finish = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Release:
    """Leases given back."""

    session: str
    ticket_ids: tuple[str, ...]
    reason: ReleaseReason
    error: str = ""


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
    | Result
    | Release
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


@dataclass(frozen=True, slots=True)
class JournalTicket:
    """Write a new ticket. `seq` is its place in the queue, for ever."""

    seq: int
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class JournalResult:
    """Write the trajectory that the event brought. `seq` is its place among the results."""

    seq: int
    ticket_id: str
    source: str


@dataclass(frozen=True, slots=True)
class JournalAttempt:
    """Write a ticket's new attempt; `dead` where there is none left, which puts its letter at `seq` of the results."""

    ticket_id: str
    attempt: int
    error: str
    dead: bool = False
    seq: int = 0


@dataclass(frozen=True, slots=True)
class JournalEnd:
    """Write that a ticket has left the ledger in this state; its trajectory is deleted."""

    ticket_id: str
    state: TicketState


@dataclass(frozen=True, slots=True)
class JournalRecall:
    """Write that a ticket is issued again, its attempt unchanged; its trajectory, which is damaged, is deleted."""

    ticket_id: str


@dataclass(frozen=True, slots=True)
class JournalPurge:
    """Write that a dead letter was given up: its error now says so. The learner is still to be told."""

    ticket_id: str
    error: str


@dataclass(frozen=True, slots=True)
class Grant:
    """Send the ticket to this actor."""

    session: str
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Tell this actor that the results of these tickets are not wanted any more."""

    session: str
    ticket_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Deliver:
    """Send the journal's trajectory to the learner."""

    session: str
    ticket_id: str


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
    reason) of what was `refused` to an operator), or a result's status."""

    count: int = 0
    returned: int = 0
    status: SendStatus | None = None
    refused: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Count:
    """Add to a total, see `exchange/metrics.py`; `env` where it is counted by environment."""

    name: str
    num: int = 1
    env: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """The first result of a ticket was taken; for the monitor."""

    ticket: Ticket
    finish: Finish


@dataclass(frozen=True, slots=True)
class Settle:
    """The learner is done with a trajectory: `consumed`, or thrown away; for the monitor."""

    ticket_id: str
    consumed: bool


Action = (
    JournalTicket
    | JournalResult
    | JournalAttempt
    | JournalEnd
    | JournalRecall
    | JournalPurge
    | Grant
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
    in the RESUME of its next connection. `result_seq` is the place of a trajectory or dead letter among the results."""

    seq: int
    ticket: Ticket
    state: TicketState
    result_seq: int = 0
    source: str = ""
    error: str = ""
