"""The main job's environment with tools that take their time: the shop, and the run that names it.

What a call takes is drawn from the task, the attempt at it and the call, so it is the same for whoever runs the
episodes in whatever order.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Final

from broker.process.settings import EnvironmentSection, Settings
from envs.interface import Episode, Split, Task
from envs.shop.environment import PERFECT, ShopEnvironment, ShopEpisode
from tests.bench.endtoend.plan import job
from tests.bench.rollouts.environment import Latency

NAME: Final = "tests.bench.asynchrony.environment:SlowShop"


class SlowShop(ShopEnvironment):
    """The shop, each of whose calls takes a log-normal time of this mean and 99th percentile more, in seconds."""

    def __init__(
        self,
        mean_s: float,
        p99_s: float,
        kinds: Sequence[str] | None = None,
        warm_sandboxes: int = 4,
        tool_timeout_s: float = 10.0,
        demonstrations: str = PERFECT,
    ) -> None:
        if not 0 < mean_s <= p99_s:
            raise ValueError(f"mean_s is {mean_s} and p99_s {p99_s}; neither may be 0, nor the mean be the larger")
        super().__init__(kinds, warm_sandboxes, tool_timeout_s, demonstrations)
        self._latency = Latency(mean_s, p99_s)
        self._attempts: Counter[tuple[Split, int]] = Counter()

    def episode(self, task: Task) -> Episode:
        """A fresh attempt, with latencies of its own."""
        self._attempts[task.split, task.index] += 1
        key = f"{task.split} {task.index} {self._attempts[task.split, task.index]}"
        return _SlowEpisode(task, self, self._latency, key)


class _SlowEpisode(ShopEpisode):
    """A customer's question, whose answer takes a while."""

    def __init__(self, task: Task, shop: SlowShop, latency: Latency, key: str) -> None:
        super().__init__(task, shop._pool, shop._tool_timeout_s)
        self._latency, self._key, self._num_calls = latency, key, 0

    async def run(self, command: str) -> str:
        """Wait, then run the tool's process; see ShopEpisode."""
        self._num_calls += 1
        await asyncio.sleep(delay_s(self._latency, self._key, self._num_calls))
        return await super().run(command)


def delay_s(latency: Latency, key: str, call: int) -> float:
    """The seconds that an attempt's n-th call takes."""
    return random.Random(f"{key} {call}").lognormvariate(*latency.shape)


def slow_job(seed: int, latency: Latency) -> Settings:
    """The main job with slow tools, and nothing else changed."""
    settings = job(seed)
    (section,) = settings.environments
    options = {**section.options, "mean_s": latency.mean_s, "p99_s": latency.p99_s}
    return settings.model_copy(update={"environments": (EnvironmentSection(name=NAME, options=options),)})
