"""What the adapters cost: a step of other people's environments through them, against the same step without.

Gymnasium in this process; TextArena and reasoning-gym by a Python of their own, that of `make test-adapters`. That of
reasoning-gym is a scoring, once an episode: here it happens in a fork of another process, on purpose.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from envs.interface import Action, Environment, ToolCall
from envs.registry import create_environment

HERE = Path(__file__).parent
INSTALL = HERE.parent / "integration" / "envs" / "adapters" / "install.sh"
LAKE, LAKE_MOVES, LAKE_NAMES = "FrozenLake-v1", (1, 1, 2, 1, 2, 2), ("left", "down", "right", "up")
HANOI, HANOI_MOVES = "TowerOfHanoi-v0", ("[A C]", "[A B]", "[C B]", "[A C]", "[B A]", "[B C]", "[A C]")
DATASET = "caesar_cipher"
MOST_PERCENT, MOST_MS = 5.0, 0.2  # an adapter keeps to one of them


async def adapters(rounds: int) -> dict[str, Any]:
    """The figures of each, the worst in percent and in ms, and whether each step keeps to its bound."""
    python = await asyncio.to_thread(_others)
    found = {
        "gymnasium": _compared(_lake_alone(rounds), await _lake(rounds)),
        "textarena": _compared(
            await asyncio.to_thread(_direct, python, "direct_games.py", HANOI, json.dumps(HANOI_MOVES), str(rounds)),
            await _hanoi(python, rounds),
        ),
    }
    scoring = _compared(
        await asyncio.to_thread(_direct, python, "direct_scores.py", DATASET, str(rounds)),
        await _scores(python, rounds),
    )
    kept = [each["overhead_pct"] < MOST_PERCENT or each["overhead_ms"] < MOST_MS for each in found.values()]
    return {
        "adapter_overhead_pct": max(each["overhead_pct"] for each in found.values()),
        "adapter_overhead_ms": max(each["overhead_ms"] for each in found.values()),
        "adapter_overhead_met": all(kept),
        "adapters": found | {"reasoning-gym, a scoring": scoring},
    }


def _compared(direct_s: list[float], adapted_s: list[float]) -> dict[str, float]:
    direct, adapted = (1000 * statistics.median(each) for each in (direct_s, adapted_s))
    return {
        "direct_p50_ms": round(direct, 4),
        "adapted_p50_ms": round(adapted, 4),
        "overhead_ms": round(adapted - direct, 4),
        "overhead_pct": round(100 * (adapted / direct - 1), 1),
    }


def _others() -> str:
    """The Python that has other people's packages, installed where they are not there yet."""
    place = os.environ.get("ERGON_FOREIGN", "/var/tmp/ergon-foreign")
    subprocess.run([str(INSTALL), sys.executable, place], check=True)
    return f"{place}/bin/python"


def _direct(python: str, program: str, *arguments: str) -> list[float]:
    command = [python, "-s", str(HERE / program), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{program} failed: {ended.stderr.strip()[-600:]}")
    return [float(value) for value in json.loads(ended.stdout.splitlines()[-1])]


def _lake_alone(rounds: int) -> list[float]:
    import gymnasium

    times = []
    environment = gymnasium.make(LAKE, render_mode="ansi", is_slippery=False)
    for seed in range(rounds):
        environment.reset(seed=seed)
        for move in LAKE_MOVES:
            began = time.perf_counter()
            environment.step(move)
            environment.render()
            times.append(time.perf_counter() - began)
    environment.close()
    return times


async def _lake(rounds: int) -> list[float]:
    options = {"id": LAKE, "options": {"is_slippery": False}, "actions": LAKE_NAMES, "solved_at": 1.0}
    moves = [{"action": LAKE_NAMES[move]} for move in LAKE_MOVES]
    return await _steps(create_environment("gymnasium", options), moves, rounds)


async def _hanoi(python: str, rounds: int) -> list[float]:
    environment = create_environment("textarena", {"id": HANOI, "python": python})
    return await _steps(environment, [{"move": move} for move in HANOI_MOVES], rounds)


async def _steps(environment: Environment, moves: list[dict[str, str]], rounds: int) -> list[float]:
    """Seconds of each step. Raises RuntimeError where the moves do not win."""
    times = []
    await environment.prepare()
    for index in range(rounds):
        episode = environment.episode(environment.task("train", index))
        await episode.start()
        for move in moves:
            action = Action("", (ToolCall("act", dict(move)),))
            began = time.perf_counter()
            await episode.step(action)
            times.append(time.perf_counter() - began)
        if (await episode.grade()).total != 1.0:
            raise RuntimeError(f"{moves} do not win {environment.name}: no figure counts")
        await episode.close()
    await environment.close()
    return times


async def _scores(python: str, rounds: int) -> list[float]:
    environment = create_environment("reasoning-gym", {"datasets": [DATASET], "python": python})
    times = []
    await environment.prepare()
    for index in range(rounds):
        task = environment.task("train", index)
        episode = environment.episode(task)
        messages = await episode.start()
        await episode.step(environment.reference(task).act(tuple(messages)))
        began = time.perf_counter()
        reward = await episode.grade()
        times.append(time.perf_counter() - began)
        if reward.total != 1.0:
            raise RuntimeError(f"{DATASET} does not take its own answer: no figure counts")
    await environment.close()
    return times
