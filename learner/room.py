"""What the trainer's loop works with: the engine, the broker's client, the publisher, the files, the state.

Owns how a batch becomes a step and how a step becomes durable (audit, checkpoint, acknowledgement, in this order).
Never decides what comes next; that is the trainer's.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from broker.client import LearnerClient
from broker.process.keys import Identity
from broker.process.lifecycle import ErgonError
from broker.process.metrics import Health, start_metrics
from broker.process.security import load_security
from broker.process.settings import Settings
from broker.protocol.commands import MAX_IDS
from broker.protocol.trajectory import PolicyVersion
from learner import metrics
from learner.audit import LineFile, audit_lines, read_audit
from learner.batching import Batch, Batcher, Consumed, Reason
from learner.checkpoint import CheckpointStore
from learner.curriculum import Curriculum
from learner.engine import TrainEngine, TrainingError
from learner.inbox import Inbox, StoppedError
from learner.losses.policy import effective_sample_size, policy_loss
from learner.publisher import Publisher
from learner.report import Reporter
from learner.state import Phase, TrainerState
from learner.summary import summarise
from learner.warm_start import warmed_up

logger = logging.getLogger(__name__)

_MAX_FAILED_BATCHES = 3  # in a row
_STOP_PATIENCE_S = 8.0
_SURPLUS_PATIENCE_S = 15.0
_THROWN_AWAY = frozenset({Reason.STALE, Reason.NOT_FINITE})  # told to the broker, whose monitor looks for a bias


class Room:
    """Everything of one learner process; a context manager that opens and closes it."""

    def __init__(self, settings: Settings, engine: TrainEngine, stop: threading.Event) -> None:
        self.settings = settings
        self.engine = engine
        self._stop = stop
        learner = settings.learner
        self._loss = policy_loss(learner.loss)
        self._directory = settings.run_dir
        self._store = CheckpointStore(self._directory / "checkpoints", learner.keep_checkpoints)
        self._checkpoint = self._store.newest()
        self.state = TrainerState.from_json(self._checkpoint.state) if self._checkpoint else TrainerState()
        self._saved_version = 0
        if self._checkpoint and self._checkpoint.engine_directory:
            engine.load(self._checkpoint.engine_directory)
            self._saved_version = engine.policy_version
        self._audit_path = self._directory / "trained.jsonl"
        self._audit_file = LineFile(self._audit_path)
        self._audit_file.cut(self.state.audit_bytes)
        self._failed_batches = 0
        self._unused: set[str] = set()  # of the unacked: what was thrown away
        self.batcher = Batcher(
            groups_per_step=learner.groups_per_step,
            max_groups_per_step=learner.max_groups_per_step,
            group_size=learner.group_size,
            max_staleness=learner.max_staleness,
            baseline=learner.loss.baseline,
        )
        self.curriculum = Curriculum(settings, self.state.next_group)
        broker = settings.broker
        self.client = LearnerClient(
            f"tcp://{broker.host}:{broker.port}",
            settings.run.name,
            window_bytes=broker.max_inflight_mb << 20,
            heartbeat_s=broker.heartbeat_s,
            liveness=broker.liveness,
            security=load_security(settings, Identity.LEARNER),
        )
        self.report = Reporter(self._directory / "metrics.jsonl", self.state, engine, lambda: self.client.lineage)
        self.inbox = Inbox(
            self.client, settings, self.state, self.batcher, stop, self.curriculum.note, self.report.evaluation
        )

    def __enter__(self) -> Room:
        section = self.settings.metrics
        self._server = start_metrics(section.host, section.learner_port, self._health)
        self._publisher = Publisher(self.settings)
        self.client.connect()
        threading.Thread(target=self._close_when_stopped, name="stop-watch", daemon=True).start()
        num_returned = self.client.resume(self.state.unacked)
        self.state.unacked.clear()
        metrics.LINEAGE.set(self.client.lineage)
        logger.info(
            "learner is ready lineage=%d phase=%s step=%d version=%d returned=%d",
            *(self.client.lineage, self.state.phase, self.state.step, self.engine.policy_version, num_returned),
        )
        return self

    def __exit__(self, *_error: object) -> None:
        self.client.close()
        self._publisher.close()
        self._server.close()
        self.report.close()
        self._audit_file.close()
        self.engine.close()

    # --- steps

    def top_up(self, remaining_steps: int) -> None:
        """Issue the training tickets that admission control allows."""
        learner, state = self.settings.learner, self.state
        outstanding = self.curriculum.num_issued - state.num_consumed - self.batcher.num_without_gradient
        oldest = max(state.first_version, self.engine.policy_version - learner.max_staleness)
        tickets = self.curriculum.top_up(outstanding, remaining_steps, PolicyVersion(self.client.lineage, oldest))
        metrics.OUTSTANDING.set(outstanding + len(tickets))
        if tickets:
            self.client.issue(tickets)

    def pump(self) -> None:
        """Wait a moment for one item and route it. Where none comes because too many are held for another to be
        delivered, what is done with is acknowledged at once; raises ErgonError where that is nothing."""
        if self.inbox.pump() or not self.client.full:
            return
        if not self.state.unacked:
            raise ErgonError(
                f"the learner holds {MAX_IDS} results, as many as it may, and waits for more before it is done with "
                "any; lower learner.groups_per_step, learner.group_size, learner.max_staleness, eval.tasks or "
                "learner.warm_start.episodes"
            )
        logger.warning("checkpoint before its time step=%d reason=no more results can be held", self.state.step)
        self.checkpoint_and_ack()

    def train(self, batch: Batch) -> Mapping[str, float] | None:
        """One optimiser step, or None where the batch has no gradient (or none that is finite); audited either way."""
        learner = self.settings.learner
        stats: dict[str, float] | None = None
        if batch.sequences:
            rate = warmed_up(learner.learning_rate, self.state.step, learner.learning_rate_warmup_steps)
            try:
                stats = {**self.engine.step(batch.sequences, self._loss, rate), "learning_rate": rate}
                stats["ess"] = effective_sample_size(stats["ratio"], stats["ratio_squared"])
                self._failed_batches = 0
            except TrainingError as error:
                self._failed_batches += 1
                logger.error("batch refused step=%d error=%s", self.state.step, error)
                if self._failed_batches >= _MAX_FAILED_BATCHES:
                    raise
                batch = _without_gradient(batch)
        if stats is None:
            metrics.SKIPPED.inc()
            self.state.counters["skipped_batches"] += 1
        else:
            self.state.step += 1
            metrics.observe_step(stats)
        self._consume(batch, stats)
        return stats

    def publish(self) -> None:
        """Make the engine's weights the newest version."""
        self._publisher.publish(self.client.lineage, self.engine)
        metrics.VERSION.set(self.engine.policy_version)

    def checkpoint_and_ack(self) -> None:
        """Write a checkpoint; once it is complete, acknowledge what it contains."""
        state = self.state
        state.next_group = self.curriculum.next_group
        state.audit_bytes = self._audit_file.num_bytes
        changed = self.engine.policy_version != self._saved_version
        self._checkpoint = self._store.save(state.to_json(), self.engine.save if changed else None, self._checkpoint)
        self._saved_version = self.engine.policy_version
        self.client.ack(state.unacked, self._unused)
        state.unacked.clear()
        self._unused.clear()
        metrics.UNACKED.set(0)

    def enter(self, phase: Phase) -> None:
        """The next phase begins: a restart will begin there."""
        self.state.phase = phase
        self.checkpoint_and_ack()

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
        """Write summary.json."""
        wall_s = time.time() - self.state.started_at
        summary = summarise(self.state, read_audit(self._audit_path), self.client.status().tickets, wall_s)
        path = self._directory / "summary.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(summary, indent=1))
        draft.replace(path)
        self.report.summary(summary)

    def stop_safely(self) -> None:
        """Asked to stop: keep the steps since the last checkpoint, if there are any."""
        if self.engine.policy_version != self._saved_version and self.state.phase == "train":
            try:
                self.checkpoint_and_ack()
            except ErgonError as error:  # the broker is away: the next learner acknowledges what the checkpoint names
                logger.warning("stopped without acknowledging error=%s", error)

    def raise_if_stopped(self) -> None:
        """Raise StoppedError where the process was asked to stop."""
        if self._stop.is_set():
            raise StoppedError

    def _consume(self, batch: Batch, stats: Mapping[str, float] | None) -> None:
        state = self.state
        state.num_consumed += len(batch.ids)
        state.unacked.extend(batch.ids)
        self._unused.update(c.trajectory.ticket.ticket_id for c in batch.consumed if c.reason in _THROWN_AWAY)
        self._audit_file.append(audit_lines(batch.consumed, state.step), durable=True)
        counters = state.counters
        counters["tokens_sampled"] += sum(item.trajectory.num_sampled for item in batch.consumed)
        if stats is not None:
            counters["tokens_trained"] += int(stats["num_trained_tokens"])
            counters["staleness_sum"] += int(batch.staleness_N.sum())
            counters["staleness_tokens"] += int(batch.staleness_N.size)
            counters["staleness_max"] = max(counters["staleness_max"], int(batch.staleness_N.max(initial=0)))
            metrics.observe_staleness(batch.staleness_N)
        for reason, count in Counter(item.reason for item in batch.consumed).items():
            metrics.TRAJECTORIES.labels(reason.value).inc(count)
        metrics.MASKED_TOKENS.inc(batch.num_stale_tokens)
        metrics.GROUPS.labels("zero").inc(batch.num_zero_variance_groups)
        metrics.GROUPS.labels("some").inc(batch.num_groups - batch.num_zero_variance_groups)
        metrics.UNACKED.set(len(state.unacked))
        metrics.HELD.set(self.batcher.num_held)

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
