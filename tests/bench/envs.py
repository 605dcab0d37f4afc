"""What sandboxes and environments cost: `make bench-envs`. ARGS="--quick" for a look, "--only sandbox,code".

The sandbox: making one cold, taking one from a warm pool, a step of its persistent shell against a fresh `sh -c` in the
same sandbox, and the steps of 64 shells at once. Each built-in environment: resets and reference steps at 1, 16 and 64
at once, and the memory that one episode's processes add. MiniWoB++: a reset here, which is a fresh browser context with
the page loaded, against one through Gymnasium, which is the same window again. The adapters: a step through them
against the same step without (adapted.py). The last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psutil

from envs.browser.miniwob import MiniwobEnvironment
from envs.interface import Environment, Message
from envs.registry import BUILT_IN, create_environment
from envs.sandbox import Sandbox, SandboxPool
from tests.bench import miniwob_gymnasium
from tests.bench.adapted import adapters

AT_ONCE = (1, 16, 64)
MAX_TURNS = 60
PARTS = ("sandbox", "miniwob", "adapters")
MINIWOB_PAGE = "click-checkboxes"


def percentile(values_s: list[float], percent: int) -> float:
    """In ms."""
    ranked = sorted(values_s)
    return round(1000 * ranked[min(len(ranked) - 1, len(ranked) * percent // 100)], 3)


async def timed(action: Callable[[], Awaitable[Any]], times_s: list[float]) -> Any:
    """The action's result; its seconds are added to the list."""
    began = time.perf_counter()
    result = await action()
    times_s.append(time.perf_counter() - began)
    return result


async def sandboxes(rounds: int) -> dict[str, float]:
    """The figures of the sandbox alone."""
    cold: list[float] = []
    warm: list[float] = []
    shell: list[float] = []
    fresh: list[float] = []
    for _ in range(rounds):
        await (await timed(Sandbox.create, cold)).close()
    async with SandboxPool(4) as pool:
        for _ in range(rounds):
            await pool.prepare()
            await (await timed(pool.acquire, warm)).close()
    async with await Sandbox.create() as sandbox:
        await sandbox.shell("true")
        for _ in range(rounds * 10):  # in turn, so that both meet the same machine
            await timed(lambda: sandbox.shell("x=$((x+1)); echo $x"), shell)
            await timed(lambda: sandbox.exec("x=$((x+1)); echo $x"), fresh)
    many = await asyncio.gather(*(Sandbox.create() for _ in range(64)))
    try:
        await asyncio.gather(*(each.shell("true") for each in many))
        steps = rounds

        async def work(sandbox: Sandbox) -> None:
            for _ in range(steps):
                await sandbox.shell("x=$((x+1)); echo $x")

        began = time.perf_counter()
        await asyncio.gather(*map(work, many))
        rate = 64 * steps / (time.perf_counter() - began)
    finally:
        await asyncio.gather(*(each.close() for each in many))
    return {
        "sandbox_create_p50_ms": percentile(cold, 50),
        "sandbox_create_p99_ms": percentile(cold, 99),
        "sandbox_acquire_p50_ms": percentile(warm, 50),
        "shell_step_p50_ms": percentile(shell, 50),
        "shell_step_p99_ms": percentile(shell, 99),
        "exec_step_p50_ms": percentile(fresh, 50),
        "exec_over_shell": round(statistics.median(fresh) / statistics.median(shell), 2),
        "shell_steps_per_s_64": round(rate, 1),
    }


