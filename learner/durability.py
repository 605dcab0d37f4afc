"""How a step becomes durable: its lines in the audit, a checkpoint, the acknowledgement, in this order.

Owns trained.jsonl, the folder of checkpoints and the thread that writes them. The loop waits only while the engine is
copied; the copy is written, made visible and acknowledged meanwhile, one checkpoint at a time. What an acknowledged
ticket did to the weights is therefore always in a complete checkpoint. Never decides when one is due.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from broker.process.learner_settings import LearnerSection
from learner import metrics
from learner.audit import LineFile, audit_lines
from learner.background import Background
from learner.batching import Batch, Reason
from learner.checkpoint import CheckpointStore
from learner.engine import TrainEngine
from learner.evaluation import Evaluation, is_better
from learner.state import TrainerState

logger = logging.getLogger(__name__)

Ack = Callable[[Sequence[str], Collection[str]], object]

_THROWN_AWAY = frozenset({Reason.STALE, Reason.NOT_FINITE})  # told to the broker, whose monitor looks for a bias
_MAX_CANDIDATES = 4  # checkpoints that wait for their evaluation


class Durability:
    """Begins where the newest complete checkpoint stands; `state` and the engine are as they were then."""

    def __init__(self, run_dir: Path, settings: LearnerSection, engine: TrainEngine, ack: Ack) -> None:
        self._engine = engine
        self._ack = ack
        self._in_background = settings.checkpoint_in_background
        self._keep_best = settings.keep_best
        self._store = CheckpointStore(run_dir / "checkpoints", settings.keep_checkpoints)
        self._checkpoint = self._store.newest()
        self.state = TrainerState.from_json(self._checkpoint.state) if self._checkpoint else TrainerState()
        self.saved_version = 0
        if self._checkpoint and self._checkpoint.engine_directory:
            engine.load(self._checkpoint.engine_directory)
            self.saved_version = engine.policy_version
        self.audit_path = run_dir / "trained.jsonl"
        self._audit = LineFile(self.audit_path)
        self._audit.cut(self.state.audit_bytes)
        self._unused: set[str] = set()  # of the unacked: what was thrown away
        self._background = Background("checkpoint")

    def record(self, batch: Batch, stats: Mapping[str, float] | None) -> None:
        """Book what a batch consumed, trained on or not; on disk when this returns."""
        state, counters = self.state, self.state.counters
        state.num_consumed += len(batch.ids)
        state.unacked.extend(batch.ids)
        self._unused.update(c.trajectory.ticket.ticket_id for c in batch.consumed if c.reason in _THROWN_AWAY)
        self._audit.append(audit_lines(batch.consumed, state.step), durable=True)
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

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._background.busy

    @property
    def behind(self) -> bool:
        """Whether the weights changed since the newest checkpoint began."""
        return self._engine.policy_version != self.saved_version

    def checkpoint(self, label: str = "") -> None:
        """Begin a checkpoint of everything as it is now; what it contains is acknowledged once it is complete.

        `label`: the evaluation that will tell how good these weights are. Raises what stopped the previous one.
        """
        started = time.monotonic()
        self.settle()
        state = self.state
        state.audit_bytes = self._audit.num_bytes
        if label and self._keep_best:
            state.candidates = [*(c for c in state.candidates if c != label), label][-_MAX_CANDIDATES:]
        self._store.kept_labels = frozenset(state.candidates) | ({state.best} if state.best else frozenset())
        content, previous = state.to_json(), self._checkpoint
        ids, unused = list(state.unacked), frozenset(self._unused)
        draft = self._store.draft()
        write: Callable[[], None] | None = None
        if self.behind:
            if self._in_background:
                write = self._engine.snapshot(draft.engine_directory)
            else:
                self._engine.save(draft.engine_directory)
        self.saved_version = self._engine.policy_version
        state.unacked.clear()
        self._unused.clear()

        def finish() -> None:
            if write is not None:
                write()
            self._checkpoint = self._store.complete(draft, content, reuse=previous, label=label)
            metrics.CHECKPOINT_SECONDS.labels("complete").observe(time.monotonic() - started)
            logger.info("checkpoint is complete number=%d step=%d", draft.number, content["step"])
            self._ack(ids, unused)

        if self._in_background:
            self._background.start(finish)
        else:
            finish()
        metrics.UNACKED.set(0)
        metrics.CHECKPOINT_SECONDS.labels("blocked").observe(time.monotonic() - started)

    def raise_if_failed(self) -> None:
        """Take note of a checkpoint that has ended; raises what stopped it."""
        self._background.wait(timeout_s=0)

    def settle(self) -> None:
        """Wait until nothing is on its way. Raises what stopped it."""
        self._background.wait()

    def evaluated(self, evaluation: Evaluation) -> None:
        """An evaluation is complete: where it was of a checkpoint, keep that one if it is the best so far."""
        state, phase = self.state, evaluation.phase
        if phase not in state.candidates:
            return
        state.candidates.remove(phase)
        best = state.evaluations.get(state.best)
        if best is None or is_better(evaluation, best):
            logger.info("best checkpoint so far evaluation=%s reward=%s", phase, evaluation.mean("sampled"))
            state.best = phase

    def ended(self, timeout_s: float) -> bool:
        """Whether nothing is on its way any more after so long."""
        return self._background.ended(timeout_s)

    def close(self) -> None:
        """Wait for the checkpoint on its way and close the files. What stopped it is logged: another error may be
        on its way up, and an incomplete checkpoint is invisible."""
        try:
            self.settle()
        except Exception:
            logger.exception("the last checkpoint did not become complete, or was not acknowledged")
        self._audit.close()
