"""Held-out rewards of snapshots of either side, by the actor's own engine and rollout: the same code for both.

`python -m tests.bench.endtoend.evaluator MODEL SEED TASKS LEVEL OUT FILE...`: adopts one file of weights after the
other, runs the held-out tasks at the training temperature, and writes the rewards of each task; ends where their mean
reaches LEVEL (an empty LEVEL: never). The time that this takes belongs to neither side.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from actors.process import make_environments
from actors.renderer import Renderer
from actors.rollout import run_episode
from actors.vllm_engine import VllmEngine
from broker.process.settings import Settings
from broker.protocol.trajectory import Mode, PolicyVersion, Ticket
from envs.interface import Environment
from tests.bench.endtoend.plan import job, ticket
from tests.bench.endtoend.weights import as_safetensors
from tests.digest import data_digest

DEADLINE_S = 600.0  # of an episode: nobody is in a hurry here


class Evaluator:
    """An engine, the job's environments, and its held-out tasks."""

    def __init__(self, settings: Settings, model: Path, num_tasks: int) -> None:
        self._settings, self._num_tasks = settings, num_tasks
        self._engine = VllmEngine.start(model, settings.actor, settings.run.seed)
        self._renderer = Renderer.load(model)
        self._environments = make_environments(settings)
        self._slots = asyncio.Semaphore(settings.actor.max_num_seqs)

    async def rewards(self, files: Sequence[Path], level: float | None) -> list[list[float]]:
        """The rewards of each by task, up to the first whose mean reaches the level."""
        found: list[list[float]] = []
        for environment in self._environments.values():
            await environment.prepare()
        for number, file in enumerate(files):
            weights = as_safetensors(file)
            await self._engine.adopt(PolicyVersion(1, number + 1), weights, data_digest(weights))
            found.append(await self._rewards(number))
            mean = fmean(found[-1])
            print(f"{file.name}: {mean:.3f}", file=sys.stderr, flush=True)
            if level is not None and mean >= level:
                break
        for environment in self._environments.values():
            await environment.close()
        return found

    def shutdown(self) -> None:
        """End the engine."""
        self._engine.shutdown()

    async def _rewards(self, number: int) -> list[float]:
        first = number * self._num_tasks
        tickets = [
            ticket(self._settings, Mode.EVAL, index, first + index, DEADLINE_S) for index in range(self._num_tasks)
        ]
        return await asyncio.gather(*(self._episode(each) for each in tickets))

    async def _episode(self, order: Ticket) -> float:
        environment: Environment = self._environments[order.task.env]
        async with self._slots:
            trajectory = await run_episode(
                order,
                environment,
                self._engine,
                self._renderer,
                actor_id="evaluator",
                max_model_len=self._settings.actor.max_model_len,
            )
        return trajectory.head.reward


def main() -> None:
    """Parse the command line, which is the benchmark's own."""
    model, seed, num_tasks, level, out, *files = sys.argv[1:]
    settings = job(int(seed), [f"actor.threads={os.cpu_count()}"])
    evaluator = Evaluator(settings, Path(model), int(num_tasks))
    try:
        rewards = asyncio.run(evaluator.rewards([Path(file) for file in files], float(level) if level else None))
        Path(out).write_text(json.dumps(rewards))
    finally:
        evaluator.shutdown()


if __name__ == "__main__":
    main()
