"""What the learner says and hears: tickets out, trajectories in, acks. Owns those bodies, and no state."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from broker.protocol.actor_commands import MAX_ITEMS, Item
from broker.protocol.common import MAX_TICKETS, Body, Ids, Text
from broker.protocol.trajectory import Count, Mode, Name, Ticket


class Resume(Body, frozen=True, kw_only=True):
    """First command of a learner after every WELCOME: what it has trained on for good, what it holds in memory."""

    COMMAND: ClassVar[str] = "RESUME"
    request_id: Name
    acked: Ids = ()
    held: Ids = ()


class Resumed(Body, frozen=True, kw_only=True):
    """`count` ids were newly acked; `returned` assigned ones will be delivered again."""

    COMMAND: ClassVar[str] = "RESUMED"
    request_id: Name
    count: Count
    returned: Count


class Issue(Body, frozen=True, kw_only=True):
    """New tickets; ids that the broker has ever seen are ignored."""

    COMMAND: ClassVar[str] = "ISSUE"
    request_id: Name
    tickets: Annotated[tuple[Ticket, ...], Meta(max_length=MAX_TICKETS)]


class Issued(Body, frozen=True, kw_only=True):
    """The tickets are durable; `accepted` of them were new."""

    COMMAND: ClassVar[str] = "ISSUED"
    request_id: Name
    accepted: Count


class Credit(Body, frozen=True, kw_only=True):
    """The learner is ready for `credit` DELIVER and DEAD, and for `credit_bytes` of their arrays (null: any number),
    counted since its HELLO."""

    COMMAND: ClassVar[str] = "CREDIT"
    credit: Count
    credit_bytes: Count | None = None


class Deliver(Body, frozen=True, kw_only=True):
    """Trajectories, assigned to the learner; items and arrays as in TRAJECTORY."""

    COMMAND: ClassVar[str] = "DELIVER"
    items: Annotated[tuple[Item, ...], Meta(min_length=1, max_length=MAX_ITEMS)]


class Dead(Body, frozen=True, kw_only=True):
    """A ticket that used up its attempts; acked like a trajectory. Its group closes without it."""

    COMMAND: ClassVar[str] = "DEAD"
    ticket_id: Name
    group_id: Name
    mode: Mode
    error: Text


class Ack(Body, frozen=True, kw_only=True):
    """These trajectories (or dead letters) are in a complete checkpoint; they will never be delivered again. `dropped`:
    those of them that the learner threw away unused."""

    COMMAND: ClassVar[str] = "ACK"
    request_id: Name
    ticket_ids: Ids
    dropped: Ids = ()


class Acked(Body, frozen=True, kw_only=True):
    """The ack is durable; `count` ids were newly acked."""

    COMMAND: ClassVar[str] = "ACKED"
    request_id: Name
    count: Count


class Cancel(Body, frozen=True, kw_only=True):
    """Of these tickets and these groups, those without a result are withdrawn; null and null: every ticket is."""

    COMMAND: ClassVar[str] = "CANCEL"
    request_id: Name
    ticket_ids: Ids | None = None
    group_ids: Ids | None = None


class Cancelled(Body, frozen=True, kw_only=True):
    """The withdrawal is durable; `count` tickets were cancelled."""

    COMMAND: ClassVar[str] = "CANCELLED"
    request_id: Name
    count: Count
