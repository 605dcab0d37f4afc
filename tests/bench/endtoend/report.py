"""What the end-to-end comparison tells: when a side reached a reward, ratios, Markdown. Pure; runs nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests.bench.endtoend.plan import Course, Snapshot


class Side(NamedTuple):
    """A course with the held-out rewards of its snapshots, of the first ones at least."""

    course: Course
    rewards: Sequence[float]

    @property
    def evaluated(self) -> list[tuple[Snapshot, float]]:
        """Snapshots with their rewards."""
        kept = [snapshot for snapshot in self.course.snapshots if snapshot.file]
        return list(zip(kept, self.rewards, strict=False))

    def reached(self, level: float) -> Snapshot | None:
        """The first snapshot with this reward; None where there is none."""
        return next((snapshot for snapshot, reward in self.evaluated if reward >= level), None)

    @property
    def step_s(self) -> float:
        """Seconds of a step, starting up left out."""
        last = self.course.snapshots[-1]
        return last.training_s / last.step


class Pair(NamedTuple):
    """Both sides of one seed. trl is None where it was not run."""

    seed: int
    ergon: Side
    trl: Side | None


class Ratio(NamedTuple):
    """TRL's wall-clock over Ergon's. censored: TRL was stopped before it got there, so it is at least that."""

    value: float
    censored: bool


def ratio(pair: Pair, level: float, *, started: bool = True) -> Ratio | None:
    """Of one seed; None where Ergon did not reach the level. started: from the command on, else from the first step."""
    ours = pair.ergon.reached(level)
    if ours is None or pair.trl is None:
        return None
    theirs = pair.trl.reached(level)
    end = theirs or pair.trl.course.snapshots[-1]
    value = end.wall_s / ours.wall_s if started else end.training_s / ours.training_s
    return Ratio(value, theirs is None)


def summary(pairs: Sequence[Pair], level: float) -> dict[str, Any]:
    """The last line's JSON. The median is a lower bound where `censored` of its seeds are not few."""
    known = [found for pair in pairs if (found := ratio(pair, level))]
    since = [found for pair in pairs if (found := ratio(pair, level, started=False))]
    steps = [pair.trl.step_s / pair.ergon.step_s for pair in pairs if pair.trl is not None]
    return {
        "vs_trl_wall": _median([found.value for found in known]),
        "vs_trl_wall_without_start": _median([found.value for found in since]),
        "vs_trl_step": _median(steps),
        "censored": sum(found.censored for found in known),
        "not_reached": sum(pair.ergon.reached(level) is None for pair in pairs),
        "seeds": [pair.seed for pair in pairs],
        "level": level,
    }


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


def markdown(pairs: Sequence[Pair], level: float, conditions: str) -> str:
    """The report for people."""
    lines = ["## End to end", "", conditions, ""]
    lines += [
        f"| seed | Ergon to {level:.0%} | TRL to {level:.0%} | TRL / Ergon | a step: Ergon | TRL | CPU: Ergon | TRL |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_row(pair, level) for pair in pairs),
        "",
        "Wall-clock from the command to the weights (in brackets: since the learner was ready, or training began). "
        "Both start from the weights of Ergon's warm start; evaluation is the same code for both, afterwards, and "
        "counts for neither. Ergon's time contains its checkpoints, TRL's no writing of weights.",
        "",
    ]
    for pair in pairs:
        for name, side in (("Ergon", pair.ergon), ("TRL", pair.trl)):
            if side is not None and side.evaluated:
                curve = ", ".join(f"{s.step}: {reward:.0%} at {s.wall_s:.0f} s" for s, reward in side.evaluated)
                lines.append(f"- seed {pair.seed}, {name}, held-out reward by step: {curve}")
    return "\n".join(lines)


def _row(pair: Pair, level: float) -> str:
    found = ratio(pair, level)
    told = "-" if found is None else f"{'at least ' if found.censored else ''}{found.value:.2f}"
    ergon, trl = pair.ergon, pair.trl
    cells = [str(pair.seed), _when(ergon, level), _when(trl, level) if trl else "-", told, f"{ergon.step_s:.1f} s"]
    cells += [f"{trl.step_s:.1f} s" if trl else "-", f"{ergon.course.cpu_s:.0f} s"]
    return "| " + " | ".join([*cells, f"{trl.course.cpu_s:.0f} s" if trl else "-"]) + " |"


def _when(side: Side, level: float) -> str:
    reached = side.reached(level)
    if reached is not None:
        return f"{reached.wall_s:.0f} s ({reached.training_s:.0f}), step {reached.step}"
    last = side.course.snapshots[-1]
    return f"not by {last.wall_s:.0f} s ({last.training_s:.0f}), step {last.step}"
