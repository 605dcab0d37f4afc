"""`make bench-end-to-end`: the main job trained by Ergon and by TRL's GRPOTrainer, wall-clock to the same reward.

For each seed: Ergon's warm start once, and from its weights Ergon (`ergon run`) and TRL (its own generation,
synchronous), one after the other on the whole machine. Prints a Markdown report and, as its last line, JSON:
`vs_trl_wall` is the median over the seeds of TRL's seconds over Ergon's. TRL is stopped at `--cap` times Ergon's time;
such a seed counts as "at least".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from broker.process.lifecycle import run_main
from broker.process.settings import ModelSection
from learner.model import prepare_model
from tests.bench.endtoend import ergon_side
from tests.bench.endtoend.plan import ROOT, Course, job, read_course
from tests.bench.endtoend.report import Pair, Side, markdown, summary
from tests.bench.training.environment import environ, python

MAX_TRL_STEPS = 1000  # the cap ends it
NUM_STEPS = 24  # with the main job's 16, two of three seeds end at 75 and 79 %, a little below the level


class Plan(NamedTuple):
    """How much of it is run."""

    seeds: tuple[int, ...]
    num_steps: int
    every: int
    level: float
    cap: float
    tasks: int
    trl_steps: int = MAX_TRL_STEPS


def one_seed(seed: int, plan: Plan, model: Path, place: Path) -> Pair:
    """Both sides of a seed. A warm start that is in `place` already is not made again."""
    place.mkdir(parents=True, exist_ok=True)
    started_from = warm_started(seed, model, place)
    ergon = evaluated(ergon_course(seed, plan, started_from, place), seed, plan, started_from, place, stop=False)
    reached = ergon.reached(plan.level)
    # Where Ergon itself does not get there, TRL has as long as Ergon took: the steps can be compared at least.
    end = reached or ergon.course.snapshots[-1]
    cap_s = end.wall_s * (plan.cap if reached else 1.0)
    _tell(
        f"seed {seed}: Ergon {'reached' if reached else 'did not reach'} {plan.level:.0%}, TRL may take {cap_s:.0f} s"
    )
    course = trl_course(seed, plan, started_from, place / "trl", cap_s)
    return Pair(seed, ergon, evaluated(course, seed, plan, started_from, place, stop=True))


def warm_started(seed: int, model: Path, place: Path) -> Path:
    """The model that both sides start from."""
    target = place / "model"
    if not (target / "model.safetensors").exists():
        from tests.bench.endtoend.weights import as_model

        _tell(f"seed {seed}: warm start")
        as_model(ergon_side.warm_start(model, place / "warm", seed), model, target)
    return target


def ergon_course(seed: int, plan: Plan, model: Path, place: Path) -> Course:
    """Ergon's course."""
    _tell(f"seed {seed}: Ergon, {plan.num_steps} steps")
    return ergon_side.train(model, place / "ergon", seed, plan.num_steps, plan.every)


def trl_course(seed: int, plan: Plan, model: Path, place: Path, cap_s: float) -> Course:
    """TRL's course. Raises RuntimeError where it fails."""
    place.mkdir(parents=True, exist_ok=True)
    threads = os.cpu_count() or 1
    order = [model, seed, place, time.time(), threads, plan.every, plan.trl_steps, cap_s]
    command = [str(python()), "-m", "tests.bench.endtoend.trl_side", *(str(word) for word in order)]
    with (place / "trl.log").open("wb") as log:
        done = subprocess.run(command, cwd=ROOT, env=environ(threads), stdout=log, stderr=log, check=False)
    if done.returncode:
        raise RuntimeError(f"TRL's side failed ({done.returncode}): {(place / 'trl.log').read_text()[-3000:]}")
    return read_course(place / "course.json")


def evaluated(course: Course, seed: int, plan: Plan, model: Path, place: Path, *, stop: bool) -> Side:
    """A side with its held-out rewards. stop: at the first snapshot that reaches the level."""
    files = [snapshot.file for snapshot in course.snapshots if snapshot.file]
    if not files or not plan.tasks:
        return Side(course, [])
    level = str(plan.level) if stop else ""
    return Side(course, [fmean(rewards) for rewards in task_rewards(files, seed, plan.tasks, model, place, level)])


def task_rewards(
    files: Sequence[str], seed: int, num_tasks: int, model: Path, place: Path, level: str = ""
) -> list[list[float]]:
    """The rewards of the held-out tasks for each of these files of weights, up to the first whose mean reaches the
    level. Raises RuntimeError where the evaluation fails."""
    out = place / "rewards.json"
    words = [str(model), str(seed), str(num_tasks), level, str(out), *files]
    command = [sys.executable, "-m", "tests.bench.endtoend.evaluator", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the evaluation failed: {done.stderr[-3000:]}")
    rewards: list[list[float]] = json.loads(out.read_text())
    return rewards


def benchmark(plan: Plan, place: Path) -> None:
    """Run it and print the report."""
    started, load = time.monotonic(), os.getloadavg()[0]
    python()  # TRL's environment: making it is nobody's time
    model = prepare_model(job(0).model.path, ModelSection().cache).resolve()
    pairs = [one_seed(seed, plan, model, place / f"seed-{seed}") for seed in plan.seeds]
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    seconds = f"{time.monotonic() - started:.0f} s in all, load {load:.1f} at the start"
    conditions = f"{machine}; {plan.tasks} held-out tasks, every {plan.every} steps; {seconds}."
    print(markdown(pairs, plan.level, conditions))
    print(json.dumps(summary(pairs, plan.level)))


def _tell(text: str) -> None:
    print(f"{text}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.end_to_end", description=__doc__)
    parser.add_argument("--seeds", type=_seeds, default=(0, 1, 2), metavar="N,...", help="of the runs")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="of Ergon")
    parser.add_argument("--every", type=int, default=2, help="steps between snapshots")
    parser.add_argument("--level", type=float, default=0.8, help="the held-out reward to reach")
    parser.add_argument("--cap", type=float, default=2.5, help="TRL is stopped at so many times Ergon's time")
    parser.add_argument("--tasks", type=int, default=job(0).eval.tasks, help="held-out tasks of an evaluation")
    parser.add_argument("--quick", action="store_true", help="one seed, 4 steps of Ergon and 2 of TRL: a step's time")
    parser.add_argument("--directory", type=Path, help="where runs and weights are kept; a warm start there is reused")
    options = parser.parse_args()
    plan = Plan(options.seeds, options.steps, options.every, options.level, options.cap, options.tasks)
    if options.quick:
        plan = plan._replace(seeds=plan.seeds[:1], num_steps=4, tasks=32, trl_steps=2)

    def start() -> None:
        if options.directory:
            benchmark(plan, options.directory.resolve())
            return
        with tempfile.TemporaryDirectory(prefix="ergon-bench-") as directory:
            benchmark(plan, Path(directory))

    run_main("bench-end-to-end", start)


if __name__ == "__main__":
    main()
