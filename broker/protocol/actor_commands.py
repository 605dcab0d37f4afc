"""What actors say and hear: leases, trajectories, partials, and what becomes of them. Owns their bodies, no state."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta

from broker.protocol.common import MAX_IDS, MAX_TICKETS, Body, Ids, Text
from broker.protocol.trajectory import (
    MAX_SEGMENTS,
    Count,
    Facts,
    Name,
    Positive,
    Seconds,
    Ticket,
    TrajectoryHead,
    VersionRun,
)

MAX_ITEMS: Final = 256  # trajectories in one message
PARCEL_BYTES: Final = 1 << 20  # of arrays; what has more travels alone
OFFER_BYTES: Final = 1 << 20  # a trajectory, or a partial, with more bytes of arrays is offered before it is sent
MAX_SNAPSHOT_BYTES: Final = 16 << 20  # of an environment's state in a partial

SendStatus = Literal["accepted", "late", "duplicate", "unwanted"]
ReleaseReason = Literal["drain", "infra_failure"]
HandoverStatus = Literal["kept", "refused", "unwanted"]


class Lease(Body, frozen=True, kw_only=True):
    """The actor is ready for `credit` tickets, counted since its HELLO."""

    COMMAND: ClassVar[str] = "LEASE"
    credit: Count


class TicketBody(Body, frozen=True, kw_only=True):
    """Tickets, leased to the receiver."""

    COMMAND: ClassVar[str] = "TICKET"
    tickets: Annotated[tuple[Ticket, ...], Meta(min_length=1, max_length=MAX_TICKETS)]


class SegmentHead(Facts, frozen=True, kw_only=True):
    """What of a segment is not an array."""

    num_tokens: Positive
    version_runs: Annotated[tuple[VersionRun, ...], Meta(max_length=65_536)]


class Item(Facts, frozen=True, kw_only=True):
    """What of a trajectory is not an array."""

    head: TrajectoryHead
    segments: Annotated[tuple[SegmentHead, ...], Meta(min_length=1, max_length=MAX_SEGMENTS)]


class Offer(Body, frozen=True, kw_only=True):
    """The actor has a finished episode whose arrays have `num_bytes`, more than OFFER_BYTES; it waits for CLEAR."""

    COMMAND: ClassVar[str] = "OFFER"
    ticket_id: Name
    num_bytes: Count


class Clear(Body, frozen=True, kw_only=True):
    """There is room for the trajectory that was offered: send it."""

    COMMAND: ClassVar[str] = "CLEAR"
    ticket_id: Name


class TrajectoryBody(Body, frozen=True, kw_only=True):
    """Finished episodes of different tickets, as many as fit PARCEL_BYTES, or one of any size. Three arrays follow,
    each of all segments of all items, one after the other: token ids <i4, loss mask |b1, log-probs <f4."""

    COMMAND: ClassVar[str] = "TRAJECTORY"
    items: Annotated[tuple[Item, ...], Meta(min_length=1, max_length=MAX_ITEMS)]


class Withdrawn(Body, frozen=True, kw_only=True):
    """The results of these tickets, which the receiver holds, are not wanted any more: it may stop their episodes."""

    COMMAND: ClassVar[str] = "WITHDRAWN"
    ticket_ids: Ids


class Durable(Body, frozen=True, kw_only=True):
    """The trajectories of these tickets need no repeating. See SendStatus in PROTOCOL.md."""

    COMMAND: ClassVar[str] = "DURABLE"
    results: Annotated[tuple[tuple[Name, SendStatus], ...], Meta(max_length=MAX_IDS)]


class Release(Body, frozen=True, kw_only=True):
    """Leases given back: `drain` costs no attempt, `infra_failure` costs one."""

    COMMAND: ClassVar[str] = "RELEASE"
    request_id: Name
    ticket_ids: Ids
    reason: ReleaseReason
    error: Text = ""


class Released(Body, frozen=True, kw_only=True):
    """The release is durable; `count` leases were ended by it."""

    COMMAND: ClassVar[str] = "RELEASED"
    request_id: Name
    count: Count


class UnfinishedTurn(Facts, frozen=True, kw_only=True):
    """The turn that was being sampled: the last `num_tokens` of the last segment, those that the actor wrote into it
    included. `began_open`: whether thinking was open before the first of them."""

    num_tokens: Count
    began_open: bool = False


class PartialHead(Facts, frozen=True, kw_only=True):
    """What of an unfinished episode is neither a token nor the environment's. Counts as in TrajectoryHead, of the turns
    that have ended; `num_forced_stops` counts that of the unfinished turn, too. Seconds: used up, in all, by sampling,
    by the environment."""

    num_turns: Count = 0
    num_tool_calls: Count = 0
    num_malformed: Count = 0
    num_thinking_tokens: Count = 0
    num_overrun_tokens: Count = 0
    num_forced_stops: Count = 0
    turn: UnfinishedTurn | None = None
    total_s: Seconds = 0.0
    model_s: Seconds = 0.0
    tool_s: Seconds = 0.0


class Handover(Body, frozen=True, kw_only=True):
    """The actor, which drains, gives a lease back at no cost with what its episode is so far. Four arrays follow: those
    of a parcel of one, and the environment's snapshot |u1."""

    COMMAND: ClassVar[str] = "HANDOVER"
    ticket_id: Name
    head: PartialHead
    segments: Annotated[tuple[SegmentHead, ...], Meta(min_length=1, max_length=MAX_SEGMENTS)]


class HandedOver(Body, frozen=True, kw_only=True):
    """What became of a HANDOVER; `kept`: the partial is durable. See HandoverStatus in PROTOCOL.md."""

    COMMAND: ClassVar[str] = "HANDED_OVER"
    ticket_id: Name
    status: HandoverStatus


class Continue(Body, frozen=True, kw_only=True):
    """A ticket, leased to the receiver, whose episode another actor has begun. Arrays as of HANDOVER."""

    COMMAND: ClassVar[str] = "CONTINUE"
    ticket: Ticket
    head: PartialHead
    segments: Annotated[tuple[SegmentHead, ...], Meta(min_length=1, max_length=MAX_SEGMENTS)]
