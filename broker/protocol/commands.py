"""The commands of the experience channel: one frozen, strict body each, and the table that PROTOCOL.md repeats.

Owns what a body may hold and who may send it; does no I/O and knows no state. HELLO, WELCOME, HEARTBEAT and ERROR are
the same on the weight channel, whose other commands live in `weights.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, ValidationError

from broker.protocol.errors import FATAL_CODES, ErrorCode, ProtocolError
from broker.protocol.frames import Array, Message
from broker.protocol.trajectory import Facts, Mode, Name, Ticket, TrajectoryHead, VersionRun

MAX_IDS = 16_384
MAX_TICKETS = 4_096
MAX_ROWS = 1_000  # of each list in an INSPECT_REPLY
MAX_ERROR_CHARACTERS = 500  # of a dead letter there
OFFER_BYTES = 1 << 20  # a trajectory with more bytes of arrays is offered before it is sent
MAX_CREDIT_WINDOW = 4_096  # items a peer may ask for beyond what it was sent

Ids = Annotated[tuple[Name, ...], Field(max_length=MAX_IDS, strict=False)]
Text = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class Role(StrEnum):
    """What a peer of the experience channel is. An operator looks, and decides about dead letters."""

    ACTOR = "actor"
    LEARNER = "learner"
    OPERATOR = "operator"


class TicketState(StrEnum):
    """Where a ticket stands. The last three are ends."""

    ISSUED = "issued"
    LEASED = "leased"
    DELIVERED = "delivered"
    ASSIGNED = "assigned"
    ACKED = "acked"
    DEAD = "dead"
    CANCELLED = "cancelled"


SendStatus = Literal["accepted", "late", "duplicate", "unwanted"]
ReleaseReason = Literal["drain", "infra_failure"]


class Body(Facts):
    """Base of all command bodies; `COMMAND` is the name on the wire."""

    COMMAND: ClassVar[str]

    def pack(self, arrays: tuple[Array, ...] = ()) -> Message:
        """The message that carries this body."""
        return Message(self.COMMAND, self.model_dump(mode="json"), arrays)


class Hello(Body):
    """First message on every socket. `session` is drawn once per process and survives its reconnections."""

    COMMAND = "HELLO"
    role: Role = Field(strict=False)
    peer_id: Name
    run_id: Name
    session: Name


class Welcome(Body):
    """The server's timers, which the peer adopts; `lineage` for a learner only."""

    COMMAND = "WELCOME"
    run_id: Name
    lineage: Count | None = None
    heartbeat_s: float = Field(gt=0)
    liveness: int = Field(ge=1)
    lease_s: float = Field(gt=0)


class Heartbeat(Body):
    """A sign of life. An actor names every lease it holds, which renews them."""

    COMMAND = "HEARTBEAT"
    leases: Ids = ()


class ErrorBody(Body):
    """A refusal. `about` is the request or ticket id of what was refused, or else its command."""

    COMMAND = "ERROR"
    code: str = Field(max_length=64)
    message: Text
    fatal: bool
    about: str = Field(default="", max_length=256)

    @property
    def known_code(self) -> ErrorCode:
        """The code, or BAD_MESSAGE where a newer minor version sent one that this side does not know."""
        return ErrorCode(self.code) if self.code in set(ErrorCode) else ErrorCode.BAD_MESSAGE


class Lease(Body):
    """The actor is ready for `credit` tickets, counted since its HELLO."""

    COMMAND = "LEASE"
    credit: Count


class TicketBody(Body):
    """One ticket, leased to the receiver."""

    COMMAND = "TICKET"
    ticket: Ticket


class SegmentHead(Facts):
    """What of a segment is not an array."""

    version_runs: Annotated[tuple[VersionRun, ...], Field(max_length=65_536, strict=False)]


class Offer(Body):
    """The actor has a finished episode whose arrays have `num_bytes`, more than OFFER_BYTES; it waits for CLEAR."""

    COMMAND = "OFFER"
    ticket_id: Name
    num_bytes: Count


class Clear(Body):
    """There is room for the trajectory that was offered: send it."""

    COMMAND = "CLEAR"
    ticket_id: Name


class TrajectoryBody(Body):
    """A finished episode; three arrays per segment follow: token ids <i4, loss mask |b1, log-probs <f4."""

    COMMAND = "TRAJECTORY"
    head: TrajectoryHead
    segments: Annotated[tuple[SegmentHead, ...], Field(min_length=1, max_length=1024, strict=False)]


class Withdrawn(Body):
    """The results of these tickets, which the receiver holds, are not wanted any more: it may stop their episodes."""

    COMMAND = "WITHDRAWN"
    ticket_ids: Ids


class Durable(Body):
    """The trajectory of this ticket needs no repeating. See SendStatus in PROTOCOL.md."""

    COMMAND = "DURABLE"
    ticket_id: Name
    status: SendStatus


class Release(Body):
    """Leases given back: `drain` costs no attempt, `infra_failure` costs one."""

    COMMAND = "RELEASE"
    request_id: Name
    ticket_ids: Ids
    reason: ReleaseReason
    error: Text = ""


