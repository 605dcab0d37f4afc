"""What an actor side and a learner side of any queue must do, and the loops that drive and time them.

Owns the load's shape: how many trajectories are on the way, when sending stops, what is timed. Knows no queue. Each
side runs in a worker process of its own that lives as long as the benchmark, so that no run pays for a start.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from broker.process.lifecycle import raise_file_limit
from broker.protocol.trajectory import (
    Mode,
    Outcome,
    PolicyVersion,
    Segment,
    TaskRef,
    Ticket,
    Trajectory,
    TrajectoryHead,
    VersionRun,
)

RUN_ID = "bench"
TOKEN_BYTES = 9  # a token id, a mask byte, a log-prob
LIMIT_S = 120.0  # a run that takes longer has hung
GROUP_SIZE = 8
WINDOW = 8  # trajectories that one actor has on the way at most, and hands over together
MAX_ON_THE_WAY_BYTES = 256 << 20  # of all actors together: beyond it they take turns


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one queue."""

    name: str  # different for every run: prefix of tickets, name of the stream
    size: int  # bytes of a trajectory's arrays
    actors: int
    seconds: float  # how long actors begin new sends
    tickets: int  # how many there are at most
    port: int
    lease_in_loop: bool = False  # Ergon only: actors lease while the clock runs, not before
    keys: Path | None = None  # Ergon only: the key directory of a run with CURVE

    @property
    def window(self) -> int:
        """Trajectories that one actor hands over together."""
        return max(1, min(WINDOW, MAX_ON_THE_WAY_BYTES // (self.size * self.actors)))

    @property
    def active(self) -> int:
        """Actors that send at the same time; the others wait for their turn."""
        return max(1, min(self.actors, MAX_ON_THE_WAY_BYTES // (self.size * self.window)))

    @property
    def learner_window(self) -> int:
        """Trajectories the learner takes in one go."""
        return max(4, min(256, (64 << 20) // self.size))


@dataclass(slots=True)
class Used:
    """What a worker saw. Times are of the machine's monotonic clock."""

    started: float
    ended: float
    num: int
    cpu_s: float
    main_cpu_s: float  # of the one thread that drives the load
    latencies_s: list[float] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)


class ActorSide(Protocol):
    """All simulated actors of one run. `left`: trajectories not yet begun."""

    left: int

    def connect(self, job: Job) -> dict[str, float]:
        """Open one connection per actor and do what comes before the first trajectory; what it cost, by name."""
        ...

    def send(self, actor: int, num: int) -> int:
        """Hand over at most `num` trajectories of one actor; how many it had."""
        ...

    def durable(self, timeout_s: float) -> Iterable[tuple[int, int]]:
        """(actor, how many of its trajectories are now durable), after waiting for the first."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


class LearnerSide(Protocol):
    """The one consumer."""

    def prepare(self, job: Job) -> dict[str, float]:
        """Connect, and make what actors need; what it cost, by name."""
        ...

    def receive(self, timeout_s: float) -> int:
        """Take what is there and acknowledge it; how many acknowledgements have been confirmed meanwhile."""
        ...

    def close(self) -> None:
        """End the run and leave nothing of it behind."""
        ...


def make_ticket(job: Job, index: int) -> Ticket:
    """The index-th ticket of a run; ids have a fixed length."""
    return Ticket(
        ticket_id=ticket_id(job, index),
        group_id=f"{job.name}-g{index // GROUP_SIZE:09d}",
        group_size=GROUP_SIZE,
        task=TaskRef(env="shop", split="train", index=index),
        mode=Mode.TRAIN,
        min_version=PolicyVersion(1, 2),
    )


def ticket_id(job: Job, index: int) -> str:
    """Its id."""
    return f"{job.name}-{index:09d}"


def make_trajectory(job: Job) -> Trajectory:
    """A trajectory of the run's first ticket whose arrays have about `job.size` bytes: half prompt, half sampled."""
    num_tokens = max(2, job.size // TOKEN_BYTES)
    rng = np.random.default_rng(0)
    mask_T = np.arange(num_tokens) >= num_tokens // 2
    logprobs_T = np.where(mask_T, -rng.exponential(0.7, num_tokens), 0.0).astype(np.float32)
    token_ids_T = rng.integers(0, 49_152, num_tokens, dtype=np.int32)
    segment = Segment(token_ids_T, mask_T, logprobs_T, (VersionRun(1, 2, int(mask_T.sum())),))
    head = TrajectoryHead(
        ticket=make_ticket(job, 0),
        kind="sum",
        outcome=Outcome.COMPLETED,
        reward=1.0,
        reward_components={"exact": 1.0},
        num_turns=3,
        num_tool_calls=2,
        timings_s={"total": 1.5, "model": 1.0, "tool": 0.5},
        actor_id="actor-0000",
        finished_at=1.75e9,
    )
    return Trajectory(head, (segment,))


def drive_actors(side: ActorSide, job: Job) -> Used:
    """Let every actor hand over a window, wait until all of it is durable, and begin again, until the time is over."""
    idle = deque(range(job.actors))
    begun: dict[int, list[float]] = {}  # actor -> [not yet durable, handed over at]
    latencies_s: list[float] = []
    cpu, main_cpu = time.process_time(), time.thread_time()
    started = ended = time.monotonic()
    while True:
        now = time.monotonic()
        if now - started > LIMIT_S:
            raise TimeoutError(f"{sum(int(left) for left, _ in begun.values())} trajectories never became durable")
        sending = now - started < job.seconds and side.left > 0
        for _ in range(len(idle) if sending else 0):
            if len(begun) >= job.active:
                break
            actor = idle.popleft()
            begun_at = time.monotonic()
            if num := side.send(actor, job.window):
                begun[actor] = [num, begun_at]
            else:
                idle.append(actor)
        if not begun and not sending:
            break
        for actor, num in side.durable(0.2):
            ended = time.monotonic()
            latencies_s += [ended - begun[actor][1]] * num
            begun[actor][0] -= num
            if begun[actor][0] == 0:
                del begun[actor]
                idle.append(actor)
    cpu_s, main_cpu_s = time.process_time() - cpu, time.thread_time() - main_cpu
    return Used(started, ended, len(latencies_s), cpu_s, main_cpu_s, latencies_s)


def drive_learner(side: LearnerSide, pipe: Connection) -> Used:
    """Receive and acknowledge until as many are confirmed as the actors have sent, which the pipe tells at the end."""
    cpu, main_cpu = time.process_time(), time.thread_time()
    started = ended = time.monotonic()
    num, total = 0, -1
    while total < 0 or num < total:
        if confirmed := side.receive(0.02):
            num += confirmed
            ended = time.monotonic()
        if total < 0 and pipe.poll(0):
            total = pipe.recv()
        if time.monotonic() - max(started, ended) > LIMIT_S:
            raise TimeoutError(f"{num} of {total} trajectories arrived and were acknowledged")
    return Used(started, ended, num, time.process_time() - cpu, time.thread_time() - main_cpu)


class Worker:
    """A process that plays one side of every run. `sides`: system -> its class."""

    def __init__(self, role: str, sides: dict[str, Callable[[], Any]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(role, sides, theirs), name=f"bench-{role}", daemon=True)
        self._process.start()

    def tell(self, order: object) -> None:
        """Send an order."""
        self._pipe.send(order)

    def answer(self) -> Any:
        """What the worker answers. Raises RuntimeError with its traceback where it failed."""
        if not self._pipe.poll(2 * LIMIT_S):
            raise RuntimeError("a worker of the benchmark does not answer")
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _work(role: str, sides: dict[str, Callable[[], Any]], pipe: Connection) -> None:
    import traceback

    raise_file_limit()
    while True:
        system, job = pipe.recv()
        try:
            side = sides[system]()
            pipe.send(side.connect(job) if role == "actors" else side.prepare(job))
            pipe.recv()  # the starting signal
            pipe.send(drive_actors(side, job) if role == "actors" else drive_learner(side, pipe))
            pipe.recv()  # both have ended
            side.close()
            pipe.send({})
        except Exception:
            pipe.send(traceback.format_exc())
            raise


def run(
    system: str, job: Job, actors: Worker, learner: Worker, cpu_s: Callable[[], float] = lambda: 0.0
) -> tuple[Used, Used, float]:
    """One run: both sides get ready, start together and end when the last trajectory is acknowledged.

    Returns what the actors saw, what the learner saw, and how far `cpu_s` went meanwhile.
    """
    learner.tell((system, job))
    learner_cost = learner.answer()
    actors.tell((system, job))
    actor_cost = actors.answer()
    cpu_before_s = cpu_s()
    learner.tell("go")
    actors.tell("go")
    sent = actors.answer()
    learner.tell(sent.num)
    received = learner.answer()
    used_cpu_s = cpu_s() - cpu_before_s
    for worker in (actors, learner):
        worker.tell("end")
        worker.answer()
    sent.extra, received.extra = actor_cost, learner_cost
    return sent, received, used_cpu_s
