"""Bodies: what is wrong with one is named, with its value and what is allowed, at the sender and at the receiver."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest

from broker.protocol import commands
from broker.protocol.commands import (
    MAX_IDS,
    MAX_SHOWN_BYTES,
    MAX_TICKETS,
    Ack,
    Deliver,
    Durable,
    ErrorBody,
    Heartbeat,
    Hello,
    Issue,
    Release,
    TicketBody,
    TrajectoryBody,
    check,
    error_message,
    parse_body,
)
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import EMPTY_BODY, PREAMBLE, Message, decode
from broker.protocol.trajectory import PolicyVersion, Ticket
from tests.contract import golden
from tests.unit.broker.samples import make_ticket, make_trajectory

TICKET = golden.plain(make_ticket("a1"))
HEAD = golden.plain(make_trajectory(make_ticket("a1")).head)
HELLO = {"role": "actor", "peer_id": "p", "run_id": "r", "session": "s"}


def issue(**change: Any) -> dict[str, Any]:
    return {"request_id": "r", "tickets": [TICKET, TICKET | change]}


def parcel(**change: Any) -> dict[str, Any]:
    return {"items": [{"head": HEAD | change, "segments": [{"num_tokens": 6, "version_runs": [[1, 2, 3]]}]}]}


NAN, INF = math.nan, math.inf
WRONG = [
    (Issue, issue(colour="red"), "unknown field `colour`"),
    (Issue, issue() | {"colour": "red"}, "ISSUE: Object contains unknown field `colour`"),
    (Issue, {"request_id": "r"}, "ISSUE: Object missing required field `tickets`"),
    (Issue, issue(attempt="1"), "ISSUE: tickets[1].attempt is '1': Expected `int`, got `str`"),
    (Issue, issue(attempt=1.0), "tickets[1].attempt is 1.0: Expected `int`, got `float`"),
    (Issue, issue(attempt=True), "tickets[1].attempt is True: Expected `int`, got `bool`"),
    (Issue, issue(attempt=-1), "tickets[1].attempt is -1: Expected `int` >= 0"),
    (Issue, issue(attempt=2**53), f"tickets[1].attempt is {2**53}: Expected `int` <= {2**53 - 1}"),
    (Issue, issue(group_size=0), "tickets[1].group_size is 0: Expected `int` >= 1"),
    (Issue, issue(deadline_s=0.0), "tickets[1].deadline_s is 0.0: Expected `float` > 0.0"),
    (Issue, issue(deadline_s=NAN), "tickets[1].deadline_s is nan: Expected `float`"),
    (Issue, issue(deadline_s=INF), "tickets[1].deadline_s is inf: Expected `float` <= 1.797"),
    (Issue, issue(mode="fast"), "tickets[1].mode is 'fast': allowed: eval, reference, train"),
    (Issue, issue(min_version=[1]), "tickets[1].min_version is [1]: Expected `array` of length 2, got 1"),
    (Issue, issue(ticket_id=""), "tickets[1].ticket_id is '': Expected `str` of length >= 1"),
    (Issue, issue(ticket_id="x" * 257), "Expected `str` of length <= 256"),
    (Issue, issue(ticket_id=b"x"), "tickets[1].ticket_id is b'x': Expected `str`, got `bytes`"),
    (Issue, issue(sampling={"temperature": 11.0}), "sampling.temperature is 11.0: Expected `float` <= 10.0"),
    (Hello, HELLO | {"role": "relay"}, "HELLO: role is 'relay': allowed: actor, learner, operator"),
    (Release, {"request_id": "r", "ticket_ids": [], "reason": "x"}, "reason is 'x': allowed: drain, infra_failure"),
    (
        Durable,
        {"results": [["a1", "late"], ["b1", "lost"]]},
        "results[1][1] is 'lost': allowed: accepted, duplicate, late, unwanted",
    ),
    (Ack, {"request_id": "r", "ticket_ids": ["a", 1]}, "ACK: ticket_ids[1] is 1: Expected `str`, got `int`"),
    (TicketBody, {"tickets": []}, "TICKET: tickets is []: Expected `array` of length >= 1"),
    (TrajectoryBody, parcel(outcome="won"), "items[0].head.outcome is 'won': allowed: completed, env_failure, exploit"),
    (TrajectoryBody, parcel(reward=NAN), "items[0].head.reward is nan: Expected `float` >= "),
    (TrajectoryBody, parcel(reward=-INF), "items[0].head.reward is -inf: Expected `float` >= "),
    (
        TrajectoryBody,
        parcel(reward_components={"x": NAN}),
        "head.reward_components[...] is {'x': nan}: Expected `float`",
    ),
    (TrajectoryBody, parcel(timings_s={"total": INF}), "head.timings_s[...] is {'total': inf}: Expected `float` <= "),
    (TrajectoryBody, parcel(timings_s={1: 1.0}), "Expected `str`, got `int`"),
    (TrajectoryBody, parcel(integrity={"verdict": "odd"}), "integrity.verdict is 'odd': allowed: clean, screened"),
    (TrajectoryBody, parcel(finished_at=-1), "items[0].head.finished_at is -1: Expected `float` >= 0.0"),
    (Deliver, parcel(num_turns=None), "DELIVER: items[0].head.num_turns is None: Expected `int`, got `None`"),
]


@pytest.mark.parametrize(("body", "content", "says"), WRONG)
def test_what_is_wrong_is_named_with_its_value_and_what_is_allowed(
    body: type[commands.Body], content: dict[str, Any], says: str
) -> None:
    wire = [PREAMBLE, msgpack.packb({"t": body.COMMAND, "b": content, "a": []})]
    with pytest.raises(ProtocolError) as caught:
        parse_body(decode(wire), body)
    assert says in caught.value.message
    assert caught.value.code is ErrorCode.BAD_MESSAGE
    assert not caught.value.fatal


def test_text_that_is_no_unicode_is_refused() -> None:
    for packed in (b"\x81\xa4role\xa2\xff\xff", b"\x81\xa2\xff\xff\xa1x", b"\x81\xa7peer_id\xa2\xff\xff"):
        with pytest.raises(ProtocolError, match="HELLO: "):
            parse_body(Message("HELLO", packed), Hello)


def test_of_a_large_body_the_value_is_not_looked_for() -> None:
    content = {"request_id": "r", "ticket_ids": ["x" * 256] * (MAX_SHOWN_BYTES // 256), "dropped": 1}
    with pytest.raises(ProtocolError, match="ACK: dropped: Expected `array`, got `int`"):
        parse_body(decode([PREAMBLE, msgpack.packb({"t": "ACK", "b": content, "a": []})]), Ack)


def test_the_sentence_is_short_whatever_the_value() -> None:
    for content in ({"x" * 50_000: 1}, HELLO | {"role": "x" * 50_000}, HELLO | {"role": ["x"] * 10_000}):
        with pytest.raises(ProtocolError) as caught:
            parse_body(decode([PREAMBLE, msgpack.packb({"t": "HELLO", "b": content, "a": []})]), Hello)
        assert len(caught.value.message) < 1100
    with pytest.raises(ProtocolError) as caught:
        decode([PREAMBLE, msgpack.packb({"t": "HELLO", "b": {}, "a": [], "x" * 50_000: 1})])
    assert len(caught.value.message) < 400


def test_the_lists_have_their_bounds() -> None:
    ids = ["x"] * MAX_IDS
    assert len(parse_body(Message("HEARTBEAT", msgpack.packb({"leases": ids})), Heartbeat).leases) == MAX_IDS
    too_many = [
        (Heartbeat, {"leases": [*ids, "x"]}),
        (Durable, {"results": [["x", "late"]] * (MAX_IDS + 1)}),
        (TicketBody, {"tickets": [TICKET] * (MAX_TICKETS + 1)}),
        (TrajectoryBody, {"items": parcel()["items"] * 257}),
        (TrajectoryBody, {"items": [parcel()["items"][0] | {"segments": parcel()["items"][0]["segments"] * 1025}]}),
        (Deliver, {"items": [parcel()["items"][0] | {"segments": []}]}),
    ]
    for body, content in too_many:
        with pytest.raises(ProtocolError, match=r"Expected `array` of length [<>]= \d+"):
            parse_body(Message(body.COMMAND, msgpack.packb(content)), body)


def test_what_has_a_default_may_be_left_out() -> None:
    sparse = {key: TICKET[key] for key in ("ticket_id", "group_id", "group_size", "task", "mode")}
    ticket = parse_body(Message("TICKET", msgpack.packb({"tickets": [sparse]})), TicketBody).tickets[0]
    assert (ticket.sampling.top_p, ticket.thinking_budget, ticket.min_version) == (1.0, None, PolicyVersion(0, 0))
    assert parse_body(Message("HEARTBEAT", EMPTY_BODY), Heartbeat).leases == ()


def test_a_whole_number_is_a_number_and_comes_as_a_float() -> None:
    ticket = parse_body(Message("ISSUE", msgpack.packb(issue(deadline_s=90))), Issue).tickets[1]
    assert isinstance(ticket.deadline_s, float)
    assert ticket.deadline_s == 90.0


# --- at the sender


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attempt": -1}, "Ticket: attempt is -1: Expected `int` >= 0"),
        ({"attempt": 2**70}, "Ticket: "),
        ({"attempt": np.int64(1)}, "np.int64(1) is a int64; allowed: plain numbers"),
        ({"ticket_id": "x" * 257}, "of length <= 256"),
        ({"ticket_id": "\ud800"}, "surrogates not allowed"),
        ({"mode": "fast"}, "Ticket: mode is 'fast': allowed: eval, reference, train"),
        ({"mode": None}, "Ticket: mode is None: Expected `str`"),
        ({"deadline_s": INF}, "deadline_s is inf"),
        ({"deadline_s": object()}, "is a object; allowed: plain numbers"),
        ({"min_version": (1, 2, 3)}, "Expected `array` of length 2, got 3"),
        ({"task": {"env": "shop"}}, "Object missing required field `split` - at `$.task`"),
        ({"sampling": None}, "Ticket: sampling is None: Expected `object`"),
    ],
)
def test_a_sender_finds_its_own_mistakes(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        check(msgspec.structs.replace(make_ticket("a1"), **change))
    assert caught.value.code is ErrorCode.BAD_MESSAGE
    assert says.removesuffix(" - at `$.task`") in caught.value.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reward": NAN}, "TrajectoryHead: reward is nan"),
        ({"reward": np.float32(1)}, "np.float32(1.0) is a float32"),
        ({"reward_components": {"x": NAN}}, "reward_components[...] is {'x': nan}"),
        ({"timings_s": {"total": NAN}}, "timings_s[...] is {'total': nan}"),
        ({"outcome": "won"}, "outcome is 'won': allowed: completed"),
        ({"num_tool_calls": -1}, "num_tool_calls is -1"),
        ({"kind": "x" * 257}, "of length <= 256"),
        ({"actor_id": ""}, "actor_id is ''"),
    ],
)
def test_a_sender_finds_the_mistakes_of_a_head(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        check(msgspec.structs.replace(make_trajectory(make_ticket("a1")).head, **change))
    assert says in caught.value.message


def test_what_is_right_comes_back_as_a_receiver_reads_it() -> None:
    loose: Any = msgspec.structs.replace(
        make_ticket("a1"), mode="train", min_version=[1, 2], deadline_s=np.float64(600)
    )
    checked = check(loose)
    assert checked == make_ticket("a1")
    assert isinstance(checked, Ticket)
    assert isinstance(checked.min_version, PolicyVersion)
    assert type(checked.deadline_s) is float


def test_an_error_fits_its_message_whatever_is_said() -> None:
    body = parse_body(error_message(ProtocolError(ErrorCode.BAD_FRAME, "x" * 9999), "y" * 999), ErrorBody)
    assert (body.fatal, len(body.message), len(body.about)) == (True, 4096, 256)
    assert msgspec.structs.replace(body, code="OF_TOMORROW").known_code is ErrorCode.BAD_MESSAGE
