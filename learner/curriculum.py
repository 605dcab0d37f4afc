"""Which training groups to issue. Owns the next group's number, what is known of the tasks, and issued.jsonl.

What a group's task is may depend on results, and a learner that resumes knows fewer of them than the one before it did.
So every choice is written to issued.jsonl, durably, before its tickets are issued, and a resumed learner repeats the
choices that lie beyond its checkpoint: an id is bound to one task for ever, and no ticket of a group is left unissued.

Admission control bounds staleness: a ticket is issued only while those issued and not yet consumed number at most
(max_staleness + 1) batches (fewer where a batch is several optimiser steps, which are as many versions), and never more
than the remaining steps can use.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from broker.process.thinking_settings import budget_bucket
from broker.protocol.trajectory import PolicyVersion, Ticket
from learner.audit import LineFile
from learner.batching import COUNTED, Consumed
from learner.difficulty import TaskPool
from learner.mixture import Mixture
from learner.tickets import group_budget, group_number, train_tickets


class Choice(NamedTuple):
    """The task of a group, and the step whose weights it was drawn by."""

    group: int
    step: int
    env: str
    task: int


class IssueLog:
    """issued.jsonl: a line for every training group ever issued, in order, on disk before its tickets leave."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = LineFile(path)
        lines = path.read_bytes().split(b"\n")
        if torn := lines.pop():  # killed in the middle of it; nothing that a torn line names was issued
            self._file.cut(path.stat().st_size - len(torn))
        self._lines = lines

    def beyond(self, next_group: int) -> list[Choice]:
        """The choices from group `next_group` on. Raises ErgonError where the file is not whole."""
        lines, self._lines = self._lines, []
        try:
            choices = [Choice(*json.loads(line)) for line in lines[next_group:]]
        except (ValueError, TypeError) as error:
            raise ErgonError(
                f"{self._path} is damaged ({error}); restore it, or begin anew: ergon run --new"
            ) from error
        numbers = [choice.group for choice in choices]
        if len(lines) < next_group or numbers != list(range(next_group, next_group + len(choices))):
            raise ErgonError(
                f"{self._path} does not have a line for each group, but the newest checkpoint has {next_group} groups; "
                "restore it, or begin anew: ergon run --new"
            )
        return choices

    def append(self, choices: Iterable[Choice]) -> None:
        """Durable when this returns."""
        self._file.append(choices, durable=True)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Curriculum:
    """Issues groups 0, 1, 2, ... of the training split, `max_groups` of them at most.

    `state`: what `to_state` gave, from the checkpoint. What the log has beyond it was issued, or was about to be:
    `repeated` must be issued again before anything else.
    """

    def __init__(
        self, settings: Settings, log: IssueLog, state: Mapping[str, Any] | None = None, max_groups: int | None = None
    ) -> None:
        self._settings = settings
        self._log = log
        self._max_groups = max_groups
        state = state or {"next_group": 0, "credit": None, "pools": {}}
        self.next_group = int(state["next_group"])
        self._mixture = Mixture(settings.environments, state["credit"])
        self._pools = {
            section.name: TaskPool(
                settings.curriculum,
                f"{settings.run.seed}/{section.name}",
                section.num_tasks,
                state["pools"].get(section.name),
            )
            for section in settings.environments
        }
        self._repeated = log.beyond(self.next_group)
        for choice in self._repeated:
            self._mixture.repeat(choice.step, choice.env)
            if choice.env in self._pools:
                self._pools[choice.env].take(choice.task, choice.group, self._bucket(choice.group))
        self.next_group += len(self._repeated)

    @property
    def num_issued(self) -> int:
        """Training tickets of all groups so far, over all lineages."""
        return self.next_group * self._settings.learner.group_size

    def repeated(self, min_version: PolicyVersion) -> list[Ticket]:
        """Tickets of the groups that were issued after the checkpoint; the broker ignores those that it knows."""
        return [
            ticket
            for choice in self._repeated
            for ticket in train_tickets(self._settings, choice.group, choice.env, choice.task, min_version)
        ]

    def top_up(self, num_outstanding: int, remaining_steps: int, min_version: PolicyVersion) -> list[Ticket]:
        """Tickets to issue now, whole groups. `num_outstanding`: issued and not yet consumed, without those of closed
        groups that have no variance (they fill no batch)."""
        learner = self._settings.learner
        batch = learner.groups_per_step * learner.group_size
        # A quarter of a batch beyond the need: closed groups may turn out to have no variance.
        # A batch makes as many versions as it has minibatches.
        limit = min((learner.max_staleness // learner.minibatches + 1) * batch, remaining_steps * batch + batch // 4)
        step = max(0, learner.num_steps - remaining_steps)
        choices: list[Choice] = []
        while (
            remaining_steps > 0
            and num_outstanding + (len(choices) + 1) * learner.group_size <= limit
            and (self._max_groups is None or self.next_group < self._max_groups)
        ):
            env = self._mixture.draw(step)
            group = self.next_group
            choices.append(Choice(group, step, env, self._pools[env].choose(group, self._bucket(group))))
            self.next_group += 1
        if choices:
            self._log.append(choices)
        return [t for c in choices for t in train_tickets(self._settings, c.group, c.env, c.task, min_version)]

    def learn(self, consumed: Iterable[Consumed]) -> None:
        """Take note of how well the groups of a batch did. Episodes that do not count in a group's statistics do not
        count here."""
        rewards: dict[str, list[float]] = {}
        tasks: dict[str, tuple[str, int]] = {}
        for item in consumed:
            ticket = item.trajectory.ticket
            if item.reason in COUNTED and ticket.task.env in self._pools:
                rewards.setdefault(ticket.group_id, []).append(min(1.0, max(0.0, item.trajectory.head.reward)))
                tasks[ticket.group_id] = (ticket.task.env, ticket.task.index)
        for group_id, values in rewards.items():
            env, index = tasks[group_id]
            number = group_number(group_id, self._settings.run.name)
            self._pools[env].learn(index, sum(values) / len(values), number, self._bucket(number))

    def counts(self) -> dict[str, dict[str, int]]:
        """Remembered tasks by environment and how often they are solved: never, sometimes, always."""
        return {name: pool.counts() for name, pool in self._pools.items()}

    def to_state(self) -> dict[str, Any]:
        """For the checkpoint; bounded by `curriculum.memory` tasks of each environment."""
        pools = {name: pool.to_state() for name, pool in self._pools.items()}
        return {"next_group": self.next_group, "credit": self._mixture.credit, "pools": pools}

    def close(self) -> None:
        """Close issued.jsonl."""
        self._log.close()

    def _bucket(self, group: int) -> str:
        return budget_bucket(group_budget(self._settings, group))
