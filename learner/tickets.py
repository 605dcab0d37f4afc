"""What a ticket says: ids, tasks and sampling of training, evaluation and reference episodes. Pure.

Ids are a function of the run's name and a number, so issuing again after a resume is harmless: the broker ignores ids
that it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from broker.process.settings import SamplingSection, Settings
from broker.process.thinking_settings import Budget, budget_name
from broker.protocol.trajectory import Mode, PolicyVersion, Sampling, TaskRef, Ticket
from learner.budgets import draw_budget
from learner.mixture import spread

EvalStyle = Literal["sampled", "greedy"]
TRAIN_SPLIT = "train"
HELDOUT_SPLIT = "heldout"
BUDGET_MARK = "b"  # before the budget in the ids of evaluations that go through several

# Reference tasks come from the train split too, from indices that reinforcement learning never reaches, so that what
# was imitated is not rehearsed (in an environment with fewer tasks than that, indices may begin again).
REFERENCE_FIRST_INDEX = 1 << 24


def train_tickets(settings: Settings, group: int, env: str, index: int, min_version: PolicyVersion) -> list[Ticket]:
    """The tickets of one training group, which share a thinking budget."""
    run, size = settings.run.name, settings.learner.group_size
    task = TaskRef(env=env, split=TRAIN_SPLIT, index=index)
    sampling = sampling_of(settings.sampling)
    budget = group_budget(settings, group)
    return [
        Ticket(
            ticket_id=f"{run}/train/{group}/{i}",
            group_id=f"{run}/train/{group}",
            group_size=size,
            task=task,
            mode=Mode.TRAIN,
            sampling=sampling,
            thinking_budget=budget,
            min_version=min_version,
            deadline_s=settings.sampling.deadline_s,
        )
        for i in range(size)
    ]


def group_budget(settings: Settings, group: int) -> Budget:
    """The thinking budget of a training group."""
    return draw_budget(settings.thinking.budgets, settings.run.seed, "train", group)


def group_number(group_id: str, run: str) -> int:
    """The number of a training group."""
    return int(group_id.removeprefix(f"{run}/train/"))


def eval_tickets(
    settings: Settings, phase: str, style: EvalStyle, num_tasks: int, min_version: PolicyVersion
) -> list[Ticket]:
    """One ticket for each of the first held-out tasks with each of `eval.budgets`; the same tasks in every phase and
    with every budget, so that results are paired."""
    sampling, tickets = sampling_of(settings.sampling, greedy=style == "greedy"), list[Ticket]()
    for budget in settings.eval.token_budgets:
        family = f"eval/{phase}/{style}" + (f"/{BUDGET_MARK}{budget_name(budget)}" if settings.eval.budgets else "")
        budgets = [budget] * num_tasks
        tickets += _singles(settings, family, Mode.EVAL, HELDOUT_SPLIT, 0, budgets, sampling, min_version)
    return tickets


def reference_tickets(settings: Settings) -> list[Ticket]:
    """The reference episodes of the warm start, with budgets of the training's distribution."""
    drawn, seed = settings.thinking.budgets, settings.run.seed
    budgets = [draw_budget(drawn, seed, "reference", k) for k in range(settings.learner.warm_start.episodes)]
    sampling = sampling_of(settings.sampling)
    oldest = PolicyVersion(0, 0)  # no policy samples them
    return _singles(
        settings, "reference", Mode.REFERENCE, TRAIN_SPLIT, REFERENCE_FIRST_INDEX, budgets, sampling, oldest
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
    budgets: Sequence[Budget],
    sampling: Sampling,
    min_version: PolicyVersion,
) -> list[Ticket]:
    """A group of one ticket for each budget."""
    tickets = []
    for k, (env, index) in enumerate(spread(settings.environments, len(budgets))):
        ticket_id = f"{settings.run.name}/{family}/{k}"
        tickets.append(
            Ticket(
                ticket_id=ticket_id,
                group_id=ticket_id,
                group_size=1,
                task=TaskRef(env=env, split=split, index=first_index + index),
                mode=mode,
                sampling=sampling,
                thinking_budget=budgets[k],
                min_version=min_version,
                deadline_s=settings.sampling.deadline_s,
            )
        )
    return tickets