class Released(Body):
    """The release is durable; `count` leases were ended by it."""

    COMMAND = "RELEASED"
    request_id: Name
    count: Count


class Resume(Body):
    """First command of a learner after every WELCOME: what it has trained on for good, what it holds in memory."""

    COMMAND = "RESUME"
    request_id: Name
    acked: Ids = ()
    held: Ids = ()


class Resumed(Body):
    """`count` ids were newly acked; `returned` assigned ones will be delivered again."""

    COMMAND = "RESUMED"
    request_id: Name
    count: Count
    returned: Count


class Issue(Body):
    """New tickets; ids that the broker has ever seen are ignored."""

    COMMAND = "ISSUE"
    request_id: Name
    tickets: Annotated[tuple[Ticket, ...], Field(max_length=MAX_TICKETS, strict=False)]


class Issued(Body):
    """The tickets are durable; `accepted` of them were new."""

    COMMAND = "ISSUED"
    request_id: Name
    accepted: Count


class Credit(Body):
    """The learner is ready for `credit` DELIVER and DEAD, and for `credit_bytes` of their arrays (null: any number),
    counted since its HELLO."""

    COMMAND = "CREDIT"
    credit: Count
    credit_bytes: Count | None = None


class Deliver(Body):
    """A trajectory, assigned to the learner; fields and arrays as in TRAJECTORY."""

    COMMAND = "DELIVER"
    head: TrajectoryHead
    segments: Annotated[tuple[SegmentHead, ...], Field(min_length=1, max_length=1024, strict=False)]


class Dead(Body):
    """A ticket that used up its attempts; acked like a trajectory. Its group closes without it."""

    COMMAND = "DEAD"
    ticket_id: Name
    group_id: Name
    mode: Mode = Field(strict=False)
    error: Text


class Ack(Body):
    """These trajectories (or dead letters) are in a complete checkpoint; they will never be delivered again. `dropped`:
    those of them that the learner threw away unused."""

    COMMAND = "ACK"
    request_id: Name
    ticket_ids: Ids
    dropped: Ids = ()


class Acked(Body):
    """The ack is durable; `count` ids were newly acked."""

    COMMAND = "ACKED"
    request_id: Name
    count: Count


class Cancel(Body):
    """Of these tickets and these groups, those without a result are withdrawn; null and null: every ticket is."""

    COMMAND = "CANCEL"
    request_id: Name
    ticket_ids: Ids | None = None
    group_ids: Ids | None = None


class Cancelled(Body):
    """The withdrawal is durable; `count` tickets were cancelled."""

    COMMAND = "CANCELLED"
    request_id: Name
    count: Count


class Status(Body):
    """Asks for the counts."""

    COMMAND = "STATUS"
    request_id: Name


class StatusReply(Body):
    """Tickets by state and mode ("leased": {"train": 3}; ends count since the store was made), totals since the broker
    started, connected peers by role, `full` while the store refuses writes, `leases_on_hold` while it nearly is."""

    COMMAND = "STATUS_REPLY"
    request_id: Name
    tickets: dict[str, dict[str, Count]]
    totals: dict[str, Count]
    peers: dict[str, Count]
    full: bool
    leases_on_hold: bool = False

    def count(self, state: TicketState, mode: Mode | None = None) -> int:
        """Tickets in this state, of one mode or of all."""
        by_mode = self.tickets.get(state.value, {})
        return sum(by_mode.values()) if mode is None else by_mode.get(mode.value, 0)

    def total(self, name: str) -> int:
        """One of the totals: issued, granted, reclaimed, expired, released_drain, released_infra_failure, accepted,
        late, repeated, duplicate, unwanted, dead, requeued, purged, damaged, cancelled, acked, group_complete,
        group_short, and outcome_completed and so on. 0 before the first."""
        return self.totals.get(name, 0)


class Inspect(Body):
    """Asks for everything an operator wants to know, with at most `max_dead` dead letters."""

    COMMAND = "INSPECT"
    request_id: Name
    max_dead: int = Field(default=100, ge=0, le=MAX_ROWS)


class LeaseRow(Facts):
    """A lease: since when it is held, and when it runs out unless it is renewed."""

    ticket_id: Name
    env: Name
    actor_id: Name
    held_s: float = Field(ge=0)
    left_s: float


class ActorRow(Facts):
    """The leases of one actor. `connected`: whether it is at this moment; its leases run on without."""

    actor_id: Name
    connected: bool
    leases: Count
    oldest_lease_s: float | None = Field(default=None, ge=0)


class PeerRow(Facts):
    """A connected peer, and for how long nothing was heard of it."""

    role: Role = Field(strict=False)
    peer_id: Name
    silent_s: float = Field(ge=0)


class DeadRow(Facts):
    """A dead letter. `told`: the learner holds it, and has closed its group without it."""

    ticket_id: Name
    group_id: Name
    env: Name
    mode: Mode = Field(strict=False)
    attempts: Count
    error: Annotated[str, Field(max_length=MAX_ERROR_CHARACTERS)]
    told: bool


