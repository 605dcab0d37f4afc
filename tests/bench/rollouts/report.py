"""What was measured and what is told of it: ratios, Markdown, the summary. Pure; runs nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.bench.rollouts.sides import Measured


class Results(NamedTuple):
    """Of the whole benchmark, by what the tools were like."""

    none: Measured
    constant: Measured
    heavy: Measured
    rounds: Measured


LABELS = {
    "none": "no waiting",
    "constant": "1 s each",
    "heavy": "heavy tails, some hang",
    "rounds": "the same, synchronous loop",
}


def joined(first: Measured, second: Measured) -> Measured:
    """Two windows of the same kind as one: sums, means, the worst, and of the groups the mean of the percentiles."""

    def mean(name: str) -> float:
        return float(getattr(first, name) + getattr(second, name)) / 2

    groups = [one.group_s for one in (first, second) if one.group_s is not None]
    return Measured(
        seconds=first.seconds + second.seconds,
        tokens=first.tokens + second.tokens,
        turns=first.turns + second.turns,
        **{name: mean(name) for name in ("episodes", "full", "cache", "prefix_hits", "queue_s", "actor_cpu")},
        preemptions=first.preemptions + second.preemptions,
        group_s=(sum(p50 for p50, _ in groups) / len(groups), sum(p90 for _, p90 in groups) / len(groups))
        if groups
        else None,
        hung_s=first.hung_s + second.hung_s,
        lag_s=max(first.lag_s, second.lag_s),
        rss_mb=max(first.rss_mb, second.rss_mb),
    )


def summary(results: Results) -> dict[str, Any]:
    """The last line."""
    hung = results.none.hung_s + results.constant.hung_s + results.heavy.hung_s
    return {
        "tool_efficiency": round(results.heavy.rate / results.none.rate, 3),
        "tool_efficiency_constant": round(results.constant.rate / results.none.rate, 3),
        "vs_sync_loop": round(results.heavy.rate / results.rounds.rate, 2),
        "prefix_hit_rate": round(results.heavy.prefix_hits, 3),
        "worst_hang_s": round(max(hung), 3) if hung else None,
        "num_hangs": len(hung),
        "tokens_per_s": {name: round(getattr(results, name).rate, 1) for name in LABELS},
        "turns_per_s": {name: round(_turns(getattr(results, name)), 2) for name in LABELS},
        "episodes_in_flight": {name: round(getattr(results, name).episodes, 1) for name in LABELS},
        "kv_cache_use": {name: round(getattr(results, name).cache, 3) for name in LABELS},
        "group_s": {name: _group(getattr(results, name)) for name in LABELS},
    }


def markdown(results: Results, title: str) -> str:
    """The report."""
    rows = [
        f"## Rollouts\n\n{title}\n",
        "| tools | tokens/s | turns/s | episodes in flight | full batches | KV in use | prefix hits | queue, s "
        "| group, s (p50/p90) | preemptions | actor CPU | loop lag, s | peak RSS, MB |",
        "|" + " --- |" * 13,
    ]
    for name, label in LABELS.items():
        one: Measured = getattr(results, name)
        group = _group(one)
        rows.append(
            f"| {label} | {one.rate:.0f} | {_turns(one):.1f} | {one.episodes:.0f} | {one.full:.0%} | {one.cache:.0%} "
            f"| {one.prefix_hits:.0%} | {one.queue_s:.2f} | {'–' if group is None else f'{group[0]:g}/{group[1]:g}'} "
            f"| {one.preemptions} | {one.actor_cpu:.2f} | {one.lag_s:.3f} | {one.rss_mb:.0f} |"
        )
    return "\n".join(rows) + "\n"


def _turns(one: Measured) -> float:
    return one.turns / one.seconds


def _group(one: Measured) -> tuple[float, float] | None:
    return None if one.group_s is None else (round(one.group_s[0], 1), round(one.group_s[1], 1))
