"""run_learner(): THE loop. Owns the order of things: evaluate, warm start, train, publish, checkpoint, acknowledge.

Every phase is resumable: the checkpoint names it, tickets have the same ids when issued again, and what was received
but is in no checkpoint is delivered again by the broker. Rank 0 alone runs this; the engine's calls are collective.
"""

from __future__ import annotations

import logging
import time

from broker.process.lifecycle import ErgonError, install_stop
from broker.process.settings import Settings
from broker.protocol.trajectory import PolicyVersion
from learner import metrics
from learner.batching import Batch
from learner.engine import TrainEngine
from learner.evaluation import STYLES
from learner.inbox import StoppedError
from learner.losses.policy import supervised_loss
from learner.room import Room
from learner.summary import PHASES
from learner.tickets import eval_tickets, reference_tickets
from learner.warm_start import demonstrations, num_batches, scheduled, supervised_batches

logger = logging.getLogger(__name__)


def run_learner(settings: Settings) -> None:
    """Train until the run is complete, or until SIGTERM. Raises ErgonError for what the user can mend."""
    from learner.training.deepspeed_engine import DeepSpeedEngine  # imports torch and deepspeed: seconds

    stop = install_stop()
    engine = DeepSpeedEngine(settings)
    if engine.rank:  # rank 0 alone has sockets and files, and says when to stop
        engine.follow()
        engine.close()
        return
    with Room(settings, engine, stop) as room:
        try:
            Trainer(room).run()
        except StoppedError:
            room.stop_safely()
        except ErgonError as error:
            if not stop.is_set():
                raise
            logger.info("ended while waiting error=%s", error)  # the stop watch closed the connection
    logger.info("the learner ends")


class Trainer:
    """Walks through the phases with the room's things."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._settings = room.settings

    @property
    def _engine(self) -> TrainEngine:
        return self._room.engine

    def run(self) -> None:
        """All phases from where the checkpoint stands."""
        state, room = self._room.state, self._room
        room.publish()
        if state.phase == "before":
            self._evaluate("before", with_references=True)
            room.enter("warm_start")
        if state.phase == "warm_start":
            self._warm_start()
            room.enter("after_warm_start", self._label(PHASES["after_warm_start"]) if self._imitates else "")
        if state.phase == "after_warm_start":
            if self._imitates:
                self._evaluate(PHASES["after_warm_start"], with_training=True)
            room.enter("train")
        if state.phase == "train":
            self._train()
            room.enter("after", self._label("after"))
        if state.phase == "after":
            room.client.cancel()  # training tickets that nobody needs any more must not stand before the evaluation
            self._evaluate("after")
            room.consume_surplus()
            room.enter("done")
        room.finish()

    def _train(self) -> None:
        """The reinforcement-learning loop."""
        room, learner = self._room, self._settings.learner
        num_skipped = 0  # in a row
        while room.state.step < learner.num_steps and num_skipped < learner.max_skipped_batches:
            started = time.monotonic()
            batch = self._gather()
            waited = time.monotonic()
            stats = room.train(batch)
            trained = time.monotonic()
            room.publish()
            published = time.monotonic()
            num_skipped = 0 if stats is not None else num_skipped + 1
            evaluates = stats is not None and self._is_evaluated(room.state.step)
            if stats is None or evaluates or room.state.step % learner.checkpoint_every == 0:
                room.checkpoint(f"step-{room.state.step}" if evaluates else "")
            seconds = {
                "waiting": waited - started,
                "training": trained - waited,
                "publishing": published - trained,
                "checkpointing": time.monotonic() - published,
            }
            room.report.step(batch, stats, seconds)
            if evaluates:
                self._evaluate_during()
        if num_skipped:
            logger.warning(
                "training ends early step=%d of=%d: no group of the last %d batches had any variance of reward, so "
                "nothing can be learnt; if the reward is low: easier tasks, larger groups or a longer warm start",
                *(room.state.step, learner.num_steps, num_skipped),
            )

    def _gather(self) -> Batch:
        """Receive until a batch is full, issuing tickets as groups close."""
        room = self._room
        while True:
            room.top_up(self._settings.learner.num_steps - room.state.step)
            batch = room.batcher.next(self._engine.policy_version)
            if batch is not None:
                return batch
            started = time.monotonic()
            room.pump()
            metrics.WAITING.inc(time.monotonic() - started)

    def _evaluate(self, phase: str, *, with_references: bool = False, with_training: bool = False) -> None:
        """Issue the held-out tasks of a phase and wait for their results."""
        room, num_tasks = self._room, self._settings.eval.tasks
        evaluation = room.inbox.evaluation(phase)
        room.report.phase(f"evaluating {phase}")
        version = PolicyVersion(room.client.lineage, self._engine.policy_version)
        tickets = [t for style in STYLES for t in eval_tickets(self._settings, phase, style, num_tasks, version)]
        if evaluation.complete:
            tickets = []
        # Reference episodes need no engine, training tickets queue up behind: both fill the evaluation's tail.
        room.client.issue(tickets + (reference_tickets(self._settings) if with_references else []))
        if with_training:
            room.top_up(remaining_steps=1)
        while not evaluation.complete:
            room.pump()

    def _evaluate_during(self) -> None:
        """Start an evaluation of the current weights without waiting for it."""
        room, section, phase = self._room, self._settings.eval, f"step-{self._room.state.step}"
        room.inbox.evaluation(phase)
        version = PolicyVersion(room.client.lineage, self._engine.policy_version)
        for style in STYLES:
            room.client.issue(eval_tickets(self._settings, phase, style, section.during_tasks, version))

    def _is_evaluated(self, step: int) -> bool:
        """Whether the weights after this step are evaluated while training goes on."""
        every = self._settings.eval.every
        return every > 0 and step % every == 0 and step < self._settings.learner.num_steps

    def _label(self, phase: str) -> str:
        """Under which a checkpoint waits for this evaluation; empty where there will be none."""
        return phase if self._settings.eval.tasks else ""

    @property
    def _imitates(self) -> bool:
        section = self._settings.learner.warm_start
        return section.episodes > 0 or bool(section.files)

    def _warm_start(self) -> None:
        """Imitate the reference episodes, then forget the optimiser's moments: reinforcement learning starts afresh."""
        room, settings = self._room, self._settings
        section = settings.learner.warm_start
        if not self._imitates:
            return
        room.report.phase("warm start")
        room.client.issue(reference_tickets(settings))  # known already, unless the run was killed before it issued them
        while room.inbox.num_references < section.episodes:
            room.pump()
        episodes = demonstrations(room.inbox.references, section)
        total = num_batches(len(episodes), section)
        for i, sequences in enumerate(supervised_batches(episodes, section, settings.run.seed)):
            if i < room.state.warm_start_step:
                continue  # in the checkpoint that this process began with
            room.raise_if_stopped()
            stats = self._engine.step(sequences, supervised_loss, scheduled(section, i, total))
            room.state.warm_start_step = i + 1
            room.report.warm_start(i + 1, total, stats)
            if (i + 1) % section.checkpoint_every == 0 and i + 1 < total:
                room.checkpoint()
        self._engine.reset_optimizer()
        room.state.first_version = self._engine.policy_version
        room.state.unacked.extend(room.inbox.take_references())
        room.publish()
