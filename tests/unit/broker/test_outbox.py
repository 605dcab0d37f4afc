"""The answers of a round: gathered by peer, in an order that peers can follow."""

from __future__ import annotations

from broker.exchange.outbox import MAX_TICKETS_SENT, Outbox
from broker.protocol.commands import Durable, TicketBody, Welcome, Withdrawn, parse_body
from tests.unit.broker.samples import make_ticket

WELCOME = Welcome(run_id="r", heartbeat_s=1.0, liveness=15, lease_s=30.0).pack()


def test_many_results_and_tickets_of_a_round_are_one_message_each_after_all_others() -> None:
    outbox = Outbox()
    outbox.durable(b"a", [("t1", "accepted"), ("t2", "late")])
    outbox.grant(b"a", [make_ticket("t5")])
    outbox.add(b"b", WELCOME)
    outbox.durable(b"b", [("t3", "duplicate")])
    outbox.add(b"a", Withdrawn(ticket_ids=("t9",)).pack())
    outbox.durable(b"a", [("t4", "accepted")])
    outbox.grant(b"a", [make_ticket("t6")])
    messages = list(outbox.take())
    assert [(routing, message.command) for routing, message in messages] == [
        (b"b", "WELCOME"),
        (b"a", "WITHDRAWN"),
        (b"a", "DURABLE"),
        (b"b", "DURABLE"),
        (b"a", "TICKET"),
    ]
    results = parse_body(messages[2][1], Durable).results
    assert results == (("t1", "accepted"), ("t2", "late"), ("t4", "accepted"))
    assert [ticket.ticket_id for ticket in parse_body(messages[4][1], TicketBody).tickets] == ["t5", "t6"]
    assert list(outbox.take()) == []


def test_no_message_grows_beyond_its_limit() -> None:
    outbox = Outbox()
    outbox.grant(b"a", [make_ticket(f"t{num}") for num in range(MAX_TICKETS_SENT + 1)])
    sizes = [len(parse_body(message, TicketBody).tickets) for _, message in outbox.take()]
    assert sizes == [MAX_TICKETS_SENT, 1]
