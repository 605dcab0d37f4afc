"""A valid message -> the frames of one that is wrong somewhere. Pure: all chance comes from the given Random.

Wrong in every layer: values in the body, the body's shape, the envelope, the announced arrays, the arrays' content, the
envelope's bytes, the frames, the preamble; what only a parcel can have wrong is in `parcels.py`. Now and then nothing
is wrong, or something is huge.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from broker.protocol.commands import COMMANDS
from broker.protocol.frames import DEFAULT_LIMITS, PREAMBLE, Message, encode
from tests.fuzz import parcels

Frames = list[bytes]
HUGE_ONE_IN = 4000  # messages that are huge; they are slow to make and to send
PARCEL_SHARE = 0.6  # of what is wrong with a parcel


def junk(rng: random.Random, depth: int = 0) -> Any:
    """Any value that msgpack can say."""
    leaves: tuple[Callable[[], Any], ...] = (
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice((0, -1, 1, 255, 2**31, 2**53, 2**63 - 1, 2**64 - 1, -(2**63))),
        lambda: rng.choice((0.0, -0.0, 1.5, float("nan"), float("inf"), -1e308)),
        lambda: rng.choice(("", "a", "train", "drain", "\0", "ü" * 300, "x" * 5000, *COMMANDS)),
        lambda: rng.randbytes(rng.choice((0, 1, 16, 300))),
        lambda: msgpack.ExtType(rng.randrange(128), rng.randbytes(rng.choice((0, 4, 8, 12)))),
        lambda: msgpack.Timestamp(rng.randrange(2**33), rng.randrange(10**9)),
    )
    if depth < 3 and rng.random() < 0.3:
        if rng.random() < 0.5:
            return [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
        return {rng.choice(("a", "role", 7, "ticket_id", "")): junk(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(leaves)()


def _places(node: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) below a node."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        found.append((node, key))
        _places(child, found)
    return found


def _change_body(rng: random.Random, body: dict[str, Any]) -> None:
    """Change one or two places somewhere inside."""
    for _ in range(rng.choice((1, 1, 2))):
        places = _places(body, [])
        if not places or rng.random() < 0.1:
            body[rng.choice(("colour", "t", "request_id", "leases"))] = junk(rng)
            continue
        container, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.15:
            del container[key]
        elif kind < 0.25 and isinstance(container[key], list):
            container[key] = container[key] * rng.choice((0, 2, 50, 2000))
        elif kind < 0.35 and isinstance(container[key], int | float):
            container[key] = max(-(2**63), -container[key]) if rng.random() < 0.5 else container[key] * 2**20 % 2**63
        else:
            container[key] = junk(rng)


def _change_arrays(rng: random.Random, frames: Frames) -> None:
    index = rng.randrange(2, len(frames))
    frame = bytearray(frames[index])
    kind = rng.random()
    if kind < 0.3 and frame:
        frame[rng.randrange(len(frame))] = rng.randrange(256)
    elif kind < 0.5:
        values = np.array([rng.choice((np.nan, np.inf, -np.inf, 5.0, -1e30))], "<f4").tobytes()
        frame[: len(values)] = values
    elif kind < 0.7:
        del frame[rng.randrange(len(frame) + 1) :]
    else:
        frame += rng.randbytes(rng.choice((1, 4, 64, 4096)))
    frames[index] = bytes(frame)


def _change_specs(rng: random.Random, envelope: dict[str, Any]) -> None:
    specs = envelope["a"]
    if not specs or rng.random() < 0.2:
        envelope["a"] = rng.choice((junk(rng), [["<f4", [0]]], [["|u1", [2**62, 4]]], specs * 3))
        return
    index = rng.randrange(len(specs))
    shape = rng.choice(([0], [-1], [2**62], [0, 2**62], [2**31, 2**31, 2**31], [1] * 40, [6, 1], ["6"], 6, None, [6.0]))
    specs[index] = rng.choice(([specs[index][0], shape], ["<f2", specs[index][1]], ["object", [1]], junk(rng)))


def _change_envelope(rng: random.Random, envelope: dict[str, Any]) -> None:
    kind = rng.random()
    if kind < 0.3:
        envelope["t"] = rng.choice((*COMMANDS, "WATCH", "CHUNK", "", "DANCE", "A" * 10_000, 7, None))
    elif kind < 0.5:
        envelope[rng.choice(("t", "b", "a"))] = junk(rng)
    elif kind < 0.7:
        del envelope[rng.choice(("t", "b", "a"))]
    else:
        envelope[rng.choice(("x", "T", 5, ""))] = junk(rng)


def _change_bytes(rng: random.Random, frame: bytes) -> bytes:
    raw = bytearray(frame)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(raw) + 1)
        kind = rng.random()
        if kind < 0.4 and place < len(raw):
            raw[place] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            raw[place:place] = rng.choice((b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff"))
        elif kind < 0.8:
            del raw[place:]
        else:
            raw[place : place + rng.randrange(6)] = rng.randbytes(rng.randrange(6))
    return bytes(raw)


def _change_frames(rng: random.Random, frames: Frames) -> Frames:
    kind = rng.random()
    if kind < 0.2:
        frames[0] = rng.choice((b"", b"ERGN", b"ERGN\x02\x00", b"ERGN\x01\x09", b"ergn\x01\x00", PREAMBLE + b"\0"))
    elif kind < 0.4:
        frames.insert(rng.randrange(len(frames) + 1), rng.randbytes(rng.choice((0, 1, 100))))
    elif kind < 0.6:
        del frames[rng.randrange(len(frames))]
    elif kind < 0.8:
        rng.shuffle(frames)
    else:
        frames = frames[: rng.randrange(len(frames))] + [b""] * rng.choice((1, 3, 100))
    return frames or [b""]


# An envelope up to 4,000,000 empty lists that are to be text: each takes 64 times its byte where somebody reads it.
_LISTS = b"\x83\xa1t\xa9HEARTBEAT\xa1a\x90\xa1b\x81\xa6leases\xdd\x00\x3d\x09\x00"


def huge(rng: random.Random) -> Frames:
    """A message near or beyond a limit: depth, frames, envelope, ids."""
    envelope = {"t": "HEARTBEAT", "b": {"leases": ["x" * 200] * 18_000}, "a": []}
    return rng.choice(
        (
            lambda: [PREAMBLE, b"\x91" * rng.choice((1000, 100_000, 2_000_000))],
            lambda: [PREAMBLE, b"\x81\xa1b" * 500_000],
            lambda: [PREAMBLE, bytes(DEFAULT_LIMITS.max_envelope_bytes + 1)],
            lambda: [PREAMBLE, b"\xc0"] + [b""] * (DEFAULT_LIMITS.max_frames + 10),
            lambda: [PREAMBLE, msgpack.packb(envelope)],
            lambda: [PREAMBLE, _LISTS + b"\x90" * 4_000_000],
            lambda: [PREAMBLE, b"\x83\xa1t\xa4DONE\xa1b\x80\xa1a\xdd\x00\x10\x00\x00" + b"\xc0" * (1 << 20)],
            lambda: [rng.randbytes(1 << 20)],
        )
    )()


def mutate(rng: random.Random, message: Message) -> Frames:
    """The frames of `message`, most often with something wrong."""
    if rng.randrange(HUGE_ONE_IN) == 0:
        return huge(rng)
    kind = rng.random()
    if kind < 0.2:
        return [bytes(frame) for frame in encode(message)]
    if message.command in parcels.COMMANDS and message.arrays and rng.random() < PARCEL_SHARE:
        return parcels.change(rng, message)
    body = msgpack.unpackb(bytes(message.body))
    if kind < 0.7:
        _change_body(rng, body)
    raw = [array.tobytes() for array in message.arrays]
    envelope: dict[Any, Any] = {"t": message.command, "b": body}
    envelope["a"] = [[array.dtype.str, list(array.shape)] for array in message.arrays]
    if 0.70 <= kind < 0.75:
        _change_envelope(rng, envelope)
    elif 0.75 <= kind < 0.80:
        _change_specs(rng, envelope)
    frames = [PREAMBLE, msgpack.packb(envelope), *raw]
    if 0.80 <= kind < 0.88 and raw:
        _change_arrays(rng, frames)
    elif 0.88 <= kind < 0.94:
        frames[1] = _change_bytes(rng, frames[1])
    elif kind >= 0.94:
        frames = _change_frames(rng, frames)
    return frames
