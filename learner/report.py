"""metrics.jsonl, gauges and sinks: a line for every step, supervised step, evaluation and phase. Decides nothing."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from broker.process.settings import Settings
from broker.protocol.trajectory import Trajectory
from learner import metrics
from learner.audit import LineFile
from learner.batching import Batch
from learner.engine import TrainEngine
from learner.evaluation import STYLES, Evaluation
from learner.health import Edge
from learner.sinks import Sinks
from learner.state import TrainerState
from learner.thinking import by_bucket

logger = logging.getLogger(__name__)


class Reporter:
    """Writes lines that all carry: event, time (Unix), phase, step, version, lineage."""

    def __init__(
        self,
        path: Path,
        settings: Settings,
        state: TrainerState,
        engine: TrainEngine,
        lineage: Callable[[], int],
        sinks: Sinks | None = None,
    ) -> None:
        self._file = LineFile(path)
        self._sinks = sinks or Sinks()
        self._pass_reward = settings.eval.pass_reward
        self._state = state
        self._engine = engine
        self._lineage = lineage

    def began(self, facts: Mapping[str, Any]) -> None:
        """A learner process has begun, on this machine, with these versions."""
        self._write("began", **facts)

    def step(self, batch: Batch, stats: Mapping[str, float] | None, seconds: Mapping[str, float]) -> None:
        """A reinforcement-learning step; event `skipped` where the batch had no (finite) gradient."""
        trajectories = [item.trajectory for item in batch.consumed]
        rewards = np.asarray([trajectory.head.reward for trajectory in trajectories] or [0.0])
        kinds = rewards_by_kind(trajectories)
        passed = passed_by_env(trajectories, self._pass_reward)
        for env, share in passed.items():
            metrics.PASS_RATE.labels(env).set(share)
        for item in batch.consumed:
            labels = (item.trajectory.ticket.task.env, "trained" if item.trained else "masked")
            metrics.EPISODE_REWARD.labels(*labels).observe(item.trajectory.head.reward)
            if (total_s := item.trajectory.head.timings_s.get("total")) is not None:
                metrics.EPISODE_SECONDS.labels(*labels).observe(total_s)
        for trajectory in trajectories:
            kind = trajectory.head.kind or trajectory.ticket.task.env
            metrics.REWARD.labels(trajectory.ticket.task.env, kind).set(kinds[kind])
        for activity, value in seconds.items():
            metrics.STEP_SECONDS.labels(activity).observe(value)
        metrics.STEP.set(self._state.step)
        budgets = by_bucket(trajectories)
        metrics.observe_thinking(budgets)
        num_tokens = (stats or {}).get("num_trained_tokens", 0)
        self._write(
            "step" if stats is not None else "skipped",
            reward_mean=float(rewards.mean()),
            reward_std=float(rewards.std()),
            reward_by_kind=kinds,
            by_env=by_env(trajectories),
            outcomes=outcomes_by_env(trajectories),
            passed_by_env=passed,
            trajectories=len(trajectories),
            reasons=dict(Counter(item.reason.value for item in batch.consumed)),
            groups=batch.num_groups,
            zero_variance_groups=batch.num_zero_variance_groups,
            staleness_mean=float(batch.staleness_N.mean()) if batch.staleness_N.size else 0.0,
            staleness_max=int(batch.staleness_N.max(initial=0)),
            staleness_tokens={str(versions): count for versions, count in _counts(batch.staleness_N)},
            stale_tokens=batch.num_stale_tokens,
            tokens_sampled=sum(trajectory.num_sampled for trajectory in trajectories),
            thinking={bucket: thinking.to_json() for bucket, thinking in budgets.items()},
            overrun_price=batch.overrun_price,
            tokens_per_s=num_tokens / max(1e-9, sum(seconds.values())),
            seconds={name: round(value, 4) for name, value in seconds.items()},
            **(stats or {}),
        )

    def refused(self, error: str, trajectories: Path) -> None:
        """A batch whose step was not taken."""
        self._write("refused", error=error, trajectories=str(trajectories))

    def alarms(self, edges: Iterable[Edge], raised: Mapping[str, bool]) -> None:
        """Alarms that began or ended with a step, and which are raised now."""
        for kind, is_raised in raised.items():
            metrics.ALARM.labels(kind).set(is_raised)
        for edge in edges:
            log = logger.warning if edge.begins else logger.info
            values = (edge.kind, "raised" if edge.begins else "over", edge.value, edge.threshold, self._state.step)
            log("alarm kind=%s state=%s value=%.4g threshold=%.4g step=%d", *values)
            self._write("alarm", kind=edge.kind, raised=edge.begins, value=edge.value, threshold=edge.threshold)

    def warm_start(self, number: int, total: int, stats: Mapping[str, float]) -> None:
        """A supervised step."""
        metrics.VERSION.set(self._engine.policy_version)
        self._write("warm_start", number=number, of=total, **stats)

    def phase(self, detail: str) -> None:
        """The beginning of something long."""
        logger.info("phase=%s detail=%s version=%d", self._state.phase, detail, self._engine.policy_version)
        self._write("phase", detail=detail)

    def evaluation(self, evaluation: Evaluation) -> None:
        """A complete evaluation."""
        result: dict[str, Any] = {"evaluation": evaluation.phase, "tasks": evaluation.num_tasks}
        for style in STYLES:
            mean = evaluation.mean(style)
            if mean is not None:
                # One series for all evaluations of training: with a label each they would grow with the run.
                phase = "step" if evaluation.phase.startswith("step-") else evaluation.phase
                metrics.EVAL_REWARD.labels(phase, style).set(mean)
            result[style] = mean
            result[f"{style}_by_kind"] = evaluation.mean_by_kind(style)
            result[f"{style}_by_env"] = evaluation.mean_by_env(style)
            result[f"{style}_ci95"] = evaluation.intervals(style).get("")
            result[f"{style}_by_kind_ci95"] = evaluation.intervals(style, "kind")
            result[f"{style}_by_env_ci95"] = evaluation.intervals(style, "env")
            for env, reward in result[f"{style}_by_env"].items():
                metrics.EVAL_ENV_REWARD.labels(evaluation.phase, style, env).set(reward)
            rewards = evaluation.rewards(style).values()
            result[f"{style}_passed"] = _share([reward >= self._pass_reward for reward in rewards])
            if evaluation.has_budgets:
                result[f"{style}_curve"] = evaluation.curve(style)
                for point in result[f"{style}_curve"]:
                    metrics.EVAL_BUDGET_REWARD.labels(style, point["budget"]).set(point["reward"])
        self._write("evaluation", outcomes=evaluation.outcomes(), **result)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The run is complete."""
        self._write("summary", summary=summary)

    def close(self) -> None:
        """Close the file and the sinks."""
        self._file.close()
        self._sinks.close()

    def _write(self, event: str, **fields: Any) -> None:
        place = {
            "event": event,
            "time": time.time(),
            "phase": self._state.phase,
            "step": self._state.step,
            "version": self._engine.policy_version,
            "lineage": self._lineage(),
        }
        self._file.append([place | fields], durable=False)
        self._sinks.offer(place | fields)


