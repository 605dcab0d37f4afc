"""`make bench-weights`: the weight channel on real consecutive versions of SmolLM2-135M, against sending everything.

Prints a Markdown report and, as its last line, JSON. Versions are made by real optimiser steps (`weight_versions.py`);
what they are compared with is a gloo broadcast, a snapshot by the same channel, zstd of it, and a file in a shared
directory. Links are loopback and shaped ones (`weightchannel/link.py`, which needs root).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from broker.process.lifecycle import run_main
from broker.protocol.weights import TensorSpec
from tests.bench.weight_versions import versions
from tests.bench.weightchannel import codec, crowd, link, step, travel
from tests.bench.weightchannel.report import RATES, Results, markdown, summary
from tests.bench.weightchannel.workers import load, workers

PARTS = ("codec", "shared", "travel", "crowd", "step", "pause")
SHARED = {"/dev/shm": Path("/dev/shm"), "a directory on disk": Path("/var/tmp")}


class Plan(NamedTuple):
    """How much of it is run. `crowd`: by number of relays in a row, for how many actors."""

    rates: tuple[float, ...]
    num_versions: int
    repeats: int
    crowd: Mapping[int, Sequence[int]]
    gloo_slow: int  # broadcasts over the slow link, half a minute each; 0: computed
    num_steps: int
    adoptions: int
    parts: tuple[str, ...] = PARTS
    slow_link: bool = True


FULL = Plan(RATES, 3, 5, {0: (1, 4, 16, 64), 1: (1, 4, 16, 64), 2: (1, 4, 16, 64)}, 1, 3, 5)
QUICK = Plan(RATES[:1], 2, 3, {0: (1, 64), 1: (1, 64)}, 0, 1, 3, ("codec", "travel", "crowd"), slow_link=False)


class Benchmark:
    """One run: every part adds to `results` and says how it went on standard error."""

    def __init__(self, plan: Plan, directory: Path, settled: bool) -> None:
        self.results = Results()
        self._plan, self._directory = plan, directory
        self._versions = {
            (rate, spread): versions(directory, rate, plan.num_versions, spread)
            for rate in plan.rates
            for spread in ((False, True) if settled else (False,))
        }

    def run(self, parts: Sequence[str]) -> None:
        """These parts, one after the other."""
        for part in parts:
            started = time.monotonic()
            work: Callable[[], None] = getattr(self, f"_{part}")
            work()
            print(f"{part}: {time.monotonic() - started:.0f} s, {load()}", file=sys.stderr)

    @property
    def _first(self) -> tuple[tuple[TensorSpec, ...], list[Path]]:
        return self._versions[self._plan.rates[0], False]

    def _codec(self) -> None:
        with workers("codec") as (worker,):
            for key, (specs, files) in self._versions.items():
                self.results.codecs[key] = worker.call(codec.measure_codec, specs, files, self._plan.repeats)
            self.results.packed = worker.call(codec.measure_zstd, self._first[1][0])

    def _shared(self) -> None:
        specs, files = self._first
        with workers("shared") as (worker,):
            for name, place in SHARED.items():
                with tempfile.TemporaryDirectory(prefix="ergon-bench-", dir=place) as directory:
                    order = (specs, files[0], Path(directory), self._plan.repeats)
                    self.results.shared[name] = worker.call(codec.measure_shared, *order)

    def _travel(self) -> None:
        plan, first = self._plan, self._first
        self.results.travels.append(travel.measure(travel.LOOPBACK, *first, plan.repeats, plan.repeats))
        if reason := link.obstacle():
            self.results.notes.append(f"no shaped link: {reason}")
            return
        repeats = min(plan.repeats, 3)
        self.results.travels.append(travel.measure(travel.GIGABIT, *first, repeats, repeats))
        if plan.slow_link:
            self.results.travels.append(travel.measure(travel.SLOW, *first, repeats, plan.gloo_slow, warm=False))

    def _crowd(self) -> None:
        def tell(cell: crowd.Crowd) -> None:
            print(f"{cell.actors} actors, {cell.relays} relays: {cell.cpu_s:.3f} s of CPU", file=sys.stderr)

        with tempfile.TemporaryDirectory(prefix="ergon-bench-") as directory:
            plan = self._plan
            self.results.crowds = crowd.measure(*self._first, plan.crowd, plan.repeats, Path(directory), tell)

    def _step(self) -> None:
        self.results.step = step.learner_step(self._plan.num_steps)

    def _pause(self) -> None:
        plan = self._plan
        order = (self._directory, plan.rates[0], plan.num_versions, plan.adoptions)
        self.results.pause = step.engine_pause(*order, "keep")


def benchmark(plan: Plan, parts: Sequence[str], directory: Path, settled: bool) -> None:
    """Run it and print the report."""
    started, loaded = time.monotonic(), load()
    run = Benchmark(plan, directory, settled)
    run.run(parts)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}"
    conditions = f"{machine}; {plan.repeats} repeats, {time.monotonic() - started:.0f} s in all; {loaded} at the start"
    print(markdown(run.results, conditions))
    print(json.dumps(summary(run.results)))


def _parts(text: str) -> list[str]:
    """The parts of `--only`. Raises ArgumentTypeError for one that does not exist."""
    words = text.split(",")
    if unknown := [word for word in words if word not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no part; allowed: {', '.join(PARTS)}, several with commas")
    return words


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.weights", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="codec, travel and crowd alone, at one learning rate")
    parser.add_argument("--only", type=_parts, metavar="PART,...", help=", ".join(PARTS))
    parser.add_argument("--versions", type=Path, metavar="DIR", help="where versions are kept, and made if missing")
    parser.add_argument("--settled", action="store_true", help="also versions as after very many steps")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    parts = arguments.only or plan.parts

    def start() -> None:
        if arguments.versions:
            benchmark(plan, parts, arguments.versions, arguments.settled)
            return
        with tempfile.TemporaryDirectory(prefix="ergon-bench-") as directory:
            benchmark(plan, parts, Path(directory), arguments.settled)

    run_main("bench-weights", start)


if __name__ == "__main__":
    main()
