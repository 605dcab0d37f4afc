"""What every peer of the experience channel says and hears, and what all bodies are made of.

Owns the base of the bodies, the roles, the ticket states and the shared limits; does no I/O and knows no state. HELLO,
WELCOME, HEARTBEAT and ERROR are the same on the weight channel.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

from msgspec import Meta, msgpack

from broker.protocol.errors import ErrorCode
from broker.protocol.frames import Array, Message
from broker.protocol.trajectory import Count, Facts, Mode, Name, Positive

MAX_IDS = 16_384
MAX_TICKETS = 4_096
MAX_CREDIT_WINDOW = 4_096  # items a peer may ask for beyond what it was sent

Ids = Annotated[tuple[Name, ...], Meta(max_length=MAX_IDS)]
Text = Annotated[str, Meta(max_length=4096)]
Period = Annotated[float, Meta(gt=0.0, le=1e9)]  # seconds

_PACK = msgpack.Encoder().encode


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


class Body(Facts, frozen=True, kw_only=True):
    """Base of all command bodies; `COMMAND` is the name on the wire."""

    COMMAND: ClassVar[str]

    def pack(self, arrays: tuple[Array, ...] = ()) -> Message:
        """The message that carries this body, which is not checked."""
        return Message(self.COMMAND, _PACK(self), arrays)


class Hello(Body, frozen=True, kw_only=True):
    """First message on every socket. `session` is drawn once per process and survives its reconnections."""

    COMMAND: ClassVar[str] = "HELLO"
    role: Role
    peer_id: Name
    run_id: Name
    session: Name


class Welcome(Body, frozen=True, kw_only=True):
    """The server's timers, which the peer adopts; `lineage` for a learner only."""

    COMMAND: ClassVar[str] = "WELCOME"
    run_id: Name
    lineage: Count | None = None
    heartbeat_s: Period
    liveness: Positive
    lease_s: Period


class Heartbeat(Body, frozen=True, kw_only=True):
    """A sign of life. An actor names every lease it holds, which renews them."""

    COMMAND: ClassVar[str] = "HEARTBEAT"
    leases: Ids = ()


class ErrorBody(Body, frozen=True, kw_only=True):
    """A refusal. `about` is the request or ticket id of what was refused, or else its command."""

    COMMAND: ClassVar[str] = "ERROR"
    code: Annotated[str, Meta(max_length=64)]
    message: Text
    fatal: bool
    about: Annotated[str, Meta(max_length=256)] = ""

    @property
    def known_code(self) -> ErrorCode:
        """The code, or BAD_MESSAGE where a newer minor version sent one that this side does not know."""
        return ErrorCode(self.code) if self.code in set(ErrorCode) else ErrorCode.BAD_MESSAGE


class Status(Body, frozen=True, kw_only=True):
    """Asks for the counts."""

    COMMAND: ClassVar[str] = "STATUS"
    request_id: Name


class StatusReply(Body, frozen=True, kw_only=True):
    """Tickets by state and mode ("leased": {"train": 3}; ends count since the store was made), totals since the broker
    started, connected peers by role, `full` while the store refuses writes, `leases_on_hold` while it nearly is."""

    COMMAND: ClassVar[str] = "STATUS_REPLY"
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
        """One of the totals: issued, granted, reclaimed, expired, released_drain, released_infra_failure,
        handover_kept, handover_refused, continued, partial_damaged, accepted, late, repeated, duplicate, unwanted,
        dead, requeued, purged, damaged, cancelled, acked, group_complete, group_short, and outcome_completed and so
        on. 0 before the first."""
        return self.totals.get(name, 0)