def rewards_by_kind(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Mean reward of each kind of task (its environment's name where it has no kinds)."""
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for trajectory in trajectories:
        kind = trajectory.head.kind or trajectory.ticket.task.env
        sums[kind] += trajectory.head.reward  # type: ignore[assignment]  # a Counter of floats
        counts[kind] += 1
    return {kind: sums[kind] / counts[kind] for kind in sorted(counts)}


def by_env(trajectories: Iterable[Trajectory]) -> dict[str, dict[str, float]]:
    """Of each environment: its episodes, their mean reward, and how many tokens the policy sampled in them."""
    found: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        found.setdefault(trajectory.ticket.task.env, []).append(trajectory)
    return {
        env: {
            "episodes": len(of_env),
            "reward": float(np.mean([trajectory.head.reward for trajectory in of_env])),
            "tokens_sampled": sum(trajectory.num_sampled for trajectory in of_env),
        }
        for env, of_env in sorted(found.items())
    }


def outcomes_by_env(trajectories: Iterable[Trajectory]) -> dict[str, dict[str, int]]:
    """Of each environment: how many of its episodes ended how."""
    found: dict[str, Counter[str]] = {}
    for trajectory in trajectories:
        found.setdefault(trajectory.ticket.task.env, Counter())[trajectory.head.outcome.value] += 1
    return {env: dict(counts) for env, counts in sorted(found.items())}


def passed_by_env(trajectories: Iterable[Trajectory], pass_reward: float) -> dict[str, float]:
    """Share of the episodes of each environment with at least this reward."""
    passed: dict[str, list[bool]] = {}
    for trajectory in trajectories:
        passed.setdefault(trajectory.ticket.task.env, []).append(trajectory.head.reward >= pass_reward)
    return {env: float(np.mean(flags)) for env, flags in sorted(passed.items())}


def _counts(values_N: npt.NDArray[np.int32]) -> Iterable[tuple[int, int]]:
    """Each value and how often it is there."""
    values, counts = np.unique(values_N, return_counts=True)
    return zip(values.tolist(), counts.tolist(), strict=True)


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
