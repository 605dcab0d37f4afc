"""Files of trajectories: `*.msgpack`, one packed parcel after the other, each as it would stand on the wire.

Owns the format: a msgpack stream of lists of frames, as `broker.protocol` makes them. A writer checks nothing, because
it is also there for what ought not to exist; a reader checks all that a receiver of the message would, unless it is
told not to.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgpack
import numpy as np

from broker.process.lifecycle import ErgonError
from broker.protocol.codec import read_parcel
from broker.protocol.commands import Item, SegmentHead, TrajectoryBody, parse_body
from broker.protocol.errors import ProtocolError
from broker.protocol.frames import DEFAULT_LIMITS, Frame, Message, decode, encode
from broker.protocol.trajectory import Segment, Trajectory
from learner.batching import COUNTED, Consumed

SUFFIX = ".msgpack"


def write_trajectories(path: Path, trajectories: Iterable[Trajectory]) -> int:
    """Write a file, whole or not at all, durably; returns how many trajectories it has."""
    draft = path.with_name(path.name + ".tmp")
    number = 0
    with draft.open("wb") as file:
        for trajectory in trajectories:
            file.write(msgpack.packb([bytes(frame) for frame in _frames(trajectory)]))
            number += 1
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    return number


def read_trajectories(path: Path, *, checked: bool = True) -> Iterator[Trajectory]:
    """The trajectories of one file. Raises ErgonError where it cannot be read or is not such a file.

    Not `checked`: numbers are taken as they are, also a log-prob that is none.
    """
    limit = DEFAULT_LIMITS.max_message_bytes
    try:
        with path.open("rb") as file:
            unpacker = msgpack.Unpacker(file, max_buffer_size=limit, max_bin_len=limit)
            for number, frames in enumerate(unpacker):
                if not isinstance(frames, list) or not all(isinstance(frame, bytes) for frame in frames):
                    raise ErgonError(f"{path} is no file of trajectories: item {number} is not a list of frames")
                yield from _trajectories(decode(frames), checked)
            if unpacker.tell() != path.stat().st_size:
                raise ErgonError(f"{path} is cut short at byte {unpacker.tell()}; write it anew")
    except OSError as error:
        raise ErgonError(f"the trajectories {path} cannot be read: {error.strerror}") from error
    except (ProtocolError, ValueError, msgpack.exceptions.UnpackException) as error:
        raise ErgonError(f"{path} is no file of trajectories: {error}") from error


def _frames(trajectory: Trajectory) -> list[Frame]:
    segments = trajectory.segments
    heads = tuple(SegmentHead(num_tokens=s.token_ids_T.size, version_runs=s.version_runs) for s in segments)
    arrays = (
        np.concatenate([s.token_ids_T for s in segments]).astype("<i4"),
        np.concatenate([s.loss_mask_T for s in segments]).astype("|b1"),
        np.concatenate([s.logprobs_T for s in segments]).astype("<f4"),
    )
    return encode(TrajectoryBody(items=(Item(head=trajectory.head, segments=heads),)).pack(arrays))


def _trajectories(message: Message, checked: bool) -> Iterator[Trajectory]:
    body = read_parcel(message) if checked else parse_body(message, TrajectoryBody)
    token_ids_N, mask_N, logprobs_N = message.arrays
    end = 0
    for item in body.items:
        segments = []
        for head in item.segments:
            at = slice(end, end := end + head.num_tokens)
            segments.append(Segment(token_ids_N[at], mask_N[at], logprobs_N[at], head.version_runs))
        yield Trajectory(item.head, tuple(segments))


class Recorder:
    """Keeps what a run consumed, one file for each batch, named by how many tickets the run had consumed after it.

    After a resume the files of the history that was lost are removed, so that no episode is there twice.
    """

    def __init__(self, directory: Path, which: str, pass_reward: float, num_consumed: int) -> None:
        self._directory, self._which, self._pass_reward = directory, which, pass_reward
        if directory.is_dir():
            for path in directory.glob(f"*{SUFFIX}"):
                if int(path.stem) > num_consumed:
                    path.unlink()

    def add(self, consumed: Iterable[Consumed], num_consumed: int) -> None:
        """Take a batch; on disk when this returns."""
        if self._which == "none":
            return
        floor = self._pass_reward if self._which == "passed" else -math.inf
        chosen = [c.trajectory for c in consumed if c.reason in COUNTED and c.trajectory.head.reward >= floor]
        if chosen:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_trajectories(self._directory / f"{num_consumed:012d}{SUFFIX}", chosen)


def find_recordings(places: Sequence[Path]) -> list[Path]:
    """The files, and those in the directories, in the order of their names. Raises ErgonError where one is missing."""
    found: list[Path] = []
    for place in places:
        files = sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else [place]
        if not files or not all(file.is_file() for file in files):
            raise ErgonError(f"{place} has no recorded trajectories; name a file, or a directory with *{SUFFIX} files")
        found += files
    return found
