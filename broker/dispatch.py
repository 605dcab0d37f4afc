"""One function per command: a peer's message -> the ledger's event and the reply that it will get.

Owns what is checked on the way in. Touches neither socket nor store, but for the look-up of ended tickets it is given.
HELLO and STATUS are the server's own and not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple, Protocol

from broker import ledger_types as ledger
from broker.ledger_types import Event, Reply, Settled
from broker.peers import Peer
from broker.protocol import commands as wire
from broker.protocol.codec import trajectory_from_message
from broker.protocol.commands import parse_body
from broker.protocol.frames import Message


class Request(NamedTuple):
    """What a message asks of the ledger. `reply` turns the ledger's Reply into the answer."""

    event: Event
    reply: Callable[[Reply], Message] | None = None


class Ended(Protocol):
    """What became of tickets that are no longer in the ledger."""

    def settled(self, ticket_id: str) -> Settled | None:
        """How it ended; None where it is live or unknown."""
        ...

    def settled_ids(self, ticket_ids: Iterable[str]) -> frozenset[str]:
        """Those that have ended."""
        ...


def on_heartbeat(peer: Peer, message: Message, _ended: Ended) -> Request:
    """An actor's heartbeat renews its leases; anybody else's is only a sign of life."""
    body = parse_body(message, wire.Heartbeat)
    return Request(ledger.Renew(peer.session, body.leases))


def on_lease(peer: Peer, message: Message, _ended: Ended) -> Request:
    """The actor is ready for tickets."""
    return Request(ledger.Want(peer.session, parse_body(message, wire.Lease).credit))


def on_trajectory(peer: Peer, message: Message, ended: Ended) -> Request:
    """A finished episode; refused where it is not well-formed."""
    ticket_id = trajectory_from_message(message).ticket.ticket_id

    def reply(result: Reply) -> Message:
        if result.status is None:
            raise AssertionError("the ledger answered a result without a status")
        return wire.Durable(ticket_id=ticket_id, status=result.status).pack()

    return Request(ledger.Result(peer.session, ticket_id, ended.settled(ticket_id)), reply)


def on_release(peer: Peer, message: Message, _ended: Ended) -> Request:
    """Leases given back."""
    body = parse_body(message, wire.Release)
    return Request(
        ledger.Release(peer.session, body.ticket_ids, body.reason, body.error),
        lambda done: wire.Released(request_id=body.request_id, count=done.count).pack(),
    )


def on_resume(peer: Peer, message: Message, _ended: Ended) -> Request:
    """A learner says where it stands."""
    body = parse_body(message, wire.Resume)
    return Request(
        ledger.Resume(peer.session, body.acked, body.held),
        lambda done: wire.Resumed(request_id=body.request_id, count=done.count, returned=done.returned).pack(),
    )


def on_issue(_peer: Peer, message: Message, ended: Ended) -> Request:
    """New tickets."""
    body = parse_body(message, wire.Issue)
    return Request(
        ledger.Issue(body.tickets, ended.settled_ids(ticket.ticket_id for ticket in body.tickets)),
        lambda done: wire.Issued(request_id=body.request_id, accepted=done.count).pack(),
    )


def on_credit(peer: Peer, message: Message, _ended: Ended) -> Request:
    """The learner is ready for trajectories."""
    return Request(ledger.Credit(peer.session, parse_body(message, wire.Credit).credit))


def on_ack(_peer: Peer, message: Message, _ended: Ended) -> Request:
    """These are in a complete checkpoint."""
    body = parse_body(message, wire.Ack)
    return Request(
        ledger.Ack(body.ticket_ids),
        lambda done: wire.Acked(request_id=body.request_id, count=done.count).pack(),
    )


def on_cancel(_peer: Peer, message: Message, _ended: Ended) -> Request:
    """Withdraw what has no result."""
    body = parse_body(message, wire.Cancel)
    return Request(
        ledger.Cancel(),
        lambda done: wire.Cancelled(request_id=body.request_id, count=done.count).pack(),
    )


HANDLERS: Final[Mapping[str, Callable[[Peer, Message, Ended], Request]]] = {
    wire.Heartbeat.COMMAND: on_heartbeat,
    wire.Lease.COMMAND: on_lease,
    wire.TrajectoryBody.COMMAND: on_trajectory,
    wire.Release.COMMAND: on_release,
    wire.Resume.COMMAND: on_resume,
    wire.Issue.COMMAND: on_issue,
    wire.Credit.COMMAND: on_credit,
    wire.Ack.COMMAND: on_ack,
    wire.Cancel.COMMAND: on_cancel,
}


def about(message: Message) -> str:
    """What an ERROR about this message refers to: its request id, the ticket of its trajectory, or else its command."""
    request_id, head = message.body.get("request_id"), message.body.get("head")
    ticket = head.get("ticket") if isinstance(head, dict) else None
    ticket_id = ticket.get("ticket_id") if isinstance(ticket, dict) else None
    return next((key for key in (request_id, ticket_id) if isinstance(key, str)), message.command)
