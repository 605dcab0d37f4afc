"""What the trainer knows besides the engine: the part of a checkpoint that is JSON. Data only."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from learner.evaluation import Evaluation

Phase = Literal["before", "warm_start", "after_warm_start", "train", "after", "done"]

_COUNTERS = (
    "tokens_sampled",
    "tokens_trained",
    "staleness_sum",
    "staleness_tokens",
    "staleness_max",
    "skipped_batches",
)


@dataclass(slots=True)
class TrainerState:
    """The trainer's progress.

    step: reinforcement-learning steps taken. first_version: policy version when they began (the warm start's steps).
    warm_start_step: supervised steps taken. curriculum: what the curriculum knows. num_consumed: training tickets
    consumed. unacked: everything consumed since the previous checkpoint, to be acknowledged when this one is complete.
    audit_bytes: length of trained.jsonl then. evaluations: by phase, complete or not. best: the one of the best
    checkpoint so far. candidates: those of the checkpoints that wait for their results. alarms: what the alarms
    remember. overrun_price: what thinking beyond a soft budget costs now, None before the first step. overrun_rate: the
    share of overruns that it follows.
    started_at: Unix time of the run's first start.
    """

    phase: Phase = "before"
    step: int = 0
    first_version: int = 0
    warm_start_step: int = 0
    curriculum: dict[str, Any] = field(default_factory=dict)
    num_consumed: int = 0
    unacked: list[str] = field(default_factory=list)
    audit_bytes: int = 0
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    best: str = ""
    overrun_price: float | None = None
    overrun_rate: float | None = None
    candidates: list[str] = field(default_factory=list)
    alarms: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTERS, 0))
    started_at: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint. Of the evaluations only complete ones: the others' results are not acknowledged either,
        so the broker delivers them again."""
        return {
            "phase": self.phase,
            "step": self.step,
            "first_version": self.first_version,
            "warm_start_step": self.warm_start_step,
            "curriculum": self.curriculum,
            "num_consumed": self.num_consumed,
            "unacked": list(self.unacked),
            "audit_bytes": self.audit_bytes,
            "evaluations": {phase: e.to_state() for phase, e in self.evaluations.items() if e.complete},
            "best": self.best,
            "overrun_price": self.overrun_price,
            "overrun_rate": self.overrun_rate,
            "candidates": list(self.candidates),
            "alarms": self.alarms,
            "counters": dict(self.counters),
            "started_at": self.started_at,
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> TrainerState:
        """From the checkpoint."""
        fields = dict(state)
        fields["evaluations"] = {p: Evaluation.from_state(p, s) for p, s in state["evaluations"].items()}
        return cls(**fields)
