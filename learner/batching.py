"""Trajectories -> groups -> batches. Owns what was received and not yet consumed; pure logic, no sockets, no torch.

A group closes when each of its tickets has a trajectory or a dead letter. A closed group without variance has no
gradient: it is consumed at once, counted as masked, and the curriculum may issue another. What was consumed leaves with
the next batch and is acknowledged with the checkpoint that contains it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from broker.process.loss_settings import LossSection
from broker.protocol.trajectory import Outcome, Segment, Trajectory, Verdict
from learner.engine import TrainSequence
from learner.losses.advantage import group_advantages, has_variance, soft_overlong_punishment


class DeadNotice(Protocol):
    """A ticket that will never have a trajectory."""

    @property
    def ticket_id(self) -> str:
        """Which one."""
        ...

    @property
    def group_id(self) -> str:
        """Its group, which closes without it."""
        ...


class Reason(StrEnum):
    """Why a consumed trajectory did not reach the gradient; `trained` where it did."""

    TRAINED = "trained"
    ZERO_VARIANCE = "zero_variance"
    SCREENED = "screened"
    ENV_FAILURE = "env_failure"
    STALE = "stale"
    SURPLUS = "surplus"
    OVERLONG = "overlong"
    NOT_FINITE = "not_finite"


COUNTED = frozenset({Reason.TRAINED, Reason.ZERO_VARIANCE, Reason.STALE, Reason.OVERLONG, Reason.NOT_FINITE})
"""Reasons of episodes that say how well the policy does: all but failures, screened ones and surplus."""


@dataclass(frozen=True, slots=True, eq=False)
class Consumed:
    """One trajectory that left the batcher, and what became of it."""

    trajectory: Trajectory
    reason: Reason

    @property
    def trained(self) -> bool:
        """Whether it contributed to a gradient."""
        return self.reason is Reason.TRAINED


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one optimiser step consumes. Without sequences there is nothing to train: the step is skipped.

    staleness_N: learner version minus sampling version of every trained token. num_stale_tokens: tokens masked because
    theirs was beyond the bound. dead_ids: dead letters of the consumed groups, to be acknowledged with them.
    """

    sequences: tuple[TrainSequence, ...]
    consumed: tuple[Consumed, ...]
    dead_ids: tuple[str, ...]
    num_groups: int
    num_zero_variance_groups: int
    num_stale_tokens: int
    staleness_N: npt.NDArray[np.int32]

    @property
    def ids(self) -> list[str]:
        """Everything to acknowledge once a checkpoint contains this batch."""
        return [item.trajectory.ticket.ticket_id for item in self.consumed] + list(self.dead_ids)


@dataclass(slots=True)
class _Group:
    size: int
    trajectories: list[Trajectory] = field(default_factory=list)
    dead_ids: list[str] = field(default_factory=list)

    @property
    def closed(self) -> bool:
        return len(self.trajectories) + len(self.dead_ids) >= self.size


