"""The learner's Prometheus metrics, all of them; other modules only set them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from prometheus_client import Counter, Gauge, Histogram

from learner.thinking import Thinking

STEP = Gauge("ergon_learner_step", "Reinforcement-learning steps taken")
VERSION = Gauge("ergon_learner_policy_version", "Optimiser steps in the weights being trained")
LINEAGE = Gauge("ergon_learner_lineage", "Lineage of this learner process")
REWARD = Gauge("ergon_learner_reward", "Mean reward of the newest batch's episodes", ["env", "kind"])
EVAL_REWARD = Gauge("ergon_learner_eval_reward", "Mean held-out reward of the newest evaluation", ["phase", "style"])
EVAL_ENV_REWARD = Gauge(
    "ergon_learner_eval_env_reward",
    "Mean held-out reward of the newest evaluation in an environment",
    ["phase", "style", "env"],
)
EVAL_BUDGET_REWARD = Gauge(
    "ergon_learner_eval_budget_reward",
    "Mean held-out reward of the newest evaluation, by thinking budget (those of eval.budgets)",
    ["style", "budget"],
)
BUDGET_REWARD = Gauge(
    "ergon_learner_budget_reward", "Mean reward of the newest batch's episodes, by budget", ["budget"]
)
THINKING_TOKENS = Gauge(
    "ergon_learner_thinking_tokens", "Mean thinking tokens of the newest batch's episodes, by budget", ["budget"]
)
ADHERENCE = Gauge(
    "ergon_learner_budget_adherence_ratio",
    "Share of the newest batch's episodes that kept their thinking budget by themselves",
    ["budget"],
)
FORCED_STOPS = Gauge(
    "ergon_learner_forced_stop_ratio", "Share of the newest batch's episodes whose thinking was stopped", ["budget"]
)
OVERRUN_RATE = Gauge(
    "ergon_learner_overrun_ratio", "Share of the newest batch's soft budgets above 0 that were overrun"
)
OVERRUN_PRICE = Gauge("ergon_learner_overrun_price", "What thinking beyond a soft budget costs (lambda)")
STALENESS = Histogram(
    "ergon_learner_staleness_versions",
    "Versions between sampling and training, per token",
    buckets=(0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
)
MAX_STALENESS = Gauge("ergon_learner_max_staleness_versions", "The run's bound of staleness (learner.max_staleness)")
TRAINED_TOKENS = Counter("ergon_learner_trained_tokens_total", "Tokens that contributed to a gradient")
MASKED_TOKENS = Counter("ergon_learner_stale_tokens_total", "Tokens masked for being too stale")
TRAJECTORIES = Counter("ergon_learner_trajectories_total", "Trajectories consumed, by what became of them", ["reason"])
GROUPS = Counter("ergon_learner_groups_total", "Groups consumed, by whether they had a gradient", ["variance"])
SKIPPED = Counter("ergon_learner_skipped_batches_total", "Batches without a step: no gradient, or not a finite one")
STEP_SECONDS = Histogram(
    "ergon_learner_step_seconds",
    "Seconds of one step by activity",
    ["activity"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320),
)
WAITING = Counter(
    "ergon_learner_waiting_seconds_total",
    "Seconds without a full batch to train on, counted while they pass",
)
GRAD_NORM = Gauge("ergon_learner_grad_norm", "Gradient norm before clipping")
MISMATCH_KL = Gauge("ergon_learner_mismatch_kl", "KL of the behaviour to the target policy per token (k3 estimate)")
ESS = Gauge("ergon_learner_effective_sample_size_ratio", "Effective sample size over the number of tokens")
CLIP_FRACTION = Gauge("ergon_learner_clip_fraction_ratio", "Share of tokens whose ratio was clipped")
LOSS_MASKED = Gauge("ergon_learner_loss_masked_ratio", "Share of tokens outside the token window or sequence guard")
ENTROPY = Gauge("ergon_learner_entropy_nats", "Mean entropy of the policy per trained token")
HELD = Gauge("ergon_learner_held_trajectories", "Trajectories received and not yet in a batch")
OUTSTANDING = Gauge("ergon_learner_outstanding_tickets", "Training tickets issued and not yet consumed")
PASS_RATE = Gauge("ergon_learner_pass_ratio", "Share of the newest batch's episodes with eval.pass_reward", ["env"])
EPISODE_SECONDS = Histogram(
    "ergon_learner_episode_seconds",
    "Seconds of the episodes that were consumed, by what became of them; ergon_broker_drift compares the two",
    ["env", "fate"],
    buckets=(0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384),
)
EPISODE_REWARD = Histogram(
    "ergon_learner_episode_reward",
    "Rewards of the episodes that were consumed, by what became of them",
    ["env", "fate"],
    buckets=(0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999),
)
TASKS = Gauge("ergon_learner_tasks", "Training tasks remembered, by how often their groups succeed", ["env", "solved"])
ALARM = Gauge("ergon_learner_alarm", "1 while an alarm of [learner.alarms] is raised", ["kind"])
CHECKPOINT_SECONDS = Histogram(
    "ergon_learner_checkpoint_seconds",
    "Seconds of a checkpoint: the loop was blocked, and from its beginning until it was complete on disk",
    ["part"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320),
)
SINK_LOST = Counter(
    "ergon_learner_sink_lost_total",
    "Lines of metrics.jsonl that a sink did not get, by why: it failed, its queue was full, it did not end in time",
    ["sink", "reason"],
)
UNACKED = Gauge("ergon_learner_unacked_trajectories", "Trajectories consumed and not yet in a checkpoint")

_FROM_STATS = {
    "grad_norm": GRAD_NORM,
    "mismatch_kl": MISMATCH_KL,
    "ess": ESS,
    "clip_fraction": CLIP_FRACTION,
    "loss_masked_fraction": LOSS_MASKED,
    "entropy": ENTROPY,
}


def observe_step(stats: Mapping[str, float]) -> None:
    """Set the gauges of one optimiser step."""
    for name, gauge in _FROM_STATS.items():
        if name in stats:
            gauge.set(stats[name])
    TRAINED_TOKENS.inc(stats.get("num_trained_tokens", 0))


def observe_thinking(buckets: Mapping[str, Thinking]) -> None:
    """Set what a batch's episodes did with their thinking budgets."""
    for bucket, thinking in buckets.items():
        BUDGET_REWARD.labels(bucket).set(thinking.reward)
        THINKING_TOKENS.labels(bucket).set(thinking.tokens)
        ADHERENCE.labels(bucket).set(thinking.adherence)
        FORCED_STOPS.labels(bucket).set(thinking.forced)


def observe_tasks(counts: Mapping[str, Mapping[str, int]]) -> None:
    """Set how many tasks of each environment never, sometimes and always succeed."""
    for env, by_solved in counts.items():
        for solved, number in by_solved.items():
            TASKS.labels(env, solved).set(number)


def observe_staleness(staleness_N: npt.NDArray[np.int32]) -> None:
    """Count every token's staleness."""
    for versions in staleness_N.tolist():
        STALENESS.observe(versions)
