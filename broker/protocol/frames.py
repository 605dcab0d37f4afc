"""Message <-> ZeroMQ frames. Owns the outermost layer of the wire and its limits; knows no command.

    frame 0   b"ERGN" + major (u8) + minor (u8)
    frame 1   msgpack map {"t": command, "b": body map, "a": [[dtype, [shape...]], ...]}
    frame 2+  one raw little-endian frame per entry of "a", C order, never pickled

Limits are checked before anything is decoded. Every malformed input raises `ProtocolError`, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from broker.protocol.errors import ErrorCode, ProtocolError

MAGIC = b"ERGN"
PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 0
PREAMBLE = MAGIC + bytes((PROTOCOL_MAJOR, PROTOCOL_MINOR))

DTYPES = {name: np.dtype(name) for name in ("|b1", "|u1", "|i1", "<u2", "<i4", "<i8", "<f4", "<f8")}

Frame = bytes | memoryview
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one message; what exceeds them is refused undecoded."""

    max_frames: int = 4096
    max_envelope_bytes: int = 4 << 20
    max_array_bytes: int = 512 << 20
    max_message_bytes: int = 1024 << 20
    max_dims: int = 8


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Message:
    """A command with its body and its large arrays, as it stands in PROTOCOL.md."""

    command: str
    body: dict[str, Any] = field(default_factory=dict)
    arrays: tuple[Array, ...] = ()

    @property
    def array_bytes(self) -> int:
        """Bytes of all arrays; what a credit in bytes counts."""
        return sum(array.nbytes for array in self.arrays)


def encode(message: Message) -> list[Frame]:
    """Frames of a message. Arrays are referenced, not copied: they must not change until sent."""
    arrays = [np.ascontiguousarray(array) for array in message.arrays]
    for array in arrays:
        if array.dtype.str not in DTYPES:
            raise TypeError(f"array of dtype {array.dtype.str}: the wire carries {', '.join(DTYPES)}")
    envelope = {"t": message.command, "b": message.body, "a": [[a.dtype.str, list(a.shape)] for a in arrays]}
    # A zero-sized array has no buffer to view as bytes, hence the empty frame.
    raw: list[Frame] = [a.reshape(-1).view(np.uint8).data if a.size else b"" for a in arrays]
    return [PREAMBLE, msgpack.packb(envelope, use_bin_type=True), *raw]


def decode(frames: Sequence[Frame], limits: Limits = DEFAULT_LIMITS) -> Message:
    """The message in these frames; its arrays are views of them, read-only.

    Raises ProtocolError (BAD_FRAME, BAD_VERSION) for anything else.
    """
    _check_preamble(frames, limits)
    envelope = _unpack(frames[1])
    command, body, specs = envelope.get("t"), envelope.get("b"), envelope.get("a")
    if not isinstance(command, str) or not isinstance(body, dict) or not isinstance(specs, list) or len(envelope) != 3:
        raise ProtocolError(ErrorCode.BAD_FRAME, "the envelope is not a map of t (text), b (map) and a (list)")
    if any(not isinstance(key, str) for key in body):
        raise ProtocolError(ErrorCode.BAD_FRAME, "a key of the body is not text")
    if len(specs) != len(frames) - 2:
        raise ProtocolError(ErrorCode.BAD_FRAME, f"{len(specs)} arrays are announced, {len(frames) - 2} frames follow")
    arrays = tuple(
        _array(spec, frame, i, limits) for i, (spec, frame) in enumerate(zip(specs, frames[2:], strict=True))
    )
    return Message(command, body, arrays)


def _check_preamble(frames: Sequence[Frame], limits: Limits) -> None:
    if not 2 <= len(frames) <= limits.max_frames:
        raise ProtocolError(ErrorCode.BAD_FRAME, f"{len(frames)} frames; a message has 2 to {limits.max_frames}")
    preamble = bytes(frames[0][:16])
    if len(frames[0]) != len(PREAMBLE) or not preamble.startswith(MAGIC):
        raise ProtocolError(ErrorCode.BAD_FRAME, f"the first frame is {preamble!r}, not an Ergon preamble")
    if preamble[4] != PROTOCOL_MAJOR:
        raise ProtocolError(
            ErrorCode.BAD_VERSION,
            f"peer speaks protocol {preamble[4]}.{preamble[5]}, this side {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}; "
            "run the same major version of Ergon on both sides",
        )
    if (num_bytes := sum(map(len, frames))) > limits.max_message_bytes:
        raise ProtocolError(
            ErrorCode.BAD_FRAME, f"a message of {num_bytes} bytes; at most {limits.max_message_bytes} are allowed"
        )
    if len(frames[1]) > limits.max_envelope_bytes:
        raise ProtocolError(
            ErrorCode.BAD_FRAME,
            f"an envelope of {len(frames[1])} bytes; at most {limits.max_envelope_bytes} are allowed",
        )


def _unpack(frame: Frame) -> dict[Any, Any]:
    try:
        envelope = msgpack.unpackb(frame, raw=False, strict_map_key=True, use_list=True)
    # Besides its own exceptions msgpack raises ValueError, and RecursionError on deep nesting.
    except (msgpack.UnpackException, ValueError, RecursionError, TypeError, OverflowError) as error:
        raise ProtocolError(ErrorCode.BAD_FRAME, f"the envelope is not valid msgpack: {error}") from error
    if not isinstance(envelope, dict):
        raise ProtocolError(ErrorCode.BAD_FRAME, f"the envelope is a {type(envelope).__name__}, not a map")
    return envelope


def _array(spec: object, frame: Frame, index: int, limits: Limits) -> Array:
    if not (isinstance(spec, list) and len(spec) == 2 and isinstance(spec[0], str) and isinstance(spec[1], list)):
        raise ProtocolError(ErrorCode.BAD_FRAME, f"array {index} is announced as {spec!r:.80}, not [dtype, shape]")
    dtype, shape = DTYPES.get(spec[0]), spec[1]
    if dtype is None:
        raise ProtocolError(
            ErrorCode.BAD_FRAME, f"array {index} has dtype {spec[0]!r:.40}; allowed: {', '.join(DTYPES)}"
        )
    if len(shape) > limits.max_dims or any(type(n) is not int or n < 0 for n in shape):
        raise ProtocolError(ErrorCode.BAD_FRAME, f"array {index} has shape {shape!r:.80}")
    if len(frame) > limits.max_array_bytes:
        raise ProtocolError(
            ErrorCode.BAD_FRAME, f"array {index} has {len(frame)} bytes; at most {limits.max_array_bytes} are allowed"
        )
    if math.prod(shape) * dtype.itemsize != len(frame):
        raise ProtocolError(
            ErrorCode.BAD_FRAME, f"array {index}: {spec[0]} {shape!r:.80} does not fill {len(frame)} bytes"
        )
    try:
        array: Array = np.frombuffer(frame, dtype=dtype)
        return array if len(shape) == 1 else array.reshape(shape)
    except (ValueError, OverflowError) as error:  # e.g. (0, 2**62) multiplies to 0 and yet is no numpy shape
        raise ProtocolError(ErrorCode.BAD_FRAME, f"array {index} has shape {shape!r:.80}: {error}") from error
