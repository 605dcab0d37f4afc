"""summary.json: what a run achieved, from evaluations, counters, the audit file and the broker's own counts. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from learner.audit import AuditCounts
from learner.evaluation import STYLES, Evaluation, paired_ci95
from learner.state import TrainerState

PHASES = {"before": "before", "after_warm_start": "after-warm-start", "after": "after"}  # summary key -> phase
_WITH_RESULT = ("delivered", "assigned", "acked")


def summarise(
    state: TrainerState, audit: AuditCounts, tickets: Mapping[str, Mapping[str, int]], wall_s: float
) -> dict[str, Any]:
    """The summary. `tickets`: the broker's counts, state -> mode -> number."""
    evaluations = {key: state.evaluations.get(phase) for key, phase in PHASES.items()}
    start, end = evaluations["after_warm_start"] or evaluations["before"], evaluations["after"]
    summary: dict[str, Any] = {}
    for style, prefix in (("sampled", ""), ("greedy", "greedy_")):
        reward_prefix = prefix or "reward_"
        for key, evaluation in evaluations.items():
            summary[f"{reward_prefix}{key}"] = evaluation.mean(style) if evaluation else None
        summary[f"{prefix}ci95"] = (
            paired_ci95(start.rewards(style), end.rewards(style), len(end.budgets)) if start and end else None
        )
    counters = state.counters
    summary |= {
        "kinds": _table(evaluations, Evaluation.mean_by_kind),
        "environments": _table(evaluations, Evaluation.mean_by_env),
        "budgets": _curves(evaluations),
        "eval_tasks": end.num_tasks if end else 0,
        "steps": state.step,
        "warm_start_steps": state.first_version,
        "wall_s": round(wall_s, 3),
        "tokens_sampled": counters["tokens_sampled"],
        "tokens_trained": counters["tokens_trained"],
        "staleness_mean": counters["staleness_sum"] / max(1, counters["staleness_tokens"]),
        "staleness_max": counters["staleness_max"],
        "trajectories": _trajectories(audit, tickets),
    }
    return summary


def _table(
    evaluations: Mapping[str, Evaluation | None], means: Callable[[Evaluation, str], Mapping[str, float]]
) -> dict[str, dict[str, float | None]]:
    """Kind or environment -> evaluation -> mean reward."""
    table: dict[str, dict[str, float | None]] = {}
    for key, evaluation in evaluations.items():
        for style in STYLES if evaluation else ():
            assert evaluation is not None
            name = key if style == "sampled" else f"greedy_{key}"
            for kind, mean in means(evaluation, style).items():
                table.setdefault(kind, {})[name] = mean
    return dict(sorted(table.items()))


def _curves(evaluations: Mapping[str, Evaluation | None]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Held-out reward against thinking budget: key -> style -> points. Empty for a run without `eval.budgets`."""
    return {
        key: {style: evaluation.curve(style) for style in STYLES}
        for key, evaluation in evaluations.items()
        if evaluation is not None and evaluation.has_budgets
    }


def _trajectories(audit: AuditCounts, tickets: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Training tickets only. lost: results that the broker took and neither holds any more nor the audit knows."""
    train = {state: modes.get("train", 0) for state, modes in tickets.items()}
    delivered = sum(train.get(state, 0) for state in _WITH_RESULT)
    held = train.get("delivered", 0) + train.get("assigned", 0)
    return {
        "issued": sum(train.values()),
        "delivered": delivered,
        "trained": audit.num_trained,
        "masked": audit.num_masked,
        "lost": max(0, delivered - held - audit.num_ids),
        "duplicated": audit.num_duplicated,
        "cancelled": train.get("cancelled", 0),
        "dead": train.get("dead", 0),
    }
