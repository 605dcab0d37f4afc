"""Thousands of episodes, many of which fail in one way or another, leave nothing behind: no task, no object, no memory,
no descriptor, and no metric of their own.

The real loop and a real environment, whose tools run in threads; the engine says what the test wants said.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import psutil
import pytest
from prometheus_client import REGISTRY

from actors.actor import Actor
from actors.engine import EngineLoad, Sample
from actors.restarting import RestartingEngine
from actors.weights import WeightAdopter
from broker.client import HandoverStatus
from broker.process.settings import ActorSection
from broker.protocol.partials import Partial
from broker.protocol.trajectory import PolicyVersion, Sampling, TaskRef, Ticket, Trajectory, VersionRun
from envs import timeouts
from envs.interface import Action, Environment, Episode, Observation, SandboxError, Task
from tests.unit.actors.support import make_renderer, make_ticket
from tests.unit.envs.example_environment import LettersEnvironment, LettersEpisode

RENDERER = make_renderer()
WARM_UP, MEASURED = 400, 2000
FATES = ("well", "well", "well", "sandbox", "break", "hang", "withdrawn", "request")


class Frail(LettersEnvironment):
    """Every so manieth episode fails, by its task."""

    def episode(self, task: Task) -> Episode:
        return FrailEpisode(task, self.toolset)


class FrailEpisode(LettersEpisode):
    async def step(self, action: Action) -> Observation:
        fate = FATES[self.task.index % len(FATES)]
        if fate == "sandbox":
            raise SandboxError("gone")
        if fate == "break":
            raise KeyError("a bug")
        if fate in ("hang", "withdrawn"):
            await asyncio.Event().wait()
        return await super().step(action)


class Talker:
    """An engine of one turn that calls the tool and one that answers. `dead` never; some requests fail."""

    dead = None
    policy_version = PolicyVersion(1, 0)

    def __init__(self) -> None:
        self._turns = [RENDERER.turn(text) for text in ("<tool>count_letters plate</tool>", "5")]

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop: Any,
        request_id: str,
        priority: int = 0,
    ) -> Sample:
        await asyncio.sleep(0)
        number, turn = int(request_id.split(".")[0]), int(request_id.split(".")[-1])
        if FATES[number % len(FATES)] == "request":
            raise RuntimeError("this one failed")
        ids = self._turns[turn % 2]
        runs = (VersionRun(1, 0, len(ids)),)
        return Sample(np.array(ids, np.int32), np.zeros(len(ids), np.float32), runs, "stop")

    async def abort(self, request_id: str) -> None:
        pass

    def check(self) -> None:
        pass

    def load(self) -> EngineLoad:
        return EngineLoad()

    async def close(self) -> None:
        pass


class Endless:
    """Tickets without end, both ends of the client."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.ended = 0
        self.statuses: Counter[str] = Counter()
        self.changed = asyncio.Event()

    async def lease(self) -> Ticket:
        number = next(self.numbers)
        task = TaskRef(env="letters", split="train", index=number)
        return make_ticket(f"{number}", task=task, deadline_s=0.05 if FATES[number % len(FATES)] == "hang" else 60.0)

    def take_partial(self, ticket_id: str) -> Partial | None:
        return None

    async def hand_over(self, ticket_id: str, partial: Partial) -> HandoverStatus:
        raise AssertionError("no environment here has snapshots")

    async def withdrawn(self, ticket_id: str) -> None:
        if FATES[int(ticket_id) % len(FATES)] != "withdrawn":
            await asyncio.Event().wait()
        await asyncio.sleep(0.01)
        self._count("withdrawn")

    async def release(self, ticket_id: str, reason: Literal["drain", "infra_failure"], error: str = "") -> None:
        self._count(error.split(":")[0])

    async def send(self, trajectory: Trajectory) -> str:
        self._count(trajectory.head.outcome.value)
        return "accepted"

    def _count(self, what: str) -> None:
        self.statuses[what] += 1
        self.ended += 1
        self.changed.set()

    async def until(self, num: int) -> None:
        while self.ended < num:
            self.changed.clear()
            await self.changed.wait()


class Open:
    async def at_least(self, version: PolicyVersion) -> None:
        pass

    async def run(self) -> None:
        await asyncio.Event().wait()


@dataclass
class Census:
    """What there is at one moment."""

    tasks: int
    threads: int
    descriptors: int
    rss_mb: float
    objects: Counter[str]
    series: set[tuple[str, ...]]  # of the project's own metrics: name and labels

    @classmethod
    def take(cls) -> Census:
        gc.collect()
        process = psutil.Process()
        samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
        return cls(
            len(asyncio.all_tasks()),
            threading.active_count(),
            process.num_fds(),
            process.memory_info().rss / 2**20,
            Counter(type(each).__name__ for each in gc.get_objects()),
            {(each.name, *each.labels.values()) for each in samples if each.name.startswith("ergon_actor_")},
        )


@pytest.mark.timeout(120)
async def test_nothing_is_left_of_thousands_of_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("actors").setLevel(logging.CRITICAL)  # pytest keeps what is logged
    monkeypatch.setattr("actors.actor.LOOK_S", 0.05)
    client, environments = Endless(), cast("dict[str, Environment]", {"letters": Frail()})
    engine = RestartingEngine(cast(Any, Talker), 0, 1.0)
    settings = ActorSection(max_num_seqs=16, max_episodes=16, drain_s=0.0)
    actor = Actor("a", client, client, engine, cast(WeightAdopter, Open()), RENDERER, environments, settings)
    stop = threading.Event()
    running = asyncio.create_task(actor.run(stop))
    try:
        await client.until(WARM_UP)
        before = Census.take()
        await client.until(WARM_UP + MEASURED)
        after = Census.take()
    finally:
        stop.set()
        await running
        logging.getLogger("actors").setLevel(logging.NOTSET)
    # What was met: all of it, and each kind by itself.
    assert client.statuses.keys() >= {"completed", "sandbox", "env_failure", "timeout", "withdrawn", "engine"}
    # Between 16 running episodes at one moment and at another.
    assert abs(after.tasks - before.tasks) <= 4 * 16
    assert abs(after.threads - before.threads) <= 16
    assert abs(after.descriptors - before.descriptors) <= 16
    grown = {name: num - before.objects[name] for name, num in after.objects.items()}
    assert not {name: num for name, num in grown.items() if num > MEASURED // 10}
    assert after.rss_mb - before.rss_mb < 24
    # Everything that can be counted was counted once at least in the warm-up; no ticket, task or reason is a label.
    assert after.series == before.series
    assert len([series for series in after.series if "letters" in series]) < 200
    assert (len(actor._slots), len(actor._waiting), len(actor._precedence), actor._num_sampling) == (0, 0, 0, 0)
    assert (engine._waiting, timeouts.num_abandoned()) == ({}, 0)
