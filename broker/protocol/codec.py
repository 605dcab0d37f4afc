"""Trajectory <-> message: the head in the body, three raw arrays per segment. Owns what makes a trajectory well-formed.

Both directions validate the same facts, so that a bug of the sender is found at the sender. Nothing is copied that
already has the wire's dtype. Never opens a socket, never looks at a ticket's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from broker.protocol.commands import Body, Deliver, SegmentHead, TrajectoryBody, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Array, Message
from broker.protocol.trajectory import Segment, Trajectory

ARRAYS_PER_SEGMENT: Final = 3
ARRAY_NAMES: Final = ("token_ids", "loss_mask", "logprobs")
ARRAY_DTYPES: Final = (np.dtype("<i4"), np.dtype("|b1"), np.dtype("<f4"))
MAX_LOGPROB: Final = 1e-3  # rounding may lift a certain token's log-prob a little above 0
LOWEST_LOGPROB: Final = float(np.finfo(np.float32).min)
BLOCK_TOKENS: Final = 1 << 18  # checked at once, so that a large trajectory is not copied in the checking


def trajectory_to_message(
    trajectory: Trajectory, body: type[TrajectoryBody] | type[Deliver] = TrajectoryBody
) -> Message:
    """The TRAJECTORY (or DELIVER) that carries this trajectory. Raises ProtocolError where it is not well-formed."""
    arrays: list[Array] = []
    for index, segment in enumerate(trajectory.segments):
        raw = (segment.token_ids_T, segment.loss_mask_T, segment.logprobs_T)
        for name, array, dtype in zip(ARRAY_NAMES, raw, ARRAY_DTYPES, strict=True):
            if array.dtype.newbyteorder("<") != dtype.newbyteorder("<"):
                raise _bad(f"segment {index}: {name} has dtype {array.dtype}; it must be {dtype.str}")
            arrays.append(array.astype(dtype, copy=False))
        check_segment(segment, index)
    heads = tuple(SegmentHead(version_runs=segment.version_runs) for segment in trajectory.segments)
    if not heads:
        raise _bad("a trajectory has at least one segment, this one has none")
    content: Body = body(head=trajectory.head, segments=heads)
    return content.pack(tuple(arrays))


def trajectory_from_message(message: Message) -> Trajectory:
    """The trajectory in a TRAJECTORY or DELIVER; its arrays are read-only views of the frames.

    Raises ProtocolError (BAD_MESSAGE) for anything that is not a well-formed trajectory.
    """
    body = parse_body(message, TrajectoryBody)
    if len(message.arrays) != ARRAYS_PER_SEGMENT * len(body.segments):
        raise _bad(
            f"{len(message.arrays)} arrays for {len(body.segments)} segments; "
            f"each has {', '.join(ARRAY_NAMES)}, in this order"
        )
    segments = []
    for index, head in enumerate(body.segments):
        arrays = message.arrays[ARRAYS_PER_SEGMENT * index : ARRAYS_PER_SEGMENT * (index + 1)]
        _check_arrays(arrays, index)
        segment = Segment(arrays[0], arrays[1], arrays[2], head.version_runs)
        check_segment(segment, index)
        segments.append(segment)
    return Trajectory(body.head, tuple(segments))


def check_segment(segment: Segment, index: int) -> None:
    """Raise ProtocolError unless the arrays, the mask and the version runs agree with each other."""
    shape = segment.token_ids_T.shape
    if len(shape) != 1 or shape[0] == 0:
        raise _bad(f"segment {index}: token_ids has shape {shape}; it must be one-dimensional and not empty")
    for name, array in (("loss_mask", segment.loss_mask_T), ("logprobs", segment.logprobs_T)):
        if array.shape != shape:
            raise _bad(f"segment {index}: {name} has shape {array.shape}, token_ids {shape}; they must be equal")
    if segment.token_ids_T.min() < 0:
        raise _bad(f"segment {index}: token id {segment.token_ids_T.min()}; ids are not negative")
    for start in range(0, shape[0], BLOCK_TOKENS):
        block = slice(start, start + BLOCK_TOKENS)
        _check_logprobs(segment.logprobs_T[block], segment.loss_mask_T[block], index)
    for run in segment.version_runs:
        if run.num_tokens < 1 or run.lineage < 0 or run.version < 0:
            raise _bad(
                f"segment {index}: version run {tuple(run)}; counts are positive, lineage and version not negative"
            )
    num_masked = int(np.count_nonzero(segment.loss_mask_T))
    if segment.num_sampled != num_masked:
        raise _bad(f"segment {index}: the version runs count {segment.num_sampled} tokens, the loss mask {num_masked}")


def _check_logprobs(logprobs_T: npt.NDArray[np.float32], mask_T: npt.NDArray[np.bool_], index: int) -> None:
    # Without a copy where nothing is wrong, which is nearly always; NaN fails every comparison.
    in_bounds = logprobs_T.min() >= LOWEST_LOGPROB and logprobs_T.max() <= MAX_LOGPROB
    if in_bounds and not ((logprobs_T != 0) > mask_T).any():
        return
    sampled_N, others_N = logprobs_T[mask_T], logprobs_T[~mask_T]
    wrong_N = sampled_N[~(np.isfinite(sampled_N) & (sampled_N <= MAX_LOGPROB))]
    if wrong_N.size:
        raise _bad(
            f"segment {index}: log-prob {wrong_N[0]}; those of sampled tokens are finite and at most {MAX_LOGPROB}"
        )
    wrong_N = others_N[others_N != 0]
    if wrong_N.size:
        raise _bad(f"segment {index}: log-prob {wrong_N[0]} of a token that was not sampled; there it must be 0")


def _check_arrays(arrays: Sequence[Array], index: int) -> None:
    for name, array, dtype in zip(ARRAY_NAMES, arrays, ARRAY_DTYPES, strict=True):
        if array.dtype != dtype:
            raise _bad(f"segment {index}: {name} has dtype {array.dtype.str}; it must be {dtype.str}")
    mask = arrays[1]
    if mask.size and mask.view(np.uint8).max() > 1:
        raise _bad(f"segment {index}: loss_mask holds byte {mask.view(np.uint8).max()}; a mask byte is 0 or 1")


def _bad(text: str) -> ProtocolError:
    return ProtocolError(ErrorCode.BAD_MESSAGE, text)
