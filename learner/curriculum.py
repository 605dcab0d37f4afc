"""Which tickets to issue: training, held-out evaluation, reference episodes. Owns the next group's number; no sockets.

Deterministic: group g is always the same task with the same ticket ids, so issuing again after a resume is harmless
(the broker ignores ids that it knows). Admission control bounds staleness: a ticket is issued only while those issued
and not yet consumed number at most (max_staleness + 1) batches, and never more than the remaining steps can use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from broker.process.settings import EnvironmentSection, SamplingSection, Settings
from broker.protocol.trajectory import Mode, PolicyVersion, Sampling, TaskRef, Ticket

EvalStyle = Literal["sampled", "greedy"]
TRAIN_SPLIT = "train"
HELDOUT_SPLIT = "heldout"

# Reference tasks come from the train split too, from indices that reinforcement learning never reaches, so that what
# was imitated is not rehearsed (in an environment with fewer tasks than that, indices may begin again).
REFERENCE_FIRST_INDEX = 1 << 24


class Curriculum:
    """Issues groups 0, 1, 2, ... of the training split."""

    def __init__(self, settings: Settings, next_group: int = 0) -> None:
        self._settings = settings
        self._schedule = EnvironmentSchedule(settings.environments)
        self.next_group = next_group

    @property
    def num_issued(self) -> int:
        """Training tickets of all groups so far, over all lineages."""
        return self.next_group * self._settings.learner.group_size

    def note(self, group_id: str) -> None:
        """A result of this group arrived: after a resume, groups issued after the checkpoint were issued already."""
        number = int(group_id.removeprefix(f"{self._settings.run.name}/train/"))
        self.next_group = max(self.next_group, number + 1)

    def top_up(self, num_outstanding: int, remaining_steps: int, min_version: PolicyVersion) -> list[Ticket]:
        """Tickets to issue now, whole groups. `num_outstanding`: issued and not yet consumed, without those of closed
        groups that have no variance (they fill no batch)."""
        learner = self._settings.learner
        batch = learner.groups_per_step * learner.group_size
        # A quarter of a batch beyond the need: closed groups may turn out to have no variance.
        limit = min((learner.max_staleness + 1) * batch, remaining_steps * batch + batch // 4)
        tickets: list[Ticket] = []
        while remaining_steps > 0 and num_outstanding + len(tickets) + learner.group_size <= limit:
            tickets.extend(self._group(self.next_group, min_version))
            self.next_group += 1
        return tickets

    def _group(self, group: int, min_version: PolicyVersion) -> list[Ticket]:
        run = self._settings.run.name
        env, index = self._schedule.task(group)
        task = TaskRef(env=env, split=TRAIN_SPLIT, index=index)
        sampling = sampling_of(self._settings.sampling)
        size = self._settings.learner.group_size
        return [
            Ticket(
                ticket_id=f"{run}/train/{group}/{i}",
                group_id=f"{run}/train/{group}",
                group_size=size,
                task=task,
                mode=Mode.TRAIN,
                sampling=sampling,
                min_version=min_version,
                deadline_s=self._settings.sampling.deadline_s,
            )
            for i in range(size)
        ]


class EnvironmentSchedule:
    """Smooth weighted round-robin over the environments: deterministic, and close to the weights over any stretch."""

    def __init__(self, environments: Sequence[EnvironmentSection]) -> None:
        self._environments = environments
        self._current = [0.0] * len(environments)
        self._counts = [0] * len(environments)
        self._drawn: list[tuple[str, int]] = []

    def task(self, number: int) -> tuple[str, int]:
        """The environment and task index of the draw `number`."""
        total = sum(environment.weight for environment in self._environments)
        while len(self._drawn) <= number:
            self._current = [c + e.weight for c, e in zip(self._current, self._environments, strict=True)]
            chosen = max(range(len(self._current)), key=lambda i: (self._current[i], -i))
            self._current[chosen] -= total
            self._drawn.append((self._environments[chosen].name, self._counts[chosen]))
            self._counts[chosen] += 1
        return self._drawn[number]


def eval_tickets(
    settings: Settings, phase: str, style: EvalStyle, num_tasks: int, min_version: PolicyVersion
) -> list[Ticket]:
    """One ticket for each of the first held-out tasks; the same tasks in every phase, so that results are paired."""
    sampling = sampling_of(settings.sampling, greedy=style == "greedy")
    return _singles(settings, f"eval/{phase}/{style}", Mode.EVAL, HELDOUT_SPLIT, 0, num_tasks, sampling, min_version)


def reference_tickets(settings: Settings) -> list[Ticket]:
    """The reference episodes of the warm start."""
    num_tasks = settings.learner.warm_start.episodes
    sampling = sampling_of(settings.sampling)
    oldest = PolicyVersion(0, 0)  # no policy samples them
    return _singles(
        settings, "reference", Mode.REFERENCE, TRAIN_SPLIT, REFERENCE_FIRST_INDEX, num_tasks, sampling, oldest
    )


def sampling_of(section: SamplingSection, *, greedy: bool = False) -> Sampling:
    """The wire's sampling parameters."""
    return Sampling(
        temperature=0.0 if greedy else section.temperature,
        top_p=1.0 if greedy else section.top_p,
        max_turn_tokens=section.max_turn_tokens,
        max_episode_tokens=section.max_episode_tokens,
        max_turns=section.max_turns,
    )


def _singles(
    settings: Settings,
    family: str,
    mode: Mode,
    split: str,
    first_index: int,
    num_tasks: int,
    sampling: Sampling,
    min_version: PolicyVersion,
) -> list[Ticket]:
    schedule = EnvironmentSchedule(settings.environments)
    tickets = []
    for k in range(num_tasks):
        env, index = schedule.task(k)
        ticket_id = f"{settings.run.name}/{family}/{k}"
        tickets.append(
            Ticket(
                ticket_id=ticket_id,
                group_id=ticket_id,
                group_size=1,
                task=TaskRef(env=env, split=split, index=first_index + index),
                mode=mode,
                sampling=sampling,
                min_version=min_version,
                deadline_s=settings.sampling.deadline_s,
            )
        )
    return tickets
