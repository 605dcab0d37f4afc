"""A valid TRAJECTORY or DELIVER -> the frames of one that only a reader of parcels can find wrong.

Wrong in how many items there are, in which tickets they answer, in how their segments divide the arrays, in the arrays
themselves, and in the packed body. Now and then it is right and as large as it may be. Pure, like `mutate.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from broker.protocol.commands import MAX_ITEMS, PARCEL_BYTES
from broker.protocol.frames import PREAMBLE, Message

COMMANDS = ("TRAJECTORY", "DELIVER")
LARGE_ONE_IN = 200  # parcels near or beyond a limit; they are slow to make
HUGE_COUNTS = (0, -1, 2**31, 2**32, 2**52, 2**53 - 1, 2**53, 2**63 - 1, 2**64 - 1)
NO_MAPS = (b"\xc0", b"\x90", b"\x07", b"\xa5items", b"\xc4\x01\x80", b"\xd4\x01\x80", b"\xdc\x00\x01\x80", b"\xc1")

Body = dict[str, Any]
Arrays = list[npt.NDArray[Any]]


def _segments(body: Body) -> list[Body]:
    return [segment for item in body["items"] for segment in item["segments"]]


def _change_count(rng: random.Random, body: Body, _arrays: Arrays) -> None:
    """More or fewer items than the arrays are of."""
    items = body["items"]
    kind = rng.randrange(4)
    if kind == 0:
        items.clear()
    elif kind == 1:
        items.pop(rng.randrange(len(items)))
    elif kind == 2:
        items.insert(rng.randrange(len(items) + 1), rng.choice(items))
    else:
        body["items"] = items * rng.choice((2, MAX_ITEMS, MAX_ITEMS + 1))


def _change_tickets(rng: random.Random, body: Body, arrays: Arrays) -> None:
    """Two items of one ticket, though everything else fits."""
    item = rng.choice(body["items"])
    if len(body["items"]) > 1 and rng.random() < 0.5:
        item["head"]["ticket"] = rng.choice(body["items"])["head"]["ticket"]
        return
    body["items"] = body["items"] * 2
    arrays[:] = [np.concatenate([array, array]) for array in arrays]


def _change_lengths(rng: random.Random, body: Body, _arrays: Arrays) -> None:
    """Segments that do not add up to the arrays, or do so with the wrong boundaries."""
    segments = _segments(body)
    segment, other = rng.choice(segments), rng.choice(segments)
    kind = rng.randrange(4)
    if kind == 0:
        segment["num_tokens"] = rng.choice(HUGE_COUNTS)
    elif kind == 1:
        segment["num_tokens"] += rng.choice((-1, 1))
    elif kind == 2:  # the sum stays
        segment["num_tokens"] -= 1
        other["num_tokens"] += 1
    else:
        item = rng.choice(body["items"])
        item["segments"] = item["segments"] * rng.choice((0, 2, 1025))


def _change_runs(rng: random.Random, body: Body, _arrays: Arrays) -> None:
    """Version runs that count other tokens than the mask."""
    segment = rng.choice(_segments(body))
    kind = rng.randrange(4)
    if kind == 0:
        segment["version_runs"] = []
    elif kind == 1:
        segment["version_runs"] = [[1, 2, rng.choice(HUGE_COUNTS)]]
    elif kind == 2:
        segment["version_runs"] = [[1, 2, 1]] * rng.choice((2, 1000, 65_537))
    else:
        segment["version_runs"] = [[1, 2, 3, 4], rng.choice(([], [1], "abc", None))]


def _change_arrays(rng: random.Random, _body: Body, arrays: Arrays) -> None:
    """Well-formed arrays that are not these three of one length."""
    index = rng.randrange(3)
    kind = rng.randrange(6)
    if kind == 0:
        arrays[index] = arrays[index][: rng.randrange(arrays[index].size + 1)]
    elif kind == 1:
        arrays[index] = np.resize(arrays[index], arrays[index].size + rng.choice((1, 8, 4096)))
    elif kind == 2:
        size = max(0, arrays[0].size + rng.choice((-1, 1, 100)))
        arrays[:] = [np.resize(array, size) for array in arrays]
    elif kind == 3:
        arrays[index] = arrays[index].astype(rng.choice(("|b1", "|u1", "|i1", "<u2", "<i8", "<f4", "<f8", "<i4")))
    elif kind == 4:
        arrays[index] = arrays[index].reshape(rng.choice(((1, -1), (-1, 1), (1, 1, 1, 1, 1, 1, 1, -1))))
    else:
        arrays[:] = rng.choice((arrays[:index], arrays * 2, arrays[::-1], [arrays[0]] * 3, []))


def _change_values(rng: random.Random, _body: Body, arrays: Arrays) -> None:
    """One element that is not allowed, in a parcel that is otherwise right."""
    place = rng.randrange(arrays[0].size)
    token_ids_N, mask_N, logprobs_N = (array.copy() for array in arrays)
    kind = rng.randrange(4)
    if kind == 0:
        token_ids_N[place] = rng.choice((-1, -(2**31)))
    elif kind == 1:
        mask_N.view(np.uint8)[place] = rng.choice((2, 128, 255))
    elif kind == 2:
        mask_N[place] = not mask_N[place]
    else:
        logprobs_N[place] = rng.choice((np.nan, np.inf, -np.inf, 0.5, -3.4e38, -1e-45, -0.0))
    arrays[:] = [token_ids_N, mask_N, logprobs_N]


def _enlarge(rng: random.Random, body: Body, arrays: Arrays) -> None:
    """As many items as may travel together, one more, or more bytes than may: each of a ticket of its own."""
    num = rng.choice((MAX_ITEMS, MAX_ITEMS + 1))
    item = body["items"][0]
    num_tokens = sum(segment["num_tokens"] for segment in item["segments"])
    heads = [item["head"] | {"ticket": item["head"]["ticket"] | {"ticket_id": f"fuzz-large-{n}"}} for n in range(num)]
    body["items"] = [{"head": head, "segments": item["segments"]} for head in heads]
    arrays[:] = [np.tile(array[:num_tokens], num) for array in arrays]
    if rng.random() < 0.5:  # two items, each small enough to travel alone
        del body["items"][2:]
        num_tokens = PARCEL_BYTES // 18 + 1
        segment = {"num_tokens": num_tokens, "version_runs": []}
        body["items"] = [item | {"segments": [segment]} for item in body["items"]]
        arrays[:] = [np.zeros(2 * num_tokens, array.dtype) for array in arrays]


CHANGES: tuple[Callable[[random.Random, Body, Arrays], None], ...] = (
    _change_count,
    _change_tickets,
    _change_lengths,
    _change_lengths,
    _change_runs,
    _change_arrays,
    _change_arrays,
    _change_values,
)


def _change_packed(rng: random.Random, packed: bytes) -> bytes:
    """A body that is no map, or is cut off, or promises more than comes, inside an envelope that is right."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(NO_MAPS)
    if kind == 1:
        return packed[: rng.randrange(1, len(packed))]
    if kind == 2:  # a map of two keys, of which one is there; a list of 2**32 - 1 items, of which few are
        return rng.choice((b"\x82" + packed[1:], packed.replace(b"\xa5items", b"\xa5items\xdd\xff\xff\xff\xff", 1)))
    if kind == 3:  # the same key twice, or one that is no text
        return rng.choice((b"\x82" + packed[1:] * 2, b"\x82\x05\xc0" + packed[1:], b"\x82\x90\xc0" + packed[1:]))
    return bytes(msgpack.packb(packed))  # packed twice


def change(rng: random.Random, message: Message) -> list[bytes]:
    """The frames of a parcel with one thing wrong, or one that is large."""
    body, arrays = msgpack.unpackb(bytes(message.body)), list(message.arrays)
    if rng.randrange(LARGE_ONE_IN) == 0:
        _enlarge(rng, body, arrays)
    elif rng.random() < 0.85:
        rng.choice(CHANGES)(rng, body, arrays)
    else:
        packed = _change_packed(rng, bytes(message.body))
        return _frames(rng, message.command, packed, arrays)
    return _frames(rng, message.command, msgpack.packb(body), arrays)


def _frames(rng: random.Random, command: str, packed: bytes, arrays: Arrays) -> list[bytes]:
    specs = msgpack.packb([[array.dtype.str, list(array.shape)] for array in arrays])
    entries = [b"\xa1t" + msgpack.packb(command), b"\xa1a" + specs, b"\xa1b" + packed]
    rng.shuffle(entries)  # a body that is cut off swallows what follows it, unless it is the last
    return [PREAMBLE, b"\x83" + b"".join(entries), *(array.tobytes() for array in arrays)]
