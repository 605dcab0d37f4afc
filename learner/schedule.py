"""The learning rate of a step: a pure function of the settings and the step. Owns no optimiser and no counter.

The trainer hands the rate to the engine with every step, so a resumed run needs no state of a scheduler.
"""

from __future__ import annotations

import math

from broker.process.learner_settings import LearnerSection
from learner.warm_start import warmed_up


def decay(schedule: str, progress: float, final: float) -> float:
    """The factor of the peak rate at `progress` (0 to 1) of the steps after the warm-up: from 1 down to `final`.

    `constant` stays at 1; `cosine` is the half cosine of SGDR (arXiv 1608.03983) without restarts.
    """
    progress = min(1.0, max(0.0, progress))
    if schedule == "linear":
        return 1.0 + (final - 1.0) * progress
    if schedule == "cosine":
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def scheduled_rate(section: LearnerSection, step: int) -> float:
    """The rate of reinforcement learning's step number `step` (from 0) of `section.num_steps`."""
    warmup = section.learning_rate_warmup_steps
    rate = warmed_up(section.learning_rate, step, warmup)
    progress = (step - warmup) / max(1, section.num_steps - warmup)
    return rate * decay(section.learning_rate_schedule, progress, section.learning_rate_final)
