"""`python -m tests.chaos.matrix [--faults N] [--seed S]`: the kill matrix.

Real processes (broker, relay, actors, learner) do a fixed amount of work while they are killed, stopped, cut off,
denied their disk and given other clocks, at random instants, alone and in pairs; learner, relay and actors are killed
in each phase of an update of the weights; and actors are told to end, so that others go on with their episodes, and
broker and actors are killed in each phase of that. Afterwards the trained set must be the issued set, by the learner's
audit, by its last checkpoint and by the broker's store. The last line is JSON. With `--curve` both channels are
encrypted.

`effective_fraction` is the time that the work takes without faults, divided by the time it took. The former is that
of a shorter run without faults, made first on the same machine, and its steady rate for the rest of the work.
`shared` says that the faults hit parcels of several trajectories: how many at least needed no message of their own.
`fetched` says how versions of the weights came to the actors: so many as anchors, so many as deltas.
`handed_over` counts the partials that the broker has answered for, `continued` the tickets trained on whose episode
went on from one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.process.lifecycle import ErgonError, install_stop
from broker.process.logs import configure_logging
from tests.chaos.schedule import KINDS, ORDERED, Fault, make_schedule
from tests.chaos.stage import NUM_ACTORS, TICKETS_PER_STEP, Stage, Timing, UnfinishedError
from tests.chaos.verdict import Verdict, judge

TICKETS_PER_FAULT = 32
ENOUGH_DRAINS = 5  # with fewer, chance alone may leave nobody to go on with what was handed over
DRAINS = ("drain", "kill_handover")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. Steps are batches of 16 tickets."""

    seed: int
    num_faults: int
    num_steps: int
    num_baseline_steps: int
    directory: Path
    deadline_s: float
    keep: bool
    curve: bool
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run that has ended. `timing` is None where it did not finish."""

    num_tickets: int
    faults: tuple[Fault, ...]
    timing: Timing | None
    wall_s: float
    verdict: Verdict
    problems: tuple[str, ...]
    restarts: dict[str, int]
    unavailable: dict[str, str]
    num_shared: int
    fetched: dict[str, int]


def run_one(
    directory: Path, name: str, plan: Plan, num_steps: int, num_faults: int, deadline_s: float, stop: threading.Event
) -> Outcome:
    """One run from its first process to its verdict. Its folder stays where something is wrong, or to keep it."""
    with Stage(directory, name, plan.seed, num_steps, plan.curve) as stage:
        unavailable = tuple(stage.unavailable)
        schedule = make_schedule(plan.seed, num_faults, stage.num_tickets, NUM_ACTORS, unavailable, plan.kinds)
        _say(f"{name}: {len(schedule)} faults over {stage.num_tickets} tickets; logs in {stage.run_dir}")
        timing, problems = None, []
        started = time.monotonic()
        try:
            timing = stage.run(schedule, deadline_s, stop)
        except (ErgonError, UnfinishedError) as error:
            problems.append(f"{type(error).__name__}: {error}")
        wall_s = time.monotonic() - started
        verdict = judge(stage.settings)
        problems += [*stage.crashes, *verdict.problems]
        if timing:
            problems += unproven(stage.injected, num_faults, stage.num_shared, stage.fetched, verdict.continued)
        stage.disposable = not problems and not (plan.keep and num_faults)
        return Outcome(
            stage.num_tickets,
            tuple(stage.injected),
            timing,
            wall_s,
            verdict,
            tuple(f"{name}: {problem}" for problem in problems),
            {child.name: child.num_restarts for child in stage.children.values()},
            stage.unavailable,
            stage.num_shared,
            dict(sorted(stage.fetched.items())),
        )


def run_matrix(plan: Plan, stop: threading.Event) -> dict[str, Any]:
    """The run without faults, then the one with them, then the verdict."""
    directory = plan.directory / f"matrix-{plan.seed}-{int(time.time())}"
    baseline = None
    if plan.num_baseline_steps:
        limit_s = 60.0 + 10 * plan.num_baseline_steps
        baseline = run_one(directory, "baseline", plan, plan.num_baseline_steps, 0, limit_s, stop)
        if baseline.problems:
            return report(baseline, None)
        _say(f"baseline: {baseline.num_tickets} tickets in {baseline.wall_s:.1f} s")
    outcome = run_one(directory, "matrix", plan, plan.num_steps, plan.num_faults, plan.deadline_s, stop)
    if not outcome.problems and not plan.keep:
        directory.rmdir()
    return report(outcome, baseline and without_faults_s(baseline, outcome.num_tickets))


def unproven(
    done: Sequence[Fault], num_faults: int, num_shared: int, fetched: Mapping[str, int], num_continued: int
) -> list[str]:
    """What a run that was finished has not put to the test, though it should have."""
    problems = []
    if len(done) < num_faults:
        problems.append(f"the work was done after {len(done)} of {num_faults} faults")
    if not num_shared:
        problems.append("every trajectory travelled alone: no parcel of several was under test")
    if not fetched.get("delta"):
        problems.append("no version came to an actor as a delta")
    if not num_continued and sum(fault.kind in DRAINS for fault in done) >= ENOUGH_DRAINS:
        problems.append("actors were told to end, and none of their episodes was gone on with and trained on")
    return problems


def report(outcome: Outcome, expected_s: float | None) -> dict[str, Any]:
    """The verdict as the last line has it. `expected_s`: what the work takes without faults."""
    verdict = outcome.verdict
    return {
        **tally(outcome.faults),
        "issued": verdict.issued,
        "trained": verdict.trained,
        "lost": verdict.lost,
        "duplicated": verdict.duplicated,
        "shared": outcome.num_shared,
        "fetched": outcome.fetched,
        "handed_over": verdict.handed_over,
        "continued": verdict.continued,
        "effective_fraction": round(expected_s / outcome.wall_s, 3) if expected_s and outcome.timing else None,
        "without_faults_s": round(expected_s, 1) if expected_s else None,
        "wall_s": round(outcome.wall_s, 1),
        "restarts": outcome.restarts,
        "unavailable": outcome.unavailable,
        "ok": not outcome.problems,
        "problems": list(outcome.problems),
    }


def without_faults_s(baseline: Outcome, num_tickets: int) -> float | None:
    """Seconds that `num_tickets` take without faults: those of the baseline, and its steady rate for the rest."""
    if baseline.timing is None or baseline.timing.rate is None:
        return None
    return baseline.timing.total_s + (num_tickets - baseline.num_tickets) / baseline.timing.rate


def tally(faults: Sequence[Fault]) -> dict[str, Any]:
    """Faults by kind and target; `paired`: those that came in pairs; `by_phase`: kills in the phases of an update
    or handover."""
    return {
        "faults": len(faults),
        "by_kind": dict(sorted(Counter(fault.kind for fault in faults).items())),
        "by_target": dict(sorted(Counter(fault.target for fault in faults).items())),
        "paired": sum(fault.pair is not None for fault in faults),
        "by_phase": dict(
            sorted(Counter(f"{fault.target} {fault.variant}" for fault in faults if fault.kind in ORDERED).items())
        ),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line, run, print the verdict; exit code 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--tickets", type=int, help=f"work; default {TICKETS_PER_FAULT} for each fault")
    parser.add_argument("--baseline-tickets", type=int, help="work of the run without faults; default a sixth, 0: none")
    parser.add_argument("--directory", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--deadline-s", type=float, help="default 120 + 5 for each fault")
    parser.add_argument("--keep", action="store_true", help="keep logs and store of a run that went well, too")
    parser.add_argument("--curve", action="store_true", help="encrypt both channels, with keys")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of faults, with commas; default all")
    arguments = parser.parse_args()
    kinds = tuple(arguments.kinds.split(","))
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds {arguments.kinds}: unknown {', '.join(sorted(unknown))}; known are {', '.join(KINDS)}")
    configure_logging("chaos")
    num_tickets = arguments.tickets or max(128, TICKETS_PER_FAULT * arguments.faults)
    num_steps = math.ceil(num_tickets / TICKETS_PER_STEP)
    baseline_tickets = arguments.baseline_tickets
    if baseline_tickets is None:
        baseline_tickets = max(160, num_tickets // 6)
    plan = Plan(
        arguments.seed,
        arguments.faults,
        num_steps,
        math.ceil(baseline_tickets / TICKETS_PER_STEP),
        arguments.directory,
        arguments.deadline_s or 120 + 5 * arguments.faults,
        arguments.keep,
        arguments.curve,
        kinds,
    )
    command = ["python", "-m", "tests.chaos.matrix", "--seed", plan.seed, "--faults", plan.num_faults]
    command += ["--tickets", num_tickets, "--baseline-tickets", baseline_tickets, "--kinds", arguments.kinds]
    command += ["--curve"] * plan.curve
    _say(f"seed={plan.seed}")
    result: dict[str, Any] = {"ok": False, "problems": ["the matrix itself failed"]}
    try:
        result = run_matrix(plan, install_stop())
    finally:
        if not result["ok"]:
            _say("FAILED: " + "; ".join(result["problems"]))
            _say(f"logs: {plan.directory}; repeat: {shlex.join(map(str, command))}")
    print(json.dumps(result | {"seed": plan.seed, "curve": plan.curve}))
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
