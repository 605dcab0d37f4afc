"""What operators say and hear: inspection, and decisions about dead letters. Owns those bodies, and no state."""

from __future__ import annotations

from typing import Annotated, ClassVar, TypeVar

from msgspec import Meta

from broker.protocol.common import Body, Ids, Role, Text
from broker.protocol.trajectory import Count, Facts, Finite, Mode, Name, Seconds

MAX_ROWS = 1_000  # of each list in an INSPECT_REPLY
MAX_ERROR_CHARACTERS = 500  # of a dead letter there

RowT = TypeVar("RowT")
Rows = Annotated[tuple[RowT, ...], Meta(max_length=MAX_ROWS)]


class Inspect(Body, frozen=True, kw_only=True):
    """Asks for everything an operator wants to know, with at most `max_dead` dead letters."""

    COMMAND: ClassVar[str] = "INSPECT"
    request_id: Name
    max_dead: Annotated[int, Meta(ge=0, le=MAX_ROWS)] = 100


class LeaseRow(Facts, frozen=True, kw_only=True):
    """A lease: since when it is held, and when it runs out unless it is renewed."""

    ticket_id: Name
    env: Name
    actor_id: Name
    held_s: Seconds
    left_s: Finite


class ActorRow(Facts, frozen=True, kw_only=True):
    """The leases of one actor. `connected`: whether it is at this moment; its leases run on without."""

    actor_id: Name
    connected: bool
    leases: Count
    oldest_lease_s: Seconds | None = None


class PeerRow(Facts, frozen=True, kw_only=True):
    """A connected peer, and for how long nothing was heard of it."""

    role: Role
    peer_id: Name
    silent_s: Seconds


class DeadRow(Facts, frozen=True, kw_only=True):
    """A dead letter. `told`: the learner holds it, and has closed its group without it."""

    ticket_id: Name
    group_id: Name
    env: Name
    mode: Mode
    attempts: Count
    error: Annotated[str, Meta(max_length=MAX_ERROR_CHARACTERS)]
    told: bool


class InspectReply(Body, frozen=True, kw_only=True):
    """What the broker knows at this moment. `tickets` to `leases_on_hold` as in STATUS_REPLY; `environments`: live
    tickets by environment and state; `actors`, `connections` and `dead`: rows, of which the first 1,000 are sent;
    `num_dead`: dead letters in all, purged ones aside; `store_bytes`: all files of the store."""

    COMMAND: ClassVar[str] = "INSPECT_REPLY"
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
    actors: Rows[ActorRow] = ()
    connections: Rows[PeerRow] = ()
    dead: Rows[DeadRow] = ()


class Refusal(Facts, frozen=True, kw_only=True):
    """A ticket that was left as it is, and why."""

    ticket_id: Name
    reason: Text


class Requeue(Body, frozen=True, kw_only=True):
    """Issue dead tickets again, with no attempt used: these, or every one. One that cannot be: none of these is."""

    COMMAND: ClassVar[str] = "REQUEUE"
    request_id: Name
    ticket_ids: Ids = ()
    all_dead: bool = False


class Requeued(Body, frozen=True, kw_only=True):
    """`count` tickets are durably issued again; `refused`: those that are not, the first 1,000 of them."""

    COMMAND: ClassVar[str] = "REQUEUED"
    request_id: Name
    count: Count
    refused: Rows[Refusal] = ()


class Purge(Body, frozen=True, kw_only=True):
    """Give dead letters up: these, or every one. One that cannot be: none of these is."""

    COMMAND: ClassVar[str] = "PURGE"
    request_id: Name
    ticket_ids: Ids = ()
    all_dead: bool = False


class Purged(Body, frozen=True, kw_only=True):
    """`count` dead letters are durably given up; `refused`: those that are not, the first 1,000 of them."""

    COMMAND: ClassVar[str] = "PURGED"
    request_id: Name
    count: Count
    refused: Rows[Refusal] = ()