def memory_mb() -> float:
    """Proportional memory of this process and all that it started."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended while we looked, or is a first process, which shows nothing of itself
    return total / 1e6


async def environment_at(name: str, at_once: int, episodes: int) -> dict[str, float]:
    """The figures of one environment with so many episodes at once."""
    environment = create_environment(name)
    await environment.prepare()
    resets: list[float] = []
    steps: list[float] = []
    begun = asyncio.Barrier(at_once + 1)
    measured = asyncio.Barrier(at_once + 1)
    queue = iter(range(episodes))

    async def one(index: int, first: bool) -> None:
        task = environment.task("train", index)
        episode = environment.episode(task)
        messages = list(await timed(episode.start, resets))
        if first:
            await begun.wait()
            await measured.wait()
        try:
            await _play(environment, task, episode, messages, steps)
        finally:
            await episode.close()

    async def worker(place: int) -> None:
        await one(place, first=True)
        for index in queue:
            await one(index, first=False)

    before = memory_mb()
    workers = [asyncio.create_task(worker(place)) for place in range(at_once)]
    await begun.wait()
    added = memory_mb() - before
    began = time.perf_counter()
    await measured.wait()
    await asyncio.gather(*workers)
    wall_s = time.perf_counter() - began
    await environment.close()
    return {
        "resets_per_s": round(episodes / wall_s, 1),
        "steps_per_s": round(len(steps) / wall_s, 1),
        "reset_p50_ms": percentile(resets, 50),
        "reset_p99_ms": percentile(resets, 99),
        "step_p50_ms": percentile(steps, 50),
        "step_p99_ms": percentile(steps, 99),
        "mb_per_episode": round(added / at_once, 2),
    }


async def _play(environment: Environment, task: Any, episode: Any, messages: list[Message], steps: list[float]) -> None:
    policy = environment.reference(task)
    for _ in range(MAX_TURNS):
        action = policy.act(tuple(messages))
        observation = await timed(lambda action=action: episode.step(action), steps)  # type: ignore[misc]
        messages += [Message("assistant", action.text), *observation.messages]
        if observation.done:
            break
    if (await episode.grade()).total != 1.0:
        raise RuntimeError(f"the reference policy failed at {task.env} {task.split} {task.index}: no figure counts")


async def miniwob(rounds: int) -> dict[str, float]:
    """A reset of one page, here and as MiniWoB++'s own package does it."""
    environment = MiniwobEnvironment([MINIWOB_PAGE])
    await environment.prepare()
    ours: list[float] = []
    for index in range(rounds):
        await environment.prepare()
        episode = environment.episode(environment.task("train", index))
        await timed(episode.start, ours)
        await episode.close()
    await environment.close()
    theirs = await asyncio.to_thread(miniwob_gymnasium.resets, MINIWOB_PAGE, rounds)
    return {
        "miniwob_reset_p50_ms": percentile(ours, 50),
        "miniwob_gymnasium_reset_p50_ms": percentile(theirs, 50),
        "gymnasium_over_ours": round(statistics.median(theirs) / statistics.median(ours), 2),
    }


async def measure(only: list[str], quick: bool) -> dict[str, Any]:
    """All that was asked for."""
    found: dict[str, Any] = {"bench": "envs"}
    if "sandbox" in only:
        found |= await sandboxes(15 if quick else 50)
        print({key: value for key, value in found.items() if key != "bench"})
    if "miniwob" in only:
        found |= await miniwob(15 if quick else 100)
        print({key: value for key, value in found.items() if "miniwob" in key})
    if "adapters" in only:
        found |= (cost := await adapters(20 if quick else 200))
        print(cost)
    found["environments"] = {}
    for name in (each for each in only if each not in PARTS):
        rows = {}
        for at_once in AT_ONCE:
            rows[str(at_once)] = await environment_at(name, at_once, 20 if quick else 200)
            print(f"{name} at {at_once}: {rows[str(at_once)]}")
        found["environments"][name] = rows
    if "browser" in found["environments"]:
        found["browser_reset_p50_ms"] = found["environments"]["browser"]["1"]["reset_p50_ms"]
    return found


def main() -> None:
    """Read the options, measure, print."""
    choices = [*PARTS, *sorted(set(BUILT_IN) - {"program"})]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", default=",".join(choices), help=f"of {', '.join(choices)}")
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := [each for each in only if each not in choices]:
        parser.error(f"--only {','.join(unknown)}: choose of {', '.join(choices)}")
    print(json.dumps(asyncio.run(measure(only, options.quick))))


if __name__ == "__main__":
    main()
