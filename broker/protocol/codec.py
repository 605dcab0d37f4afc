"""Trajectories <-> message: their heads in the body, three raw arrays for all of them. Owns what is well-formed.

Both directions check the same facts, so that a bug of the sender is found at the sender. One trajectory of one segment
is not copied; those that travel together are, once, by their sender. Never opens a socket, never looks at a ticket.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import numpy as np

from broker.protocol.array_checks import ARRAY_DTYPES, ARRAY_NAMES, check_arrays
from broker.protocol.commands import (
    PARCEL_BYTES,
    Deliver,
    Item,
    SegmentHead,
    TrajectoryBody,
    check,
    parse_body,
)
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import DEFAULT_LIMITS, Array, Message
from broker.protocol.trajectory import Segment, Trajectory

MAX_BODY_BYTES: Final = DEFAULT_LIMITS.max_envelope_bytes - 4096  # what else is in an envelope has less
TOKEN_BYTES: Final = sum(dtype.itemsize for dtype in ARRAY_DTYPES)

Parcel = TrajectoryBody | Deliver


def array_bytes(trajectory: Trajectory) -> int:
    """Bytes that its arrays have on the wire."""
    return sum(map(segment_bytes, trajectory.segments))


def segment_bytes(segment: Segment) -> int:
    """Bytes that the arrays of a segment have on the wire."""
    return TOKEN_BYTES * segment.token_ids_T.size


def pack_trajectories(trajectories: Sequence[Trajectory], body: type[Parcel] = TrajectoryBody) -> Message:
    """The TRAJECTORY (or DELIVER) that carries these. Raises ProtocolError where they are not well-formed, or are too
    many for one message."""
    items, segments = [], list[Segment]()
    for trajectory in trajectories:
        for index, segment in enumerate(trajectory.segments):
            check_segment_shapes(segment, f"{_name(trajectory)}: segment {index}")
        heads = tuple(
            SegmentHead(num_tokens=segment.token_ids_T.size, version_runs=segment.version_runs)
            for segment in trajectory.segments
        )
        items.append(Item(head=trajectory.head, segments=heads))
        segments += trajectory.segments
    content = check(body(items=tuple(items)))
    arrays = tuple(
        join_arrays([(segment.token_ids_T, segment.loss_mask_T, segment.logprobs_T)[i] for segment in segments], dtype)
        for i, dtype in enumerate(ARRAY_DTYPES)
    )
    _check_parcel(content, arrays)
    message = content.pack(arrays)
    if len(message.body) > MAX_BODY_BYTES:
        raise _bad(
            f"the heads of {len(items)} items, the first of ticket {items[0].head.ticket.ticket_id}, have "
            f"{len(message.body)} bytes; those of one message have {MAX_BODY_BYTES} at most: send fewer in one"
        )
    return message


def read_parcel(message: Message, body: type[Parcel] = TrajectoryBody) -> Parcel:
    """The heads of the trajectories in a TRAJECTORY or DELIVER, all of it checked.

    Raises ProtocolError (BAD_MESSAGE) for anything that is not a well-formed parcel.
    """
    content = parse_body(message, body)
    if len(message.arrays) != len(ARRAY_DTYPES):
        raise _bad(f"{len(message.arrays)} arrays; a parcel has {', '.join(ARRAY_NAMES)}, in this order")
    for name, array, dtype in zip(ARRAY_NAMES, message.arrays, ARRAY_DTYPES, strict=True):
        if array.dtype != dtype:
            raise _bad(f"{name} has dtype {array.dtype.str}; it must be {dtype.str}")
        if array.ndim != 1:
            raise _bad(f"{name} has shape {list(array.shape)}; it has one dimension, the tokens of all segments")
    _check_parcel(content, message.arrays)
    return content


def unpack_trajectories(message: Message, body: type[Parcel] = TrajectoryBody) -> tuple[Trajectory, ...]:
    """The trajectories in a TRAJECTORY or DELIVER; their arrays are read-only views of the frames.

    Raises ProtocolError (BAD_MESSAGE) for anything that is not a well-formed parcel.
    """
    content = read_parcel(message, body)
    token_ids_N, mask_N, logprobs_N = message.arrays
    trajectories, end = [], 0
    for item in content.items:
        segments = []
        for head in item.segments:
            at = slice(end, end := end + head.num_tokens)
            segments.append(Segment(token_ids_N[at], mask_N[at], logprobs_N[at], head.version_runs))
        trajectories.append(Trajectory(item.head, tuple(segments)))
    return tuple(trajectories)


def pick(message: Message, content: Parcel, indexes: Sequence[int]) -> Message:
    """A parcel of these of its items, in this order. `content`: its body, which has been checked."""
    ends = list(accumulate(sum(head.num_tokens for head in item.segments) for item in content.items))
    spans = [slice(ends[i - 1] if i else 0, ends[i]) for i in indexes]
    arrays = tuple(
        join_arrays([array[span] for span in spans], dtype)
        for array, dtype in zip(message.arrays, ARRAY_DTYPES, strict=True)
    )
    return type(content)(items=tuple(content.items[i] for i in indexes)).pack(arrays)


def join_arrays(parts: Sequence[Array], dtype: np.dtype[np.generic]) -> Array:
    """One array of this type; what is one already, and of it, is not copied."""
    if len(parts) == 1:
        return parts[0].astype(dtype, copy=False)
    return np.concatenate(parts, dtype=dtype)


def _name(trajectory: Trajectory) -> str:
    return f"trajectory of ticket {trajectory.ticket.ticket_id}"


def check_segment_shapes(segment: Segment, where: str) -> None:
    """What only a sender can get wrong: the wire has one length and one type for each array. Raises ProtocolError."""
    shape = segment.token_ids_T.shape
    if len(shape) != 1 or shape[0] == 0:
        raise _bad(f"{where}: token_ids has shape {shape}; it must be one-dimensional and not empty")
    arrays = (segment.token_ids_T, segment.loss_mask_T, segment.logprobs_T)
    for name, array, dtype in zip(ARRAY_NAMES, arrays, ARRAY_DTYPES, strict=True):
        if array.shape != shape:
            raise _bad(f"{where}: {name} has shape {array.shape}, token_ids {shape}; they must be equal")
        if array.dtype.newbyteorder("<") != dtype.newbyteorder("<"):
            raise _bad(f"{where}: {name} has dtype {array.dtype}; it must be {dtype.str}")


def _check_parcel(content: Parcel, arrays: Sequence[Array]) -> None:
    """Raise ProtocolError unless tickets, arrays, masks and version runs agree with each other."""
    if len(content.items) > 1:
        if len({item.head.ticket.ticket_id for item in content.items}) != len(content.items):
            raise _bad("two of its items are of the same ticket; each ticket has one")
        num_bytes = sum([array.nbytes for array in arrays])
        if num_bytes > PARCEL_BYTES:
            raise _bad(
                f"{len(content.items)} items have {num_bytes} bytes of arrays; "
                f"together they have {PARCEL_BYTES} at most, what is larger travels alone"
            )
    heads = [head for item in content.items for head in item.segments]
    lengths = [head.num_tokens for head in heads]
    # Mostly one policy has sampled all of it.
    sampled = [
        head.version_runs[0][2] if len(head.version_runs) == 1 else sum([run[2] for run in head.version_runs])
        for head in heads
    ]
    check_arrays(arrays, lengths, sampled, lambda number: _where(content, number))


def _where(content: Parcel, number: int) -> str:
    """Which item and segment the number-th segment of all is."""
    for item in content.items:
        if number < len(item.segments):
            return f"trajectory of ticket {item.head.ticket.ticket_id}: segment {number}"
        number -= len(item.segments)
    raise AssertionError("there are fewer segments")


def _bad(text: str) -> ProtocolError:
    return ProtocolError(ErrorCode.BAD_MESSAGE, text)
