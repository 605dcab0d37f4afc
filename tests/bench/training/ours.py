"""Ergon's DeepSpeedEngine as a trainer of the benchmark."""

from __future__ import annotations

from typing import Any

from deepspeed.utils import safe_get_full_optimizer_state

from broker.process.settings import Settings
from learner.losses.policy import policy_loss
from learner.training.deepspeed_engine import DeepSpeedEngine
from tests.bench.training.recipe import (
    BETAS,
    CLIP_HIGH,
    CLIP_LOW,
    LEARNING_RATE,
    MAX_NORM,
    Gradient,
    OnPolicy,
    Setup,
    Told,
    first_gradient,
    watched,
)
from tests.bench.training.workload import Sample, train_sequences
from tests.ports import free_ports


def settings_of(setup: Setup) -> Settings:
    """A run's settings, the quick start's but for the benchmark's own."""
    learner = {
        "threads": setup.threads,
        "dtype": setup.dtype,
        "micro_batch_tokens": setup.tokens,
        "learning_rate": LEARNING_RATE,
        "betas": BETAS,
        "clip_grad_norm": MAX_NORM,
        "master_port": free_ports(1)[0],
    }
    return Settings.model_validate({"model": {"path": setup.model}, "learner": learner})


def our_loss() -> OnPolicy:
    """The default recipe's loss, on policy."""
    defaults = Settings().learner.loss
    return OnPolicy(policy_loss(defaults.model_copy(update={"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH})))


class Ours:
    """The engine, as the learner uses it."""

    def __init__(self, setup: Setup) -> None:
        self._engine = DeepSpeedEngine(settings_of(setup))
        self._loss = our_loss()

    def step(self, samples: list[Sample]) -> Told:
        """One step of the engine."""
        stats = self._engine.step(train_sequences(samples), self._loss, LEARNING_RATE)
        counts = (int(stats[key]) for key in ("num_packed_tokens", "num_micro_batches"))
        return Told(stats["loss"], stats["grad_norm"], *counts)

    def gradient(self) -> Gradient:
        """From DeepSpeed's optimiser."""
        model: Any = self._engine._worker._engine.module.causal_lm
        parameters = dict(model.named_parameters())
        names = watched(model.config.num_hidden_layers)
        return {n: first_gradient(safe_get_full_optimizer_state(parameters[n], "exp_avg")) for n in names}
