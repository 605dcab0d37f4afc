"""A trajectory as the learner keeps it for people to look at: the parcel it came in, and what became of it.

Owns the record of the files in a run's `trajectories` folder, which the learner writes and `ergon report` and `ergon
view` read: one msgpack list of the facts and the frames of a TRAJECTORY with one item. Pure; never opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgpack
import msgspec
from msgspec import Meta

from broker.protocol.codec import pack_trajectories, unpack_trajectories
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import decode, encode
from broker.protocol.trajectory import Count, Facts, Trajectory

FOLDER = "trajectories"
_NAME = re.compile(r"(\d{8,})-(\d+)\.msgpack")

_Word = Annotated[str, Meta(max_length=256)]


class KeptFacts(Facts, frozen=True, kw_only=True):
    """What the learner did with a trajectory. Lineage, version and step are its own, when it did so.

    `fate`: `trained`, or why it had no gradient; `evaluated` and `reference` for those modes. `evaluation`: which one
    an evaluated trajectory is of, and how it was sampled, as `after/greedy`.
    """

    step: Count
    lineage: Count
    version: Count
    fate: _Word
    evaluation: _Word = ""


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A trajectory and what became of it."""

    facts: KeptFacts
    trajectory: Trajectory


def file_name(number: int, level: int) -> str:
    """Of the number-th file that was begun, once it was thinned `level` times."""
    return f"{number:08d}-{level}.msgpack"


def parse_file_name(name: str) -> tuple[int, int] | None:
    """Number and level; None for drafts and for files that are none of these."""
    found = _NAME.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


_FACTS = msgspec.msgpack.Decoder(KeptFacts)


def pack_kept(kept: Kept) -> bytes:
    """The record. Raises ProtocolError where the trajectory is not well-formed."""
    frames = encode(pack_trajectories([kept.trajectory]))
    packed: bytes = msgpack.packb([msgspec.msgpack.encode(kept.facts), *map(bytes, frames)])
    return packed


def unpack_kept(record: Any) -> Kept:
    """The trajectory in a record, once msgpack has read it. Raises ProtocolError for anything that is none."""
    if not isinstance(record, Sequence) or not record or not all(isinstance(part, bytes) for part in record):
        raise ProtocolError(ErrorCode.BAD_MESSAGE, "a kept trajectory is a list of its facts and its frames")
    try:
        facts = _FACTS.decode(record[0])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(ErrorCode.BAD_MESSAGE, f"the facts of a kept trajectory: {error!s:.200}") from error
    trajectories = unpack_trajectories(decode(record[1:]))
    if len(trajectories) != 1:
        raise ProtocolError(ErrorCode.BAD_MESSAGE, f"{len(trajectories)} trajectories in the record of one")
    return Kept(facts, trajectories[0])


def read_records(data: bytes) -> tuple[list[tuple[int, int, Any]], int]:
    """Whole records at the beginning of `data`, as (where it begins, its length, the record), and where they end.

    What follows is half written, or damaged. Raises ProtocolError for data that is no msgpack.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(data)), max_bin_len=max(1, len(data)))
    unpacker.feed(data)
    records, end = [], 0
    try:
        for record in unpacker:
            start, end = end, unpacker.tell()
            records.append((start, end - start, record))
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(ErrorCode.BAD_MESSAGE, f"no msgpack at byte {end}: {error!s:.200}") from error
    return records, end
