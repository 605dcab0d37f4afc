"""Message <-> ZeroMQ frames. Owns the outermost layer of the wire and its limits; knows no command.

    frame 0   b"ERGN" + major (u8) + minor (u8)
    frame 1   msgpack map {"t": command, "b": body map, "a": [[dtype, [shape...]], ...]}
    frame 2+  one raw little-endian frame per entry of "a", C order, never pickled

Limits are checked before anything is decoded. Every malformed input raises `ProtocolError`, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
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


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    t: str
    b: msgspec.Raw
    a: list[tuple[str, list[int]]]


_PACK = msgspec.msgpack.Encoder().encode
_UNPACK = msgspec.msgpack.Decoder(_Envelope).decode
EMPTY_BODY = b"\x80"


@dataclass(slots=True)
class Message:
    """A command with its body, packed, and its large arrays, as it stands in PROTOCOL.md. Not to be changed.

    `commands.parse_body` reads the body. What does not look into it passes it on as it came. `raw`: the frames of the
    arrays as they came, in whatever form the sending socket takes; they are sent instead of the arrays.
    """

    command: str
    body: Frame | msgspec.Raw = EMPTY_BODY
    arrays: tuple[Array, ...] = ()
    raw: tuple[Any, ...] = ()

    @property
    def array_bytes(self) -> int:
        """Bytes of all arrays; what a credit in bytes counts."""
        return sum(array.nbytes for array in self.arrays)


def encode(message: Message) -> list[Frame]:
    """Frames of a message. Arrays are referenced, not copied: they must not change until sent."""
    specs, raw = [], list[Frame]()
    for array in message.arrays:
        dtype = array.dtype.str
        if dtype not in DTYPES:
            raise TypeError(f"array of dtype {dtype}: the wire carries {', '.join(DTYPES)}")
        specs.append((dtype, array.shape))
        if message.raw:
            continue
        # A zero-sized array has no buffer to view as bytes, hence the empty frame.
        raw.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b"")
    envelope = _PACK(_Envelope(message.command, msgspec.Raw(message.body), specs))  # type: ignore[arg-type]
    return [PREAMBLE, envelope, *(message.raw or raw)]


def decode(frames: Sequence[Frame], limits: Limits = DEFAULT_LIMITS) -> Message:
    """The message in these frames; its arrays are views of them, read-only. Of the body only the outside is checked.

    Raises ProtocolError (BAD_FRAME, BAD_VERSION) for anything else.
    """
    _check_preamble(frames, limits)
    try:
        envelope = _UNPACK(frames[1])
    # Besides its own exceptions msgspec raises UnicodeDecodeError, and RecursionError on deep nesting.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(
            ErrorCode.BAD_FRAME,
            f"the envelope is not a msgpack map of t (text), b (map) and a (list): {error!s:.200}",
        ) from error
    if not is_map(envelope.b):
        raise ProtocolError(ErrorCode.BAD_FRAME, "the body, b of the envelope, is not a map")
    if len(envelope.a) != len(frames) - 2:
        raise ProtocolError(
            ErrorCode.BAD_FRAME, f"{len(envelope.a)} arrays are announced, {len(frames) - 2} frames follow"
        )
    arrays = tuple([_array(dtype, shape, frames[i + 2], i, limits) for i, (dtype, shape) in enumerate(envelope.a)])
    return Message(envelope.t, envelope.b, arrays)


def is_map(packed: Frame | msgspec.Raw) -> bool:
    """Whether packed msgpack begins a map."""
    first = memoryview(packed)[0]
    return 0x80 <= first <= 0x8F or first in (0xDE, 0xDF)


def _check_preamble(frames: Sequence[Frame], limits: Limits) -> None:
    if not 2 <= len(frames) <= limits.max_frames:
        raise ProtocolError(ErrorCode.BAD_FRAME, f"{len(frames)} frames; a message has 2 to {limits.max_frames}")
    if frames[0] != PREAMBLE:
        _check_version(frames[0])
    if (num_bytes := sum(map(len, frames))) > limits.max_message_bytes:
        raise ProtocolError(
            ErrorCode.BAD_FRAME, f"a message of {num_bytes} bytes; at most {limits.max_message_bytes} are allowed"
        )
    if len(frames[1]) > limits.max_envelope_bytes:
        raise ProtocolError(
            ErrorCode.BAD_FRAME,
            f"an envelope of {len(frames[1])} bytes; at most {limits.max_envelope_bytes} are allowed",
        )


def _check_version(frame: Frame) -> None:
    preamble = bytes(frame[:16])
    if len(frame) != len(PREAMBLE) or not preamble.startswith(MAGIC):
        raise ProtocolError(ErrorCode.BAD_FRAME, f"the first frame is {preamble!r}, not an Ergon preamble")
    if preamble[4] != PROTOCOL_MAJOR:
        raise ProtocolError(
            ErrorCode.BAD_VERSION,
            f"peer speaks protocol {preamble[4]}.{preamble[5]}, this side {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}; "
            "run the same major version of Ergon on both sides",
        )


def _array(name: str, shape: list[int], frame: Frame, index: int, limits: Limits) -> Array:
    dtype = DTYPES.get(name)
    if dtype is None:
        raise ProtocolError(ErrorCode.BAD_FRAME, f"array {index} has dtype {name!r:.40}; allowed: {', '.join(DTYPES)}")
    if len(shape) == 1 and shape[0] * dtype.itemsize == len(frame) <= limits.max_array_bytes:
        array: Array = np.frombuffer(frame, dtype)
        return array
    if len(shape) > limits.max_dims or any(n < 0 for n in shape):
        raise ProtocolError(ErrorCode.BAD_FRAME, f"array {index} has shape {shape!r:.80}")
    if len(frame) > limits.max_array_bytes:
        raise ProtocolError(
            ErrorCode.BAD_FRAME, f"array {index} has {len(frame)} bytes; at most {limits.max_array_bytes} are allowed"
        )
    if math.prod(shape) * dtype.itemsize != len(frame):
        raise ProtocolError(
            ErrorCode.BAD_FRAME, f"array {index}: {name} {shape!r:.80} does not fill {len(frame)} bytes"
        )
    try:
        return np.frombuffer(frame, dtype).reshape(shape)
    except (ValueError, OverflowError) as error:  # e.g. (0, 2**62) multiplies to 0 and yet is no numpy shape
        raise ProtocolError(ErrorCode.BAD_FRAME, f"array {index} has shape {shape!r:.80}: {error}") from error
