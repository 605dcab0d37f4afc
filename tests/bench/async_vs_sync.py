"""`make bench-async`: the main job with slow tools, admission closed to staleness 0 and open to 8.

Two runs of `ergon run` with one TOML that differ in `learner.max_staleness` alone, one after the other on the whole
machine, from the weights of the same warm start. With 0 a step's episodes are sampled by the very weights that they
train, so the learner waits for the slowest tool call of each batch, and the engine for the learner. Held-out rewards of
the snapshots are taken afterwards, by the same code for both, with tools that do not wait; that time is nobody's.

Prints a Markdown report and, as its last line, JSON: `async_vs_sync_wall` (wall-clock to the same held-out reward,
closed over open, median over the seeds), `reward_async`, `reward_sync` (after the last step), `ci95` (of the difference
of these two, paired by task).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from broker.process.config import save_settings
from broker.process.lifecycle import run_main
from broker.process.settings import ModelSection
from deploy.scrape import JsonLines
from learner.model import prepare_model
from tests.bench.asynchrony.environment import slow_job
from tests.bench.asynchrony.report import Pair, Run, flow, markdown, summary
from tests.bench.end_to_end import task_rewards, warm_started
from tests.bench.endtoend import ergon_side
from tests.bench.endtoend.plan import job, read_course, write_course
from tests.bench.endtoend.report import Side
from tests.bench.rollouts.environment import Latency

CLOSED, OPEN = 0, 8


class Plan(NamedTuple):
    """How much of it is run. repeats: episodes of each held-out task with the last weights."""

    seeds: tuple[int, ...] = (0,)
    num_steps: int = 16
    every: int = 2
    level: float = 0.7
    tasks: int = 96
    repeats: int = 3
    latency: Latency = Latency(2.0, 15.0)


def one_seed(seed: int, plan: Plan, model: Path, place: Path) -> Pair:
    """Both sides of a seed. What is in `place` already, a warm start or a whole side, is not run again."""
    place.mkdir(parents=True, exist_ok=True)
    started_from = warm_started(seed, model, place)
    opened, start = one_side(seed, OPEN, plan, started_from, place / "open")
    closed, _ = one_side(seed, CLOSED, plan, started_from, place / "closed")
    return Pair(seed, start, closed, opened)


def one_side(seed: int, max_staleness: int, plan: Plan, model: Path, place: Path) -> tuple[Run, float]:
    """A run and its rewards; and the reward of the weights that it started from."""
    place.mkdir(parents=True, exist_ok=True)
    toml, done = place / "job.toml", place / "course.json"
    save_settings(slow_job(seed, plan.latency), toml)
    if not done.exists():
        _tell(f"seed {seed}: {plan.num_steps} steps with staleness {max_staleness}")
        only = [f"learner.max_staleness={max_staleness}"]
        write_course(ergon_side.train(model, place, seed, plan.num_steps, plan.every, toml, only), done)
    course = read_course(done)
    files = [snapshot.file for snapshot in course.snapshots]
    _tell(f"seed {seed}: rewards of {len(files)} snapshots")
    # The last one again and again: its reward is the one that is compared.
    order = [str(model / "model.safetensors"), *files, *files[-1:] * (plan.repeats - 1)]
    start, *found = task_rewards(order, seed, plan.tasks, model, place)
    final = dict(enumerate(map(fmean, zip(*found[len(files) - 1 :], strict=True))))
    side = Side(course, [fmean(rewards) for rewards in found[: len(files)]])
    return Run(side, final, flow(JsonLines(place / "run" / "metrics.jsonl").read())), fmean(start)


def benchmark(plan: Plan, place: Path) -> None:
    """Run it and print the report."""
    started, load = time.monotonic(), os.getloadavg()[0]
    model = prepare_model(job(0).model.path, ModelSection().cache).resolve()
    pairs = [one_seed(seed, plan, model, place / f"seed-{seed}") for seed in plan.seeds]
    tools = f"each tool call takes {plan.latency.mean_s:g} s more, log-normal, 99th percentile {plan.latency.p99_s:g} s"
    tasks = f"{plan.tasks} held-out tasks, with the last weights {plan.repeats} episodes of each"
    seconds = f"{time.monotonic() - started:.0f} s in all, load {load:.1f} at the start"
    conditions = f"{os.cpu_count()} cores, {platform.machine()}; {tools}; open: staleness {OPEN}; {tasks}; {seconds}."
    print(markdown(pairs, plan.level, conditions))
    print(json.dumps(summary(pairs, plan.level)))


def _tell(text: str) -> None:
    print(f"{text}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def main() -> None:
    """Parse the command line."""
    default = Plan()
    parser = argparse.ArgumentParser(prog="python -m tests.bench.async_vs_sync", description=__doc__)
    parser.add_argument("--seeds", type=_seeds, default=default.seeds, metavar="N,...", help="of the runs")
    parser.add_argument("--steps", type=int, default=default.num_steps, help="of each run")
    parser.add_argument("--every", type=int, default=default.every, help="steps between snapshots")
    parser.add_argument("--level", type=float, default=default.level, help="the held-out reward to reach")
    parser.add_argument("--mean", type=float, default=default.latency.mean_s, help="seconds of a tool call, mean")
    parser.add_argument("--p99", type=float, default=default.latency.p99_s, help="seconds of one in a hundred")
    parser.add_argument("--quick", action="store_true", help="4 steps and 32 tasks: a step's time, not the reward's")
    parser.add_argument(
        "--directory", type=Path, help="where runs and weights are kept; what is there is not run again"
    )
    options = parser.parse_args()
    latency = Latency(options.mean, options.p99)
    plan = Plan(options.seeds, options.steps, options.every, options.level, latency=latency)
    if options.quick:
        plan = plan._replace(seeds=plan.seeds[:1], num_steps=min(plan.num_steps, 4), tasks=32, repeats=1)

    def start() -> None:
        if options.directory:
            benchmark(plan, options.directory.resolve())
            return
        with tempfile.TemporaryDirectory(prefix="ergon-bench-") as directory:
            benchmark(plan, Path(directory))

    run_main("bench-async", start)


if __name__ == "__main__":
    main()
