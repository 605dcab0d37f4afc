"""The messages whose bytes never change within a version, each made twice: by this project's code, and by hand.

The files beside this module hold them, one frame of hexadecimal digits per line. By hand means: plain maps, packed by
another encoder, and arrays written out with `struct`. A difference between the two, or to the file, means another
protocol: raise the version in `broker/protocol/frames.py` first (once there has been a release), then

    python -m tests.contract.golden --write
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import numpy as np

from broker.protocol.codec import pack_trajectories
from broker.protocol.commands import (
    Deliver,
    Durable,
    HandedOver,
    Hello,
    PartialHead,
    Role,
    TicketBody,
    UnfinishedTurn,
)
from broker.protocol.frames import PROTOCOL_MAJOR, PROTOCOL_MINOR, Message, encode
from broker.protocol.partials import Partial, pack_continue, pack_handover
from broker.protocol.trajectory import (
    Integrity,
    Mode,
    Outcome,
    PolicyVersion,
    Sampling,
    Segment,
    TaskRef,
    Ticket,
    Trajectory,
    TrajectoryHead,
    Verdict,
    VersionRun,
)

ROOT = Path(__file__).parent
CURRENT = ROOT / f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}"


def frames_of(path: Path) -> list[bytes]:
    """The frames in a golden file."""
    return [bytes.fromhex(line) for line in path.read_text().split()]


def text_of(frames: list[bytes]) -> str:
    """A golden file of these frames."""
    return "".join(f"{frame.hex()}\n" for frame in frames)


# --- by this project's code

TICKETS = (
    Ticket(
        ticket_id="a1",
        group_id="group-a",
        group_size=2,
        task=TaskRef(env="shop", split="train", index=7),
        mode=Mode.TRAIN,
        sampling=Sampling(temperature=0.5),
        min_version=PolicyVersion(1, 2),
    ),
    Ticket(
        ticket_id="b1",
        group_id="group-b",
        group_size=1,
        task=TaskRef(env="shop", split="heldout", index=300),
        mode=Mode.EVAL,
        thinking_budget=128,
        deadline_s=90.0,
        attempt=1,
    ),
)


def trajectories() -> tuple[Trajectory, ...]:
    """Two, the first of two segments: the example of PROTOCOL.md."""
    solved = TrajectoryHead(
        ticket=TICKETS[0],
        kind="sum",
        outcome=Outcome.COMPLETED,
        reward=1.0,
        reward_components={"exact": 1.0},
        num_turns=2,
        num_tool_calls=1,
        timings_s={"total": 1.5, "model": 1.0, "tool": 0.5},
        actor_id="actor-0",
        finished_at=1_700_000_000.0,
    )
    late = TrajectoryHead(
        ticket=TICKETS[1],
        kind="sum",
        outcome=Outcome.TIMEOUT,
        reward=0.0,
        integrity=Integrity(verdict=Verdict.SCREENED, findings=("canary",)),
        num_turns=1,
        num_malformed=1,
        num_thinking_tokens=130,
        num_overrun_tokens=2,
        num_forced_stops=1,
        actor_id="actor-0",
        finished_at=1_700_000_001.5,
    )
    return (
        Trajectory(
            solved,
            (
                _segment(
                    [5, 6, 7, 8], [0, 1, 1, 1], [0.0, -0.5, -1.0, -0.25], VersionRun(1, 2, 2), VersionRun(1, 3, 1)
                ),
                _segment([9, 10], [0, 1], [0.0, -2.0], VersionRun(1, 3, 1)),
            ),
        ),
        Trajectory(late, (_segment([11, 12, 13], [0, 0, 1], [0.0, 0.0, 0.0], VersionRun(2, 0, 1)),)),
    )


def partial() -> Partial:
    """In the middle of its second turn; the first segment was ended by an edit of the history."""
    head = PartialHead(
        num_turns=1,
        num_tool_calls=1,
        num_thinking_tokens=1,
        turn=UnfinishedTurn(num_tokens=2, began_open=True),
        total_s=1.5,
        model_s=1.0,
        tool_s=0.5,
    )
    segments = (
        _segment([5, 6, 7], [0, 1, 1], [0.0, -0.5, -1.0], VersionRun(1, 2, 2)),
        _segment([8, 9, 10], [0, 1, 1], [0.0, -0.25, -2.0], VersionRun(1, 2, 1), VersionRun(1, 3, 1)),
    )
    return Partial(head, segments, b"state")


def _segment(token_ids: list[int], mask: list[int], logprobs: list[float], *runs: VersionRun) -> Segment:
    return Segment(np.array(token_ids, np.int32), np.array(mask, np.bool_), np.array(logprobs, np.float32), runs)


def messages() -> Mapping[str, Message]:
    """By the name of the file."""
    return {
        "hello": Hello(role=Role.ACTOR, peer_id="actor-0", run_id="run", session="5e55").pack(),
        "ticket": TicketBody(tickets=TICKETS).pack(),
        "trajectory": pack_trajectories(trajectories()),
        "deliver": pack_trajectories(trajectories(), Deliver),
        "handover": pack_handover("a1", partial()),
        "handed_over": HandedOver(ticket_id="a1", status="kept").pack(),
        "continue": pack_continue(TICKETS[0], pack_handover("a1", partial())),
        "durable": Durable(results=(("a1", "accepted"), ("b1", "duplicate"))).pack(),
    }


def by_code(name: str) -> list[bytes]:
    """The frames that this project sends."""
    return [bytes(frame) for frame in encode(messages()[name])]


# --- by hand

_SAMPLING = {"temperature": 0.5, "top_p": 1.0, "max_turn_tokens": 256, "max_episode_tokens": 2048, "max_turns": 8}
_TICKETS: list[dict[str, Any]] = [
    {
        "ticket_id": "a1",
        "group_id": "group-a",
        "group_size": 2,
        "task": {"env": "shop", "split": "train", "index": 7},
        "mode": "train",
        "sampling": _SAMPLING,
        "thinking_budget": None,
        "min_version": [1, 2],
        "deadline_s": 600.0,
        "attempt": 0,
    },
    {
        "ticket_id": "b1",
        "group_id": "group-b",
        "group_size": 1,
        "task": {"env": "shop", "split": "heldout", "index": 300},
        "mode": "eval",
        "sampling": _SAMPLING | {"temperature": 1.0},
        "thinking_budget": 128,
        "min_version": [0, 0],
        "deadline_s": 90.0,
        "attempt": 1,
    },
]
_ITEMS: list[dict[str, Any]] = [
    {
        "head": {
            "ticket": _TICKETS[0],
            "kind": "sum",
            "outcome": "completed",
            "reward": 1.0,
            "reward_components": {"exact": 1.0},
            "integrity": {"verdict": "clean", "findings": []},
            "num_turns": 2,
            "num_tool_calls": 1,
            "num_malformed": 0,
            "num_thinking_tokens": 0,
            "num_overrun_tokens": 0,
            "num_forced_stops": 0,
            "timings_s": {"total": 1.5, "model": 1.0, "tool": 0.5},
            "actor_id": "actor-0",
            "finished_at": 1_700_000_000.0,
        },
        "segments": [
            {"num_tokens": 4, "version_runs": [[1, 2, 2], [1, 3, 1]]},
            {"num_tokens": 2, "version_runs": [[1, 3, 1]]},
        ],
    },
    {
        "head": {
            "ticket": _TICKETS[1],
            "kind": "sum",
            "outcome": "timeout",
            "reward": 0.0,
            "reward_components": {},
            "integrity": {"verdict": "screened", "findings": ["canary"]},
            "num_turns": 1,
            "num_tool_calls": 0,
            "num_malformed": 1,
            "num_thinking_tokens": 130,
            "num_overrun_tokens": 2,
            "num_forced_stops": 1,
            "timings_s": {},
            "actor_id": "actor-0",
            "finished_at": 1_700_000_001.5,
        },
        "segments": [{"num_tokens": 3, "version_runs": [[2, 0, 1]]}],
    },
]
_SPECS = [["<i4", [9]], ["|b1", [9]], ["<f4", [9]]]
_ARRAYS = [
    struct.pack("<9i", *range(5, 14)),
    struct.pack("<9?", 0, 1, 1, 1, 0, 1, 0, 0, 1),
    struct.pack("<9f", 0.0, -0.5, -1.0, -0.25, 0.0, -2.0, 0.0, 0.0, 0.0),
]

_PARTIAL: dict[str, Any] = {
    "head": {
        "num_turns": 1,
        "num_tool_calls": 1,
        "num_malformed": 0,
        "num_thinking_tokens": 1,
        "num_overrun_tokens": 0,
        "num_forced_stops": 0,
        "turn": {"num_tokens": 2, "began_open": True},
        "total_s": 1.5,
        "model_s": 1.0,
        "tool_s": 0.5,
    },
    "segments": [
        {"num_tokens": 3, "version_runs": [[1, 2, 2]]},
        {"num_tokens": 3, "version_runs": [[1, 2, 1], [1, 3, 1]]},
    ],
}
_PARTIAL_SPECS = [["<i4", [6]], ["|b1", [6]], ["<f4", [6]], ["|u1", [5]]]
_PARTIAL_ARRAYS = [
    struct.pack("<6i", *range(5, 11)),
    struct.pack("<6?", 0, 1, 1, 0, 1, 1),
    struct.pack("<6f", 0.0, -0.5, -1.0, 0.0, -0.25, -2.0),
    b"state",
]

ENVELOPES: Mapping[str, dict[str, Any]] = {
    "hello": {
        "t": "HELLO",
        "b": {"role": "actor", "peer_id": "actor-0", "run_id": "run", "session": "5e55"},
        "a": [],
    },
    "ticket": {"t": "TICKET", "b": {"tickets": _TICKETS}, "a": []},
    "trajectory": {"t": "TRAJECTORY", "b": {"items": _ITEMS}, "a": _SPECS},
    "deliver": {"t": "DELIVER", "b": {"items": _ITEMS}, "a": _SPECS},
    "handover": {"t": "HANDOVER", "b": {"ticket_id": "a1", **_PARTIAL}, "a": _PARTIAL_SPECS},
    "handed_over": {"t": "HANDED_OVER", "b": {"ticket_id": "a1", "status": "kept"}, "a": []},
    "continue": {"t": "CONTINUE", "b": {"ticket": _TICKETS[0], **_PARTIAL}, "a": _PARTIAL_SPECS},
    "durable": {"t": "DURABLE", "b": {"results": [["a1", "accepted"], ["b1", "duplicate"]]}, "a": []},
}


def by_hand(name: str) -> list[bytes]:
    """The frames as another encoder makes them from plain maps."""
    envelope = ENVELOPES[name]
    arrays = {len(_SPECS): _ARRAYS, len(_PARTIAL_SPECS): _PARTIAL_ARRAYS}.get(len(envelope["a"]), [])
    return [b"ERGN\x01\x00", msgpack.packb(envelope), *arrays]


def plain(facts: msgspec.Struct) -> Any:
    """Facts as the plain maps above have them: tuples are lists, members of an enumeration are text."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(facts))
