"""Trajectories and tickets for the learner's unit tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from broker.protocol.trajectory import (
    Integrity,
    Mode,
    Outcome,
    Segment,
    TaskRef,
    Ticket,
    Trajectory,
    TrajectoryHead,
    Verdict,
    VersionRun,
)


def make_ticket(
    group: int = 0,
    member: int = 0,
    size: int = 2,
    mode: Mode = Mode.TRAIN,
    run: str = "run",
    budget: int | None = None,
    env: str = "shop",
) -> Ticket:
    """A training ticket, named as the curriculum names them."""
    return Ticket(
        ticket_id=f"{run}/{mode}/{group}/{member}",
        group_id=f"{run}/{mode}/{group}",
        group_size=size,
        task=TaskRef(env=env, split="train", index=group),
        mode=mode,
        thinking_budget=budget,
    )


def make_segment(
    prompt: Sequence[int] = (1, 2), sampled: Sequence[int] = (3, 4, 5), versions: Sequence[int] | None = None
) -> Segment:
    """A prompt and sampled tokens; `versions` of the sampled ones, one each (0 by default)."""
    token_ids_T = np.asarray([*prompt, *sampled], dtype=np.int32)
    loss_mask_T = np.asarray([False] * len(prompt) + [True] * len(sampled))
    logprobs_T = np.where(loss_mask_T, -1.0, 0.0).astype(np.float32)
    runs = tuple(VersionRun(1, version, 1) for version in versions or [0] * len(sampled))
    return Segment(token_ids_T, loss_mask_T, logprobs_T, runs)


def make_trajectory(
    ticket: Ticket | None = None,
    reward: float = 1.0,
    *,
    outcome: Outcome = Outcome.COMPLETED,
    verdict: Verdict = Verdict.CLEAN,
    segment: Segment | None = None,
    kind: str = "plain",
    thinking: tuple[int, int, int] = (0, 0, 0),
) -> Trajectory:
    """A finished episode. thinking: its tokens, those beyond the budget, forced stops."""
    head = TrajectoryHead(
        ticket=ticket or make_ticket(),
        kind=kind,
        outcome=outcome,
        reward=reward,
        integrity=Integrity(verdict=verdict),
        num_turns=1,
        num_thinking_tokens=thinking[0],
        num_overrun_tokens=thinking[1],
        num_forced_stops=thinking[2],
        actor_id="actor-0",
        finished_at=0.0,
    )
    return Trajectory(head, (segment or make_segment(),))