Rows = Field(default=(), max_length=MAX_ROWS, strict=False)


class InspectReply(Body):
    """What the broker knows at this moment. `tickets` to `leases_on_hold` as in STATUS_REPLY; `environments`: live
    tickets by environment and state; `actors`, `connections` and `dead`: rows, of which the first 1,000 are sent;
    `num_dead`: dead letters in all, purged ones aside; `store_bytes`: all files of the store."""

    COMMAND = "INSPECT_REPLY"
    request_id: Name
    run_id: Name
    tickets: dict[str, dict[str, Count]]
    totals: dict[str, Count]
    peers: dict[str, Count]
    full: bool
    leases_on_hold: bool
    store_bytes: Count
    environments: dict[str, dict[str, Count]]
    oldest_lease: LeaseRow | None
    num_dead: Count
    actors: tuple[ActorRow, ...] = Rows
    connections: tuple[PeerRow, ...] = Rows
    dead: tuple[DeadRow, ...] = Rows


class Refusal(Facts):
    """A ticket that was left as it is, and why."""

    ticket_id: Name
    reason: Text


class Requeue(Body):
    """Issue dead tickets again, with no attempt used: these, or every one. One that cannot be: none of these is."""

    COMMAND = "REQUEUE"
    request_id: Name
    ticket_ids: Ids = ()
    all_dead: bool = False


class Requeued(Body):
    """`count` tickets are durably issued again; `refused`: those that are not, the first 1,000 of them."""

    COMMAND = "REQUEUED"
    request_id: Name
    count: Count
    refused: tuple[Refusal, ...] = Rows


class Purge(Body):
    """Give dead letters up: these, or every one. One that cannot be: none of these is."""

    COMMAND = "PURGE"
    request_id: Name
    ticket_ids: Ids = ()
    all_dead: bool = False


class Purged(Body):
    """`count` dead letters are durably given up; `refused`: those that are not, the first 1,000 of them."""

    COMMAND = "PURGED"
    request_id: Name
    count: Count
    refused: tuple[Refusal, ...] = Rows


@dataclass(frozen=True, slots=True)
class Spec:
    """One row of PROTOCOL.md's table: the body, who sends it, which roles take part."""

    body: type[Body]
    sender: Literal["peer", "broker", "both"]
    roles: frozenset[Role]


_ALL, _ACTOR, _LEARNER = frozenset(Role), frozenset({Role.ACTOR}), frozenset({Role.LEARNER})
_OPERATOR = frozenset({Role.OPERATOR})

COMMANDS: Mapping[str, Spec] = {
    spec.body.COMMAND: spec
    for spec in (
        Spec(Hello, "peer", _ALL),
        Spec(Welcome, "broker", _ALL),
        Spec(Heartbeat, "both", _ALL),
        Spec(ErrorBody, "broker", _ALL),
        Spec(Lease, "peer", _ACTOR),
        Spec(TicketBody, "broker", _ACTOR),
        Spec(Withdrawn, "broker", _ACTOR),
        Spec(Offer, "peer", _ACTOR),
        Spec(Clear, "broker", _ACTOR),
        Spec(TrajectoryBody, "peer", _ACTOR),
        Spec(Durable, "broker", _ACTOR),
        Spec(Release, "peer", _ACTOR),
        Spec(Released, "broker", _ACTOR),
        Spec(Resume, "peer", _LEARNER),
        Spec(Resumed, "broker", _LEARNER),
        Spec(Issue, "peer", _LEARNER),
        Spec(Issued, "broker", _LEARNER),
        Spec(Credit, "peer", _LEARNER),
        Spec(Deliver, "broker", _LEARNER),
        Spec(Dead, "broker", _LEARNER),
        Spec(Ack, "peer", _LEARNER),
        Spec(Acked, "broker", _LEARNER),
        Spec(Cancel, "peer", _LEARNER),
        Spec(Cancelled, "broker", _LEARNER),
        Spec(Status, "peer", _ALL),
        Spec(StatusReply, "broker", _ALL),
        Spec(Inspect, "peer", _OPERATOR),
        Spec(InspectReply, "broker", _OPERATOR),
        Spec(Requeue, "peer", _OPERATOR),
        Spec(Requeued, "broker", _OPERATOR),
        Spec(Purge, "peer", _OPERATOR),
        Spec(Purged, "broker", _OPERATOR),
    )
}

BodyT = TypeVar("BodyT", bound=Facts)


def parse_body(message: Message, body: type[BodyT]) -> BodyT:
    """The validated body of a message. Raises ProtocolError (BAD_MESSAGE) naming the first field that is wrong."""
    try:
        return body.model_validate(message.body)
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE,
            f"{message.command[:40]}: {where[:80]} is {first['input']!r:.80}: {first['msg']}",
        ) from error


def error_message(error: ProtocolError, about: str = "") -> Message:
    """The ERROR that tells a peer of `error`."""
    body = ErrorBody(code=error.code, message=error.message[:4096], fatal=error.code in FATAL_CODES, about=about[:256])
    return body.pack()
