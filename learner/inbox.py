"""What arrives: routes every trajectory and dead letter to the batcher, an evaluation, or the reference episodes.

Owns the receiving end of the broker's client; keeps whatever arrives in any phase, so nothing is dropped for coming
early or late. What it holds is bounded by admission control (training) and by the number of evaluation and reference
tickets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from broker.client import DeadLetter, LearnerClient
from broker.process.settings import Settings
from broker.protocol.trajectory import Mode, Trajectory
from learner import metrics
from learner.batching import Batcher
from learner.evaluation import Evaluation, parse_eval_id
from learner.state import TrainerState

_POLL_S = 0.25


class StoppedError(Exception):
    """The process was asked to stop; not a failure."""


class Inbox:
    """Receives and routes. `on_evaluation` is told of each evaluation that becomes complete; `keep` is handed what is
    not for the batcher, with its fate and evaluation."""

    def __init__(
        self,
        client: LearnerClient,
        settings: Settings,
        state: TrainerState,
        batcher: Batcher,
        stop: threading.Event,
        on_evaluation: Callable[[Evaluation], None],
        keep: Callable[[Trajectory, str, str], None],
    ) -> None:
        self._client = client
        self._settings = settings
        self._state = state
        self._batcher = batcher
        self._stop = stop
        self._on_evaluation = on_evaluation
        self._keep = keep
        self._references: dict[str, Trajectory | DeadLetter] = {}
        self._eval_ids: dict[str, list[str]] = {}

    @property
    def references(self) -> list[Trajectory]:
        """Reference episodes received so far."""
        return [item for item in self._references.values() if isinstance(item, Trajectory)]

    @property
    def num_references(self) -> int:
        """Reference tickets that came back, dead ones included."""
        return len(self._references)

    def take_references(self) -> list[str]:
        """Forget the reference episodes; returns their ids, to be acknowledged."""
        ids = list(self._references)
        self._references.clear()
        return ids

    def unfinished_ids(self) -> list[str]:
        """Ids of evaluation results whose evaluation never completed, at the end of a run."""
        return [ticket_id for ids in self._eval_ids.values() for ticket_id in ids]

    def evaluation(self, phase: str) -> Evaluation:
        """The evaluation of this phase, begun where it was not."""
        section = self._settings.eval
        num_tasks = section.during_tasks if phase.startswith("step-") else section.tasks
        return self._state.evaluations.setdefault(phase, Evaluation(phase, num_tasks, section.token_budgets))

    def pump(self, timeout_s: float = _POLL_S) -> bool:
        """Wait for one item and route it; False where none came. Raises StoppedError when the process must end."""
        if self._stop.is_set():
            raise StoppedError
        item = self._client.receive(timeout_s)
        if item is None:
            return False
        mode = item.mode if isinstance(item, DeadLetter) else item.ticket.mode
        if mode is Mode.TRAIN:
            self._train(item)
        elif mode is Mode.EVAL:
            self._eval(item)
        else:
            ticket_id = item.ticket_id if isinstance(item, DeadLetter) else item.ticket.ticket_id
            self._references[ticket_id] = item
            if not isinstance(item, DeadLetter):
                self._keep(item, "reference", "")
        return True

    def _train(self, item: Trajectory | DeadLetter) -> None:
        if isinstance(item, DeadLetter):
            self._batcher.add_dead(item)
        else:
            self._batcher.add(item)
        metrics.HELD.set(self._batcher.num_held)

    def _eval(self, item: Trajectory | DeadLetter) -> None:
        ticket_id = item.ticket_id if isinstance(item, DeadLetter) else item.ticket.ticket_id
        phase, style, number, budget = parse_eval_id(ticket_id, self._settings.run.name)
        evaluation = self.evaluation(phase)
        was_complete = evaluation.complete
        ids = self._eval_ids.setdefault(phase, [])
        ids.append(ticket_id)
        if isinstance(item, DeadLetter):
            evaluation.add_dead(style, number, budget)
        else:
            evaluation.add(style, number, item)
            self._keep(item, "evaluated", f"{phase}/{style}")
        if evaluation.complete:
            # Complete results are in the next checkpoint, so that is when their tickets may be acknowledged.
            self._state.unacked.extend(self._eval_ids.pop(phase))
            if not was_complete:
                self._on_evaluation(evaluation)
