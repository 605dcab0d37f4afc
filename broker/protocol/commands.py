"""The commands of the experience channel, all of them, and the table that PROTOCOL.md repeats.

Owns which command is whose, and the reading of a body. The bodies are in the module of the peer that sends or hears
them, and can all be had from here; those of the weight channel live in `weight_messages.py`.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from broker.protocol.actor_commands import (
    MAX_ITEMS,
    MAX_SNAPSHOT_BYTES,
    OFFER_BYTES,
    PARCEL_BYTES,
    Clear,
    Continue,
    Durable,
    HandedOver,
    Handover,
    HandoverStatus,
    Item,
    Lease,
    Offer,
    PartialHead,
    Release,
    Released,
    ReleaseReason,
    SegmentHead,
    SendStatus,
    TicketBody,
    TrajectoryBody,
    UnfinishedTurn,
    Withdrawn,
)
from broker.protocol.common import (
    MAX_CREDIT_WINDOW,
    MAX_IDS,
    MAX_TICKETS,
    Body,
    ErrorBody,
    Heartbeat,
    Hello,
    Ids,
    Period,
    Role,
    Status,
    StatusReply,
    Text,
    TicketState,
    Welcome,
)
from broker.protocol.errors import FATAL_CODES, ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.learner_commands import (
    Ack,
    Acked,
    Cancel,
    Cancelled,
    Credit,
    Dead,
    Deliver,
    Issue,
    Issued,
    Resume,
    Resumed,
)
from broker.protocol.operator_commands import (
    MAX_ERROR_CHARACTERS,
    MAX_ROWS,
    ActorRow,
    DeadRow,
    Inspect,
    InspectReply,
    LeaseRow,
    PeerRow,
    Purge,
    Purged,
    Refusal,
    Requeue,
    Requeued,
    Rows,
)
from broker.protocol.trajectory import Facts

__all__ = [
    "COMMANDS",
    "MAX_CREDIT_WINDOW",
    "MAX_ERROR_CHARACTERS",
    "MAX_IDS",
    "MAX_ITEMS",
    "MAX_ROWS",
    "MAX_SNAPSHOT_BYTES",
    "MAX_TICKETS",
    "OFFER_BYTES",
    "PARCEL_BYTES",
    "Ack",
    "Acked",
    "ActorRow",
    "Body",
    "BodyT",
    "Cancel",
    "Cancelled",
    "Clear",
    "Continue",
    "Credit",
    "Dead",
    "DeadRow",
    "Deliver",
    "Durable",
    "ErrorBody",
    "HandedOver",
    "Handover",
    "HandoverStatus",
    "Heartbeat",
    "Hello",
    "Ids",
    "Inspect",
    "InspectReply",
    "Issue",
    "Issued",
    "Item",
    "Lease",
    "LeaseRow",
    "Offer",
    "PartialHead",
    "PeerRow",
    "Period",
    "Purge",
    "Purged",
    "Refusal",
    "Release",
    "ReleaseReason",
    "Released",
    "Requeue",
    "Requeued",
    "Resume",
    "Resumed",
    "Role",
    "Rows",
    "SegmentHead",
    "SendStatus",
    "Spec",
    "Status",
    "StatusReply",
    "Text",
    "TicketBody",
    "TicketState",
    "TrajectoryBody",
    "UnfinishedTurn",
    "Welcome",
    "Withdrawn",
    "check",
    "error_message",
    "parse_body",
]


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
        Spec(Handover, "peer", _ACTOR),
        Spec(HandedOver, "broker", _ACTOR),
        Spec(Continue, "broker", _ACTOR),
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


_BUILDING = threading.Lock()


@functools.cache
def _decoder(body: type[BodyT]) -> msgspec.msgpack.Decoder[BodyT]:
    # msgspec (0.22) shows other threads a type that it has understood only in part, and crashes in them.
    with _BUILDING:
        return msgspec.msgpack.Decoder(body)


def parse_body(message: Message, body: type[BodyT]) -> BodyT:
    """The validated body of a message. Raises ProtocolError (BAD_MESSAGE) naming the first field that is wrong."""
    try:
        facts: BodyT = _decoder(body).decode(message.body)
    # Besides its own exceptions msgspec raises UnicodeDecodeError, and RecursionError on deep nesting.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE, f"{message.command[:40]}: {_explain(str(error), message.body, body)[:1000]}"
        ) from error
    return facts


MAX_SHOWN_BYTES = 1 << 16  # of a body whose wrong value is shown: one of 4 MiB would take a second to be looked into
_PATH = re.compile(r"^(?P<text>.*) - at `\$(?P<path>[^`]*)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")


def _explain(text: str, packed: Any, body: type[Facts]) -> str:
    """What is wrong with a packed body, in the order: field, value, what is allowed. `text` is msgspec's word."""
    found = _PATH.match(text)
    if found is None:
        return text
    name, text = found["path"].lstrip(".")[:80], found["text"]
    if text.startswith("Invalid enum value"):
        text = f"allowed: {', '.join(_choices(body, _STEP.findall(found['path'])))}"
    if len(packed) > MAX_SHOWN_BYTES:
        return f"{name}: {text}"
    try:
        value = msgspec.msgpack.decode(packed)
        for key, index in _STEP.findall(found["path"]):
            value = value[key] if key else value[int(index)]
        return f"{name} is {value!r:.80}: {text}"
    except (msgspec.MsgspecError, ValueError, LookupError, TypeError, RecursionError):
        return f"{name}: {text}"  # a key that is no text, which has no path, or a value too deep to be shown


def _choices(body: type[Facts], steps: list[tuple[str, str]]) -> list[str]:
    """The texts that a field may have, which is found by the (key, index) steps of its path."""
    kind: Any = msgspec.inspect.type_info(body)
    for key, index in steps:
        if key:
            kind = next(field.type for field in kind.fields if field.encode_name == key)
        elif hasattr(kind, "fields"):  # of a named tuple
            kind = kind.fields[int(index)].type
        else:
            kind = kind.item_types[int(index)] if hasattr(kind, "item_types") else kind.item_type
        if isinstance(kind, msgspec.inspect.UnionType):  # of something and None
            kind = next(each for each in kind.types if not isinstance(each, msgspec.inspect.NoneType))
    return sorted(kind.values if hasattr(kind, "values") else (str(member) for member in kind.cls))


def check(facts: BodyT) -> BodyT:
    """The same facts, as a receiver will read them. Raises ProtocolError (BAD_MESSAGE) where it would refuse them, or
    where they cannot be written at all."""
    name = getattr(facts, "COMMAND", type(facts).__name__)
    try:
        packed = msgspec.msgpack.encode(facts, enc_hook=_plain)
    # A type that msgpack does not have, text that is no Unicode, an integer of more than 64 bits.
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(ErrorCode.BAD_MESSAGE, f"{name}: {error}"[:1000]) from error
    return parse_body(Message(name, packed), type(facts))


def _plain(value: object) -> float:
    """A number that is a float and something more, as numpy's float64: a reward that an environment has computed."""
    if isinstance(value, float):
        return float(value)
    raise TypeError(f"{value!r:.80} is a {type(value).__name__}; allowed: plain numbers, text, lists and maps")


def error_message(error: ProtocolError, about: str = "") -> Message:
    """The ERROR that tells a peer of `error`."""
    body = ErrorBody(code=error.code, message=error.message[:4096], fatal=error.code in FATAL_CODES, about=about[:256])
    return body.pack()
