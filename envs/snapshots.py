"""The state of an episode as bytes: msgpack of a struct that names its task. Owns what such bytes may be.

They come from another machine, so every field is checked when they are read, and what is wrong is a SnapshotError that
names it. Never pickles, never runs anything.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from envs.interface import SnapshotError, Task

FORMAT: Final = 1  # another number, whenever a state changes its meaning
MAX_SHOWN: Final = 200

Count = Annotated[int, Meta(ge=0, lt=2**53)]
Finite = Annotated[float, Meta(ge=-1e308, le=1e308)]


class State(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What every episode with tools counts. Subclasses add what is theirs, each field with its bounds."""

    num_tool_calls: Count = 0
    num_tool_errors: Count = 0
    num_tool_timeouts: Count = 0


class _Snapshot(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    format: int
    env: str
    split: str
    index: int
    kind: str
    state: msgspec.Raw


StateT = TypeVar("StateT", bound=State)


def pack(task: Task, state: State) -> bytes:
    """The bytes of an episode's state."""
    raw = msgspec.Raw(msgspec.msgpack.encode(state))
    return msgspec.msgpack.encode(_Snapshot(FORMAT, task.env, task.split, task.index, task.kind, raw))


def unpack(task: Task, snapshot: bytes, kind: type[StateT]) -> StateT:
    """The state in these bytes. Raises SnapshotError unless they are one of this task, every field in its bounds."""
    try:
        found = msgspec.msgpack.decode(snapshot, type=_Snapshot)
        named = (found.format, found.env, found.split, found.index, found.kind)
        if named != (FORMAT, task.env, task.split, task.index, task.kind):
            raise SnapshotError(
                f"it is of format {found.format} and the task {found.env:.40} {found.split:.40} {found.index}, not of "
                f"format {FORMAT} and {task.env} {task.split} {task.index}: run the same version and options everywhere"
            )
        return msgspec.msgpack.decode(found.state, type=kind)
    # Besides its own exceptions msgspec raises UnicodeDecodeError, and RecursionError on deep nesting.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise SnapshotError(f"it cannot be read: {error}"[:MAX_SHOWN]) from error
