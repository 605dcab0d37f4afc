"""What is told of admission open against closed: ratios, final rewards with their interval, curves. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from learner.evaluation import paired_ci95
from tests.bench.endtoend.report import Side


class Flow(NamedTuple):
    """How the steps of a run went, by its metrics.jsonl; means over the steps, seconds of a step."""

    waiting_s: float  # for a batch
    training_s: float
    staleness: float  # versions, of trained tokens
    max_staleness: int
    groups: float
    flat_groups: float  # of these, without variance, which were replaced


class Run(NamedTuple):
    """A side. final: the last snapshot's mean reward by held-out task, over several episodes of each."""

    side: Side
    final: Mapping[int, float]
    flow: Flow

    @property
    def reward(self) -> float:
        """The last snapshot's."""
        return statistics.fmean(self.final.values())


class Pair(NamedTuple):
    """Both sides of a seed, which started from the same weights, of this reward."""

    seed: int
    start: float
    closed: Run
    opened: Run


class Ratio(NamedTuple):
    """Closed over open. censored: the closed side did not get there, so it is at least that."""

    value: float
    censored: bool


def flow(records: Iterable[Mapping[str, Any]]) -> Flow:
    """Of the lines of a run's metrics.jsonl. Raises ValueError where it has no step."""
    steps = [record for record in records if record["event"] == "step"]
    if not steps:
        raise ValueError("a run without steps")
    return Flow(
        statistics.fmean(step["seconds"]["waiting"] for step in steps),
        statistics.fmean(step["seconds"]["training"] for step in steps),
        statistics.fmean(step["staleness_mean"] for step in steps),
        max(step["staleness_max"] for step in steps),
        statistics.fmean(step["groups"] for step in steps),
        statistics.fmean(step["zero_variance_groups"] for step in steps),
    )


def ratio(pair: Pair, level: float, *, started: bool = True) -> Ratio | None:
    """Wall-clock to the level; None where the open side did not reach it. started: from the command on, else from the
    moment when the learner was ready."""
    opened = pair.opened.side.reached(level)
    if opened is None:
        return None
    reached = pair.closed.side.reached(level)
    end = reached or pair.closed.side.course.snapshots[-1]
    value = end.wall_s / opened.wall_s if started else end.training_s / opened.training_s
    return Ratio(value, reached is None)


def gain_ci95(pairs: Sequence[Pair]) -> list[float] | None:
    """95 % bootstrap interval of the final reward with admission open less that with it closed, paired by task; the
    results of a task in several seeds are drawn together."""
    closed, opened = (
        {
            task * len(pairs) + number: reward
            for number, pair in enumerate(pairs)
            for task, reward in (pair.opened if is_open else pair.closed).final.items()
        }
        for is_open in (False, True)
    )
    interval = paired_ci95(closed, opened, len(pairs))
    return interval and [round(end, 4) for end in interval]


def summary(pairs: Sequence[Pair], level: float) -> dict[str, Any]:
    """The last line's JSON."""
    known = [found for pair in pairs if (found := ratio(pair, level))]
    since = [found for pair in pairs if (found := ratio(pair, level, started=False))]
    interval = gain_ci95(pairs)
    return {
        "async_vs_sync_wall": _median([found.value for found in known]),
        "reward_async": round(statistics.fmean(pair.opened.reward for pair in pairs), 4),
        "reward_sync": round(statistics.fmean(pair.closed.reward for pair in pairs), 4),
        "ci95": interval,
        "no_loss": interval is not None and interval[1] >= 0,
        "async_vs_sync_wall_without_start": _median([found.value for found in since]),
        "async_vs_sync_step": _median([pair.closed.side.step_s / pair.opened.side.step_s for pair in pairs]),
        "censored": sum(found.censored for found in known),
        "not_reached": len(pairs) - len(known),
        "staleness_async": round(statistics.fmean(pair.opened.flow.staleness for pair in pairs), 2),
        "seeds": [pair.seed for pair in pairs],
        "level": level,
    }


def markdown(pairs: Sequence[Pair], level: float, conditions: str) -> str:
    """The report for people."""
    lines = ["## Async against sync", "", conditions, ""]
    lines += [
        f"| seed | admission | to {level:.0%} | a step | of it waiting | training | staleness, mean (max) "
        "| groups a step (without variance) | final reward |",
        "|" + " --- |" * 9,
    ]
    for pair in pairs:
        lines += [
            _row(pair.seed, "closed: staleness 0", pair.closed, level),
            _row(pair.seed, "open", pair.opened, level),
        ]
    lines += ["", "Held-out reward against wall-clock since the command:", ""]
    for pair in pairs:
        lines += [f"- seed {pair.seed}, both start from {pair.start:.0%}"]
        for name, run in (("closed", pair.closed), ("open", pair.opened)):
            curve = ", ".join(f"{reward:.0%} at {s.wall_s:.0f} s (step {s.step})" for s, reward in run.side.evaluated)
            lines += [f"- seed {pair.seed}, {name}: {curve}"]
    lines += ["", _verdict(pairs, level), ""]
    return "\n".join(lines)


def _row(seed: int, name: str, run: Run, level: float) -> str:
    reached, seen = run.side.reached(level), run.flow
    last = run.side.course.snapshots[-1]
    when = (
        f"{reached.wall_s:.0f} s, step {reached.step}" if reached else f"not by {last.wall_s:.0f} s, step {last.step}"
    )
    cells = [str(seed), name, when, f"{run.side.step_s:.1f} s", f"{seen.waiting_s:.1f} s", f"{seen.training_s:.1f} s"]
    cells += [f"{seen.staleness:.1f} ({seen.max_staleness})", f"{seen.groups:.1f} ({seen.flat_groups:.1f})"]
    return "| " + " | ".join([*cells, f"{run.reward:.1%}"]) + " |"


def _verdict(pairs: Sequence[Pair], level: float) -> str:
    found = [(pair.seed, ratio(pair, level)) for pair in pairs]
    told = [
        f"seed {seed}: " + ("open did not reach it" if r is None else f"{'at least ' * r.censored}{r.value:.2f}×")
        for seed, r in found
    ]
    interval = gain_ci95(pairs)
    low, high = interval or (float("nan"), float("nan"))
    return (
        f"Wall-clock to {level:.0%}, closed over open: {'; '.join(told)}. Final reward, open less closed: 95 % "
        f"interval {100 * low:+.1f} to {100 * high:+.1f} points."
    )


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None
