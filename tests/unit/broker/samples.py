"""Tickets and trajectories for the broker's tests."""

from __future__ import annotations

import numpy as np

from broker.protocol.trajectory import (
    Mode,
    Outcome,
    PolicyVersion,
    Sampling,
    Segment,
    TaskRef,
    Ticket,
    Trajectory,
    TrajectoryHead,
    VersionRun,
)


def make_ticket(ticket_id: str, mode: Mode = Mode.TRAIN, attempt: int = 0) -> Ticket:
    """A ticket with nothing remarkable about it."""
    return Ticket(
        ticket_id=ticket_id,
        group_id=f"group-{ticket_id[:1]}",
        group_size=2,
        task=TaskRef(env="shop", split="train", index=7),
        mode=mode,
        sampling=Sampling(temperature=0.5),
        min_version=PolicyVersion(1, 2),
        attempt=attempt,
    )


def make_segment(
    num_prompt: int = 3, runs: tuple[VersionRun, ...] = (VersionRun(1, 2, 2), VersionRun(1, 3, 1))
) -> Segment:
    """A prompt, then what the policy sampled."""
    num_sampled = sum(run.num_tokens for run in runs)
    mask_T = np.array([False] * num_prompt + [True] * num_sampled)
    logprobs_T = np.where(mask_T, np.linspace(-2.0, 0.0, mask_T.size), 0.0).astype(np.float32)
    return Segment(np.arange(mask_T.size, dtype=np.int32), mask_T, logprobs_T, runs)


def make_trajectory(ticket: Ticket, actor_id: str = "actor-0", num_segments: int = 1) -> Trajectory:
    """The record of an episode that solved its task."""
    head = TrajectoryHead(
        ticket=ticket,
        kind="sum",
        outcome=Outcome.COMPLETED,
        reward=1.0,
        reward_components={"exact": 1.0},
        num_turns=2,
        num_tool_calls=1,
        timings_s={"total": 1.5, "model": 1.0, "tool": 0.5},
        actor_id=actor_id,
        finished_at=1_700_000_000.0,
    )
    return Trajectory(head, tuple(make_segment() for _ in range(num_segments)))