class Batcher:
    """Gathers trajectories of mode `train`. Every id is admitted once; a second one is refused and counted."""

    def __init__(
        self, *, groups_per_step: int, max_groups_per_step: int, group_size: int, max_staleness: int, loss: LossSection
    ) -> None:
        self._groups_per_step = groups_per_step
        self._max_groups_per_step = max(max_groups_per_step, groups_per_step)
        self._group_size = group_size
        self._max_staleness = max_staleness
        self._loss = loss
        self._open: dict[str, _Group] = {}
        self._ready: deque[_Group] = deque()
        self._flat: list[_Group] = []
        self._held_ids: set[str] = set()
        self.num_refused = 0

    @property
    def num_held(self) -> int:
        """Trajectories and dead letters received and not yet in a batch."""
        return len(self._held_ids)

    @property
    def num_without_gradient(self) -> int:
        """Those of them that lie in closed groups without variance: they fill no batch, so others may be issued."""
        return sum(len(group.trajectories) + len(group.dead_ids) for group in self._flat)

    @property
    def num_ready_groups(self) -> int:
        """Closed groups with variance."""
        return len(self._ready)

    def add(self, trajectory: Trajectory) -> bool:
        """Admit a trajectory; False (and nothing happens) where its ticket is already here."""
        ticket = trajectory.ticket
        if not self._admit(ticket.ticket_id):
            return False
        group = self._open.setdefault(ticket.group_id, _Group(ticket.group_size))
        group.trajectories.append(trajectory)
        self._close(ticket.group_id, group)
        return True

    def add_dead(self, notice: DeadNotice) -> bool:
        """Admit a dead letter: its group closes without that episode."""
        if not self._admit(notice.ticket_id):
            return False
        group = self._open.setdefault(notice.group_id, _Group(self._group_size))
        group.dead_ids.append(notice.ticket_id)
        self._close(notice.group_id, group)
        return True

    def next(self, version: int) -> Batch | None:
        """The next batch as of this learner version, or None while too few groups are closed."""
        num_closed = len(self._ready) + len(self._flat)
        if len(self._ready) < self._groups_per_step and num_closed < self._max_groups_per_step:
            return None
        # Not more than groups_per_step: what is left over is the start of the next batch.
        taken = [self._ready.popleft() for _ in range(min(self._groups_per_step, len(self._ready)))]
        flat, self._flat = self._flat, []
        return self._batch(taken, flat, version)

    def drain(self) -> Batch:
        """Everything still held, as surplus: consumed without a gradient when training is over."""
        groups = [*self._ready, *self._flat, *self._open.values()]
        self._ready.clear()
        self._flat, self._open = [], {}
        self._held_ids.clear()
        consumed = [Consumed(trajectory, Reason.SURPLUS) for group in groups for trajectory in group.trajectories]
        dead_ids = tuple(ticket_id for group in groups for ticket_id in group.dead_ids)
        return Batch((), tuple(consumed), dead_ids, len(groups), 0, 0, np.zeros(0, dtype=np.int32))

    def _admit(self, ticket_id: str) -> bool:
        if ticket_id in self._held_ids:
            self.num_refused += 1
            return False
        self._held_ids.add(ticket_id)
        return True

    def _close(self, group_id: str, group: _Group) -> None:
        if not group.closed:
            return
        del self._open[group_id]
        rewards_G, counted_G, _ = judge(group.trajectories, self._loss)
        (self._ready.append if has_variance(rewards_G, counted_G) else self._flat.append)(group)

    def _batch(self, taken: Sequence[_Group], flat: Sequence[_Group], version: int) -> Batch:
        sequences: list[TrainSequence] = []
        consumed: list[Consumed] = []
        staleness: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
        num_stale = 0
        for group in flat:
            _, _, reasons = judge(group.trajectories, self._loss)
            for trajectory, reason in zip(group.trajectories, reasons, strict=True):
                consumed.append(Consumed(trajectory, Reason.ZERO_VARIANCE if reason is Reason.TRAINED else reason))
        for group in taken:
            for trajectory, advantage, reason in self._compared(group):
                fate: Reason = reason
                if reason is Reason.TRAINED:
                    made, num_masked = train_sequences(trajectory, advantage, version, self._max_staleness)
                    num_stale += num_masked
                    staleness.extend(s.staleness_T[s.loss_mask_T] for s in made)
                    sequences.extend(made)
                    fate = Reason.TRAINED if made else Reason.STALE
                consumed.append(Consumed(trajectory, fate))
        groups = [*flat, *taken]
        dead_ids = tuple(ticket_id for group in groups for ticket_id in group.dead_ids)
        batch = Batch(
            tuple(sequences), tuple(consumed), dead_ids, len(groups), len(flat), num_stale, np.concatenate(staleness)
        )
        self._held_ids.difference_update(batch.ids)
        return batch

    def _compared(self, group: _Group) -> list[tuple[Trajectory, float, Reason]]:
        """Each trajectory of a group with its advantage."""
        loss = self._loss
        rewards_G, counted_G, reasons = judge(group.trajectories, loss)
        advantages_G = group_advantages(rewards_G, counted_G, loss.baseline, divide_by_std=loss.divide_by_std)
        return list(zip(group.trajectories, advantages_G.tolist(), reasons, strict=True))


