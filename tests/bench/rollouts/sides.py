"""The two sides of the benchmark: the real actor with tickets without end, and a synchronous loop. Both on one engine.

What is measured is a window of a run that goes on before and after it. The actor's side is measured after `ramp_s`,
which is longer than its longest tool call may take, so that as many long calls end as begin; its tickets never run out,
so there is no tail. The synchronous side is measured in whole rounds, from one common start of generating to another.
"""

from __future__ import annotations

import asyncio
import itertools
import resource
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from actors import metrics
from actors.actor import Actor
from actors.engine import Engine, EngineLoad
from actors.renderer import Renderer
from actors.rollout import run_episode
from actors.weights import WeightAdopter
from broker.client import HandoverStatus, ReleaseReason
from broker.process.settings import ActorSection
from broker.protocol.partials import Partial
from broker.protocol.trajectory import Mode, Outcome, PolicyVersion, Sampling, TaskRef, Ticket, Trajectory
from envs.tools import ToolRunner
from tests.bench.rollouts.engines import TURN_TOKENS, GivenLengths, InRounds
from tests.bench.rollouts.environment import NAME, NUM_TURNS, Latency, SlowTools

GROUP_SIZE = 8
POLL_S = 0.25


class Measured(NamedTuple):
    """One window of one run. tokens: sampled ones. episodes: running ones, mean. cache: share of the KV cache that
    running requests use, mean. group_s: from a group's first lease to its last result, median and 90th percentile."""

    seconds: float
    tokens: int
    turns: int
    episodes: float
    full: float
    cache: float
    prefix_hits: float
    preemptions: int
    queue_s: float
    group_s: tuple[float, float] | None
    hung_s: tuple[float, ...]
    actor_cpu: float
    lag_s: float
    rss_mb: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Tickets:
    """Groups of the same task, without end; both ends of the broker's client, in process."""

    def __init__(self, first_task: int, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._numbers = itertools.count(first_task * GROUP_SIZE)
        self._began: dict[str, float] = {}
        self._left: dict[str, int] = {}
        self.groups: list[tuple[float, float]] = []  # (when the last result came, seconds since the first lease)

    async def lease(self) -> Ticket:
        """The next one, at once."""
        ticket = self.make(next(self._numbers))
        self._began.setdefault(ticket.group_id, time.monotonic())
        self._left.setdefault(ticket.group_id, GROUP_SIZE)
        return ticket

    def make(self, number: int) -> Ticket:
        """The ticket of a number."""
        most = TURN_TOKENS[1]
        return Ticket(
            ticket_id=f"t{number}",
            group_id=f"g{number // GROUP_SIZE}",
            group_size=GROUP_SIZE,
            task=TaskRef(env=NAME, split="train", index=number // GROUP_SIZE),
            mode=Mode.TRAIN,
            sampling=Sampling(max_turn_tokens=most, max_episode_tokens=NUM_TURNS * most, max_turns=NUM_TURNS + 1),
            deadline_s=self._deadline_s,
        )

    def take_partial(self, ticket_id: str) -> Partial | None:
        return None

    async def hand_over(self, ticket_id: str, partial: Partial) -> HandoverStatus:
        raise AssertionError("no environment here has snapshots")

    async def withdrawn(self, ticket_id: str) -> None:
        """Never."""
        await asyncio.Event().wait()

    async def release(self, ticket_id: str, reason: ReleaseReason, error: str = "") -> None:
        """Only what the end of the run cuts off may come back."""
        if reason != "drain":
            raise RuntimeError(f"{ticket_id} came back: {error}")

    async def send(self, trajectory: Trajectory) -> str:
        """A result. Raises RuntimeError where its episode was cut off: nothing of it would be what is measured."""
        if trajectory.head.outcome is not Outcome.COMPLETED:
            raise RuntimeError(f"{trajectory.ticket.ticket_id} ended with {trajectory.head.outcome}")
        group = trajectory.ticket.group_id
        self._left[group] -= 1
        if not self._left[group]:
            now = time.monotonic()
            self.groups.append((now, now - self._began.pop(group)))
        return "accepted"


class _Serving:
    """In the place of the WeightAdopter: the model's own weights are served throughout."""

    async def at_least(self, version: PolicyVersion) -> None:
        pass

    async def run(self) -> None:
        await asyncio.Event().wait()


class Bench:
    """An engine and what both sides need with it."""

    def __init__(self, engine: Engine, renderer: Renderer, settings: ActorSection) -> None:
        self.engine, self.renderer, self.settings = engine, renderer, settings
        self._stop_token_id = renderer.stop_token_ids[0]
        self._tasks = itertools.count(0, 1_000_000)  # each run has its own, so that no prefix is there before it

    def _environment(self, latency: Latency) -> SlowTools:
        return SlowTools(latency, self.settings.tool_timeout_s)

    def _runner(self) -> ToolRunner:
        limits = self.settings
        return ToolRunner(limits.tool_timeout_s, limits.tool_processes, num_threads=4 * limits.max_episodes)

    async def actor(self, latency: Latency, ramp_s: float, seconds: float) -> Measured:
        """The real actor."""
        environment, stop = self._environment(latency), threading.Event()
        tickets = Tickets(next(self._tasks), deadline_s=100 * self.settings.tool_timeout_s)
        async with self._runner():
            actor = Actor(
                "bench",
                tickets,
                tickets,
                GivenLengths(self.engine, self._stop_token_id),
                cast(WeightAdopter, _Serving()),
                self.renderer,
                {NAME: environment},
                self.settings,
            )
            running = asyncio.create_task(actor.run(stop))
            await asyncio.wait({running}, timeout=ramp_s)
            window = _Window(self.engine, environment)
            while time.monotonic() - window.began < seconds and not running.done():
                await asyncio.wait({running}, timeout=POLL_S)
                window.look(metrics.running_episodes._value.get())
            measured = window.close(tickets)
            stop.set()
            await running
        return measured

    async def rounds(self, latency: Latency, num_episodes: int, num_rounds: int) -> Measured:
        """The synchronous loop; the first round is not measured, and the last is followed by another."""
        environment = self._environment(latency)
        tickets = Tickets(next(self._tasks), deadline_s=100 * self.settings.tool_timeout_s)
        starts: asyncio.Queue[None] = asyncio.Queue()
        engine = InRounds(self.engine, self._stop_token_id, num_episodes, lambda: starts.put_nowait(None))

        async def play() -> None:
            while True:
                ticket = await tickets.lease()
                trajectory = await run_episode(
                    ticket,
                    environment,
                    engine,
                    self.renderer,
                    actor_id="bench",
                    max_model_len=self.settings.max_model_len,
                )
                await tickets.send(trajectory)

        async with self._runner():
            players = [asyncio.create_task(play()) for _ in range(num_episodes)]
            await _start(starts, players)
            await _start(starts, players)
            window = _Window(self.engine, environment)
            for _ in range(num_rounds):
                await _start(starts, players)
                window.look(num_episodes)
            measured = window.close(tickets)
            for player in players:
                player.cancel()
            await asyncio.gather(*players, return_exceptions=True)
        return measured


async def _start(starts: asyncio.Queue[None], players: list[asyncio.Task[None]]) -> None:
    """The next common start of generating; what ends a player ends the benchmark."""
    start = asyncio.create_task(starts.get())
    done, _ = await asyncio.wait({start, *players}, return_when=asyncio.FIRST_COMPLETED)
    for player in done - {start}:
        start.cancel()
        player.result()


class _Window:
    """What the engine, the environment and this process did between two moments."""

    def __init__(self, engine: Engine, environment: SlowTools) -> None:
        self._engine, self._environment = engine, environment
        self._load, self._cpu_s = engine.load(), time.process_time()
        self._turns = environment.num_turns
        self._episodes: list[float] = []
        self._lags: deque[float] = deque([0.0])
        self.began = time.monotonic()

    def look(self, num_episodes: float) -> None:
        """How many episodes are running."""
        self._episodes.append(num_episodes)
        self._lags.append(metrics.loop_lag_seconds._value.get())

    def close(self, tickets: Tickets) -> Measured:
        """All of it."""
        seconds, before, after = time.monotonic() - self.began, self._load, self._engine.load()

        def of(get: Callable[[EngineLoad], float]) -> Any:
            return get(after) - get(before)

        steps, turns = max(1, of(lambda load: load.num_steps)), max(1, of(lambda load: load.num_turns))
        groups = sorted(took for when, took in tickets.groups if when >= self.began)
        return Measured(
            seconds=seconds,
            tokens=of(lambda load: load.num_sampled),
            turns=self._environment.num_turns - self._turns,
            episodes=sum(self._episodes) / max(1, len(self._episodes)),
            full=of(lambda load: load.num_full_steps) / steps,
            cache=of(lambda load: load.cache_use_steps) / steps,
            prefix_hits=of(lambda load: load.num_prefix_hits) / max(1, of(lambda load: load.num_prefix_tokens)),
            preemptions=of(lambda load: load.num_preemptions),
            queue_s=of(lambda load: load.queue_s) / turns,
            group_s=(groups[len(groups) // 2], groups[len(groups) * 9 // 10]) if groups else None,
            hung_s=tuple(self._environment.hung_s),
            actor_cpu=(time.process_time() - self._cpu_s) / seconds,
            lag_s=max(self._lags),
            rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )
