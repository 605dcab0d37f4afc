"""What a ticket says: ids, tasks and sampling of training, evaluation and reference episodes. Pure.

Ids are a function of the run's name and a number, so issuing again after a resume is harmless: the broker ignores ids
that it knows.
"""

from __future__ import annotations

from typing import Literal

from broker.process.settings import SamplingSection, Settings
from broker.protocol.trajectory import Mode, PolicyVersion, Sampling, TaskRef, Ticket
from learner.mixture import spread

EvalStyle = Literal["sampled", "greedy"]
TRAIN_SPLIT = "train"
HELDOUT_SPLIT = "heldout"

# Reference tasks come from the train split too, from indices that reinforcement learning never reaches, so that what
# was imitated is not rehearsed (in an environment with fewer tasks than that, indices may begin again).
REFERENCE_FIRST_INDEX = 1 << 24


def train_tickets(settings: Settings, group: int, env: str, index: int, min_version: PolicyVersion) -> list[Ticket]:
    """The tickets of one training group."""
    run, size = settings.run.name, settings.learner.group_size
    task = TaskRef(env=env, split=TRAIN_SPLIT, index=index)
    sampling = sampling_of(settings.sampling)
    return [
        Ticket(
            ticket_id=f"{run}/train/{group}/{i}",
            group_id=f"{run}/train/{group}",
            group_size=size,
            task=task,
            mode=Mode.TRAIN,
            sampling=sampling,
            min_version=min_version,
            deadline_s=settings.sampling.deadline_s,
        )
        for i in range(size)
    ]


def group_number(group_id: str, run: str) -> int:
    """The number of a training group."""
    return int(group_id.removeprefix(f"{run}/train/"))


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
    tickets = []
    for k, (env, index) in enumerate(spread(settings.environments, num_tasks)):
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
