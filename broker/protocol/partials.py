"""Partials <-> message: an episode that was begun on one actor and is to go on on another.

Owns what a well-formed HANDOVER and CONTINUE are: the heads in the body, the three arrays of a parcel of one, and the
environment's snapshot as a fourth. A snapshot is bytes and nothing else here: only the environment that made it reads
it. Both directions check the same facts. Never opens a socket, never looks at a ticket's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, TypeVar

import numpy as np

from broker.protocol.array_checks import ARRAY_DTYPES, ARRAY_NAMES, check_arrays
from broker.protocol.codec import MAX_BODY_BYTES, check_segment_shapes, join_arrays
from broker.protocol.commands import (
    MAX_SNAPSHOT_BYTES,
    Continue,
    Handover,
    PartialHead,
    SegmentHead,
    check,
    parse_body,
)
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Array, Message
from broker.protocol.trajectory import PolicyVersion, Segment, Ticket

PARTIAL_NAMES: Final = (*ARRAY_NAMES, "snapshot")
MAX_PARTIAL_BODY_BYTES: Final = MAX_BODY_BYTES - 16_384  # of a HANDOVER: a CONTINUE has the ticket besides
PARTIAL_DTYPES: Final[tuple[np.dtype[Any], ...]] = (*ARRAY_DTYPES, np.dtype("|u1"))

BodyT = TypeVar("BodyT", Handover, Continue)


@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """An unfinished episode: what was sampled and counted so far, and the environment's state to go on from.

    segments: as in a trajectory; the last one grows on. snapshot: what `Episode.snapshot` of the environment made.
    """

    head: PartialHead
    segments: tuple[Segment, ...]
    snapshot: bytes

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled, over all segments."""
        return sum(segment.num_sampled for segment in self.segments)

    @property
    def oldest_version(self) -> PolicyVersion | None:
        """The oldest policy that sampled any of its tokens; None where none was sampled."""
        runs = [PolicyVersion(*run[:2]) for segment in self.segments for run in segment.version_runs]
        return min(runs, default=None)


def pack_handover(ticket_id: str, partial: Partial) -> Message:
    """The HANDOVER of this ticket. Raises ProtocolError where the partial is not well-formed."""
    for index, segment in enumerate(partial.segments):
        check_segment_shapes(segment, f"{_name(ticket_id)}: segment {index}")
    heads = tuple(
        SegmentHead(num_tokens=one.token_ids_T.size, version_runs=one.version_runs) for one in partial.segments
    )
    content = check(Handover(ticket_id=ticket_id, head=partial.head, segments=heads))
    parts = [(one.token_ids_T, one.loss_mask_T, one.logprobs_T) for one in partial.segments]
    arrays: tuple[Array, ...] = tuple(
        join_arrays([part[i] for part in parts], dtype) for i, dtype in enumerate(ARRAY_DTYPES)
    )
    arrays = (*arrays, np.frombuffer(partial.snapshot, np.uint8))
    _check(content, ticket_id, arrays)
    message = content.pack(arrays)
    _check_body(message, ticket_id)
    return message


def read_handover(message: Message) -> Handover:
    """The heads of a HANDOVER, all of it checked. Raises ProtocolError (BAD_MESSAGE)."""
    content = parse_body(message, Handover)
    _check(content, content.ticket_id, message.arrays)
    _check_body(message, content.ticket_id)
    return content


def pack_continue(ticket: Ticket, handover: Message) -> Message:
    """The CONTINUE that passes a HANDOVER, which has been checked, on to who goes on with it."""
    content = parse_body(handover, Handover)
    return Continue(ticket=ticket, head=content.head, segments=content.segments).pack(handover.arrays)


def unpack_continue(message: Message) -> tuple[Ticket, Partial]:
    """What a CONTINUE says; the arrays of the segments are read-only views of the frames. Raises ProtocolError
    (BAD_MESSAGE)."""
    content = parse_body(message, Continue)
    _check(content, content.ticket.ticket_id, message.arrays)
    token_ids_N, mask_N, logprobs_N, snapshot = message.arrays
    bounds = accumulate((head.num_tokens for head in content.segments), initial=0)
    segments = tuple(
        Segment(token_ids_N[start:end], mask_N[start:end], logprobs_N[start:end], head.version_runs)
        for head, (start, end) in zip(content.segments, pairwise(bounds), strict=True)
    )
    return content.ticket, Partial(content.head, segments, snapshot.tobytes())


def _check(content: Handover | Continue, ticket_id: str, arrays: Sequence[Array]) -> None:
    """Raise ProtocolError unless heads and arrays agree with each other."""
    if len(arrays) != len(PARTIAL_DTYPES):
        raise _bad(f"{len(arrays)} arrays; a partial has {', '.join(PARTIAL_NAMES)}, in this order")
    for name, array, dtype in zip(PARTIAL_NAMES, arrays, PARTIAL_DTYPES, strict=True):
        if array.dtype != dtype:
            raise _bad(f"{name} has dtype {array.dtype.str}; it must be {dtype.str}")
        if array.ndim != 1:
            raise _bad(f"{name} has shape {list(array.shape)}; it has one dimension")
    snapshot = arrays[-1]
    if snapshot.size > MAX_SNAPSHOT_BYTES:
        raise _bad(f"{_name(ticket_id)}: its snapshot has {snapshot.size} bytes; at most {MAX_SNAPSHOT_BYTES}")
    lengths = [head.num_tokens for head in content.segments]
    sampled = [sum(run.num_tokens for run in head.version_runs) for head in content.segments]
    check_arrays(arrays[:-1], lengths, sampled, lambda number: f"{_name(ticket_id)}: segment {number}")
    turn = content.head.turn
    if turn is not None and turn.num_tokens > lengths[-1]:
        raise _bad(
            f"{_name(ticket_id)}: head.turn.num_tokens is {turn.num_tokens}; the last segment has {lengths[-1]} tokens"
        )


def _check_body(message: Message, ticket_id: str) -> None:
    if (num_bytes := len(message.body)) > MAX_PARTIAL_BODY_BYTES:
        raise _bad(f"{_name(ticket_id)}: its heads have {num_bytes} bytes; at most {MAX_PARTIAL_BODY_BYTES}")


def _name(ticket_id: str) -> str:
    return f"partial of ticket {ticket_id}"


def _bad(text: str) -> ProtocolError:
    return ProtocolError(ErrorCode.BAD_MESSAGE, text)
