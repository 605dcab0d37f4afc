"""One function per command: a peer's message -> the ledger's event and the reply that it will get.

Owns what is checked on the way in. Touches neither socket nor store, but for the look-up of ended tickets it is given.
HELLO, STATUS and INSPECT are the server's own and not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import msgspec

from broker.exchange.peers import Peer
from broker.ledger import events as ledger
from broker.ledger.events import Arrived, Event, Finish, Reply, Settled
from broker.protocol import commands as wire
from broker.protocol.codec import read_parcel
from broker.protocol.commands import parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.partials import read_handover
from broker.protocol.trajectory import Outcome

_INFRA_FAILURE: Final = Outcome.INFRA_FAILURE
_new_row = tuple.__new__  # makes a NamedTuple in half the time that its own constructor takes


class Request(NamedTuple):
    """What a message asks of the ledger. `reply` turns the ledger's Reply into the answer, but for the results of
    trajectories, which are answered together."""

    event: Event
    reply: Callable[[Reply], Message] | None = None


class Ended(Protocol):
    """What became of tickets that are no longer in the ledger."""

    def settled(self, ticket_ids: Sequence[str]) -> Mapping[str, Settled]:
        """How those of them ended that are known and not live."""
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
    """Finished episodes; refused where one is not well-formed, or is none."""
    heads = [item.head for item in read_parcel(message).items]
    settled_of = ended.settled([head.ticket.ticket_id for head in heads]).get
    arrived = []
    for head in heads:
        ticket_id, outcome = head.ticket.ticket_id, head.outcome
        if outcome is _INFRA_FAILURE:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
                f"TRAJECTORY: head.outcome of ticket {ticket_id} is infra_failure, which is no result: "
                "send RELEASE with reason infra_failure, so that the ticket is tried again",
            )
        finish = _new_row(Finish, (outcome, head.reward, head.timings_s.get("total", 0.0)))
        arrived.append(_new_row(Arrived, (ticket_id, finish, settled_of(ticket_id))))
    return Request(ledger.Results(peer.session, tuple(arrived)))


def on_release(peer: Peer, message: Message, _ended: Ended) -> Request:
    """Leases given back."""
    body = parse_body(message, wire.Release)
    return Request(
        ledger.Release(peer.session, body.ticket_ids, body.reason, body.error),
        lambda done: wire.Released(request_id=body.request_id, count=done.count).pack(),
    )


def on_handover(peer: Peer, message: Message, _ended: Ended) -> Request:
    """A lease given back with what its episode is so far; refused where that is not well-formed."""
    body = read_handover(message)
    return Request(
        ledger.HandOver(peer.session, body.ticket_id, message.array_bytes),
        lambda done: wire.HandedOver(ticket_id=body.ticket_id, status=done.handover).pack(),
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
    body = parse_body(message, wire.Credit)
    peer.outflow.allow(body.credit_bytes)
    return Request(ledger.Credit(peer.session, body.credit))


def on_ack(_peer: Peer, message: Message, _ended: Ended) -> Request:
    """These are in a complete checkpoint."""
    body = parse_body(message, wire.Ack)
    return Request(
        ledger.Ack(body.ticket_ids, frozenset(body.dropped)),
        lambda done: wire.Acked(request_id=body.request_id, count=done.count).pack(),
    )


def on_cancel(_peer: Peer, message: Message, _ended: Ended) -> Request:
    """Withdraw what has no result."""
    body = parse_body(message, wire.Cancel)
    return Request(
        ledger.Cancel(body.ticket_ids or (), body.group_ids or (), body.ticket_ids is None and body.group_ids is None),
        lambda done: wire.Cancelled(request_id=body.request_id, count=done.count).pack(),
    )


def on_requeue(_peer: Peer, message: Message, ended: Ended) -> Request:
    """The operator issues dead tickets again."""
    body = parse_body(message, wire.Requeue)
    return Request(
        ledger.Requeue(*_letters_of(body, ended)),
        lambda done: wire.Requeued(request_id=body.request_id, count=done.count, refused=_refusals(done)).pack(),
    )


def on_purge(_peer: Peer, message: Message, ended: Ended) -> Request:
    """The operator gives dead letters up."""
    body = parse_body(message, wire.Purge)
    return Request(
        ledger.Purge(*_letters_of(body, ended)),
        lambda done: wire.Purged(request_id=body.request_id, count=done.count, refused=_refusals(done)).pack(),
    )


def _letters_of(body: wire.Requeue | wire.Purge, ended: Ended) -> tuple[tuple[str, ...], bool, Mapping[str, Settled]]:
    if body.all_dead == bool(body.ticket_ids):
        raise ProtocolError(ErrorCode.BAD_MESSAGE, f"{body.COMMAND}: either ticket_ids or all_dead, and not both")
    return body.ticket_ids, body.all_dead, ended.settled(body.ticket_ids)


def _refusals(done: Reply) -> tuple[wire.Refusal, ...]:
    return tuple(wire.Refusal(ticket_id=ticket_id, reason=reason) for ticket_id, reason in done.refused)


HANDLERS: Final[Mapping[str, Callable[[Peer, Message, Ended], Request]]] = {
    wire.Heartbeat.COMMAND: on_heartbeat,
    wire.Lease.COMMAND: on_lease,
    wire.TrajectoryBody.COMMAND: on_trajectory,
    wire.Release.COMMAND: on_release,
    wire.Handover.COMMAND: on_handover,
    wire.Resume.COMMAND: on_resume,
    wire.Issue.COMMAND: on_issue,
    wire.Credit.COMMAND: on_credit,
    wire.Ack.COMMAND: on_ack,
    wire.Cancel.COMMAND: on_cancel,
    wire.Requeue.COMMAND: on_requeue,
    wire.Purge.COMMAND: on_purge,
}


def about(message: Message) -> str:
    """What an ERROR about this message refers to: its request id, its (first) ticket, or else its command."""
    try:
        body = msgspec.msgpack.decode(message.body, type=_About)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return message.command
    return body.request_id or body.ticket_id or (body.items[0].head.ticket.ticket_id if body.items else message.command)


class _Named(msgspec.Struct):
    ticket_id: str


class _Headed(msgspec.Struct):
    ticket: _Named


class _Listed(msgspec.Struct):
    head: _Headed


class _About(msgspec.Struct):
    """Of any body, what names its subject."""

    request_id: str = ""
    ticket_id: str = ""
    items: list[_Listed] = []
