"""An environment whose every turn calls one tool, however that turn was written, and whose tools are slow.

What a call takes is drawn from the task, the turn and the attempt, so it is the same for whoever runs the episodes. A
share of the calls hang: on the event loop, on it ignoring their cancellation, in a thread, or in a worker process. Each
call goes through a `ToolSet`, with its time limits, and how long it really took is written down.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from envs.interface import (
    Action,
    Environment,
    Episode,
    Message,
    Observation,
    ReferencePolicy,
    Reward,
    Split,
    Task,
    Tool,
    ToolCall,
)
from envs.tools import ToolEpisode, ToolSet, tool

NAME: Final = "slow-tools"
NUM_TURNS: Final = 4
QUESTION: Final = (
    "Shop number {index} keeps its stock in {number} boxes. Look up what is in them, one box after the other, add the "
    "numbers as you go, and tell the total when you have seen all of them."
)
FOUND: Final = "box {turn} holds {number} plates and {other} cups"
HANGS: Final = ("hang_on_loop", "resist_on_loop", "hang_in_thread", "hang_in_process")
UNTIL: Final = threading.Event()  # set at the end, so that what hangs in a thread ends


class Latency(NamedTuple):
    """Log-normal: of a mean and a 99th percentile, in seconds. A constant where the two are equal. hanging: share of
    the calls that never end by themselves."""

    mean_s: float
    p99_s: float
    hanging: float = 0.0

    @property
    def shape(self) -> tuple[float, float]:
        """mu and sigma: mean = exp(mu + sigma²/2), p99 = exp(mu + 2.326 sigma), the smaller root."""
        z = 2.3263478740408408
        sigma = z - math.sqrt(z * z - 2 * math.log(self.p99_s / self.mean_s))
        return math.log(self.mean_s) - sigma * sigma / 2, sigma

    def draw(self, key: str) -> ToolCall:
        """The call that this key makes."""
        rng = random.Random(key)
        if rng.random() < self.hanging:
            return ToolCall(rng.choice(HANGS), {})
        if self.mean_s <= 0 or self.mean_s == self.p99_s:
            return ToolCall("look", {"seconds": self.mean_s})
        return ToolCall("look", {"seconds": rng.lognormvariate(*self.shape)})


NO_TOOLS = Latency(0.0, 0.0)
CONSTANT = Latency(1.0, 1.0)
HEAVY_TAILED = Latency(3.0, 30.0, hanging=0.02)


async def look(episode: Any, seconds: float) -> str:
    """Look into a box, which takes its time."""
    if seconds:
        await asyncio.sleep(seconds)
    return ""


async def hang_on_loop(episode: Any) -> str:
    """Never answers."""
    await asyncio.Event().wait()
    return ""


async def resist_on_loop(episode: Any) -> str:
    """Never answers, and does not let itself be cancelled."""
    while not UNTIL.is_set():
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            continue
    return ""


def hang_in_thread(episode: Any) -> str:
    """Blocks."""
    UNTIL.wait()
    return ""


@tool(where="process")
def hang_in_process(task: Task) -> str:
    """Blocks in a process of its own."""
    time.sleep(10_000)
    return ""


class SlowTools(Environment):
    """See the module. `hung_s`: by how much each hanging call outlived its limit, `timeout_s`, which all tools have."""

    name = NAME

    def __init__(self, latency: Latency, timeout_s: float) -> None:
        self.latency, self.timeout_s = latency, timeout_s
        self.hung_s: list[float] = []
        self.num_turns = 0
        self.toolset = ToolSet(look, hang_on_loop, resist_on_loop, hang_in_thread, hang_in_process)

    @property
    def tools(self) -> Sequence[Tool]:
        """None that the policy could call: an untrained one would not."""
        return ()

    def task(self, split: Split, index: int) -> Task:
        """Any text will do."""
        question = Message("user", QUESTION.format(index=index, number=NUM_TURNS))
        return Task(self.name, split, index, "boxes", (question,))

    def episode(self, task: Task) -> Episode:
        """A fresh one; each of the same task draws its own latencies."""
        return SlowEpisode(self, task)

    def reference(self, task: Task) -> ReferencePolicy:
        """Nobody needs it."""
        raise NotImplementedError("the rollout benchmark samples")


class SlowEpisode(ToolEpisode):
    """NUM_TURNS turns, each answered by one call."""

    num_made = 0

    def __init__(self, environment: SlowTools, task: Task) -> None:
        super().__init__(task, environment.toolset)
        SlowEpisode.num_made += 1
        self._environment, self._number, self._turn = environment, SlowEpisode.num_made, 0

    async def step(self, action: Action) -> Observation:
        """One call, whatever the turn says."""
        self._turn += 1
        call = self._environment.latency.draw(f"{self.task.index} {self._number} {self._turn}")
        began = time.monotonic()
        output = await self._tools.call(self, call, self.process_state)
        if output.timed_out and call.name != "look":
            self._environment.hung_s.append(time.monotonic() - began - self._environment.timeout_s)
        self._environment.num_turns += 1
        rng = random.Random(f"{self.task.index} {self._turn}")
        found = FOUND.format(turn=self._turn, number=rng.randrange(100), other=rng.randrange(100))
        return Observation(
            (Message("tool", output.text or found),), self._turn == NUM_TURNS, num_timeouts=int(output.timed_out)
        )

    async def grade(self) -> Reward:
        """Nothing to grade."""
        return Reward(0.0)