def judge(
    trajectories: Sequence[Trajectory], loss: LossSection
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], list[Reason]]:
    """Rewards as the advantage sees them, which of them count in the group's statistics, and why the others do not."""
    reasons = [_reason(trajectory, loss) for trajectory in trajectories]
    rewards_G = np.asarray([_reward(trajectory, loss) for trajectory in trajectories], dtype=np.float64)
    counted_G = np.asarray([reason is Reason.TRAINED for reason in reasons], dtype=np.bool_)
    return rewards_G, counted_G, reasons


def _reason(trajectory: Trajectory, loss: LossSection) -> Reason:
    head = trajectory.head
    if head.integrity.verdict is not Verdict.CLEAN or head.outcome is Outcome.EXPLOIT:
        return Reason.SCREENED
    if head.outcome in (Outcome.ENV_FAILURE, Outcome.INFRA_FAILURE):
        return Reason.ENV_FAILURE
    if loss.overlong == "mask" and head.outcome is Outcome.TRUNCATED_TOKENS:
        # Not in the baseline either: what remains is the gradient of the reward among episodes that came to an end.
        return Reason.OVERLONG
    return Reason.TRAINED


def _reward(trajectory: Trajectory, loss: LossSection) -> float:
    reward = trajectory.head.reward
    if loss.overlong == "soft":
        reward += soft_overlong_punishment(trajectory.num_sampled, loss.overlong_tokens, loss.overlong_buffer)
    return reward


def train_sequences(
    trajectory: Trajectory, advantage: float, version: int, max_staleness: int
) -> tuple[list[TrainSequence], int]:
    """The sequences of a trajectory that have a trained token, one for each segment; and the number of stale tokens.

    A sequence's share of the episode is that of its trained tokens, so that a token weighs what it would weigh if the
    history had never been edited.
    """
    made = [train_sequence(segment, advantage, version, max_staleness) for segment in trajectory.segments]
    num_stale = sum(int((s.staleness_T > max_staleness).sum()) for s in made)
    counts = [np.count_nonzero(s.loss_mask_T[1:]) for s in made]
    return [replace(s, weight=n / sum(counts)) for s, n in zip(made, counts, strict=True) if n], num_stale


def train_sequence(segment: Segment, advantage: float, version: int, max_staleness: int) -> TrainSequence:
    """A segment as the loss sees it. Tokens more than `max_staleness` versions old are masked.

    Staleness compares version numbers across lineages too (a resume goes on counting from its checkpoint); a token from
    a history that was lost may carry a newer number, which counts as 0.
    """
    staleness_T = np.zeros(segment.token_ids_T.shape, dtype=np.int32)
    runs = segment.version_runs
    if runs:
        behind = np.maximum(version - np.asarray([run.version for run in runs], dtype=np.int64), 0).astype(np.int32)
        staleness_T[segment.loss_mask_T] = np.repeat(behind, [run.num_tokens for run in runs])
    return TrainSequence(
        token_ids_T=segment.token_ids_T,
        loss_mask_T=segment.loss_mask_T & (staleness_T <= max_staleness),
        logprobs_T=segment.logprobs_T,
        advantage=advantage,
        staleness_T=staleness_T,
    )


def rewards_by_kind(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean reward of each kind of task (its environment's name where it has no kinds)."""
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for trajectory in trajectories:
        kind = trajectory.head.kind or trajectory.ticket.task.env
        sums[kind] += trajectory.head.reward  # type: ignore[assignment]  # a Counter of floats
        counts[kind] += 1
    return {kind: sums[kind] / counts[kind] for kind in sorted(counts)}
