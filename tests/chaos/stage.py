"""One run of real processes on a breakable machine: folder, settings, network, disk, clocks, supervision, clean-up.

Owns everything that a run leaves and takes it away again, however the run ends. The supervisor is the one that `ergon
run` uses, with backoffs short enough for a fault every few seconds.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from broker.process.config import save_settings
from broker.process.keys import make_keys
from broker.process.settings import (
    ActorSection,
    BrokerSection,
    EnvironmentSection,
    LearnerSection,
    MetricsSection,
    RunSection,
    SecuritySection,
    Settings,
    SupervisorSection,
    WeightsSection,
)
from deploy.local import Child
from tests.chaos.injector import Injector
from tests.chaos.machine import Clocks, Disk
from tests.chaos.mender import Mender
from tests.chaos.orders import DIRECTORY as ORDERS
from tests.chaos.parcels import ParcelWatch
from tests.chaos.proxy import Link, Network
from tests.chaos.schedule import Fault
from tests.chaos.scripted_learner import AUDIT

ROOT = Path(__file__).parents[2]
HEARTBEAT_S = 0.25
LIVENESS = 8
LEASE_S = 3.0
NUM_ACTORS = 3
CONCURRENCY = 10
DRAIN_S = 1.0  # of which the last half is for handing over: most episodes end before it, one in four does not
GROUP_SIZE = 4
GROUPS_PER_STEP = 4
TICKETS_PER_STEP = GROUPS_PER_STEP * GROUP_SIZE
PROGRESS_S = 0.1
MAX_CRASHES = 10
MIN_MEASURED = 48  # tickets from which a rate is told


class UnfinishedError(Exception):
    """The work was given up before it was done."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from the start of the first process to the learner's clean end; tickets per second between the first
    batch and the tail, when no more are issued. None where there was not enough between them to tell.
    """

    total_s: float
    rate: float | None


class Progress:
    """How many tickets stand in the audit; never goes back, though a resumed learner cuts the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_at = 0.0
        self._num = 0
        self._points: list[tuple[float, int]] = []

    def __call__(self) -> int:
        """Look, at most every PROGRESS_S."""
        now = time.monotonic()
        if now - self._looked_at >= PROGRESS_S and self._path.exists():
            self._looked_at = now
            num = self._path.read_bytes().count(b"\n")
            if num > self._num:
                self._num = num
                self._points.append((now, num))
        return self._num

    def rate(self, num_before_tail: int) -> float | None:
        """Tickets per second from the first batch to about this many."""
        points = [point for point in self._points if point[1] <= num_before_tail]
        if not points or points[-1][1] - points[0][1] < MIN_MEASURED:
            return None
        return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])


class Stage:
    """A run named `name` below `directory`; a context manager. `settings` holds once it is entered. `curve`: both
    channels are encrypted, with keys of this run's own."""

    def __init__(self, directory: Path, name: str, seed: int, num_steps: int, curve: bool = False) -> None:
        ports = _ports(9)
        self._servers = dict(zip(("broker", "learner", "relay"), ports[:3], strict=True))
        self._proxies = dict(
            zip(("actor-broker", "learner-broker", "relay-learner", "actor-relay"), ports[3:7], strict=True)
        )
        self.settings = Settings(
            run=RunSection(name=name, directory=directory.resolve(), seed=seed),
            environments=(EnvironmentSection(name="scripted"),),
            actor=ActorSection(
                count=NUM_ACTORS,
                max_num_seqs=CONCURRENCY,
                max_episodes=CONCURRENCY,
                staging=directory.resolve() / name / "staging",
                drain_s=DRAIN_S,
            ),
            learner=LearnerSection(
                num_steps=num_steps,
                groups_per_step=GROUPS_PER_STEP,
                max_groups_per_step=2 * GROUPS_PER_STEP,
                group_size=GROUP_SIZE,
                max_staleness=3,
                checkpoint_every=2,
            ),
            broker=BrokerSection(
                port=self._servers["broker"],
                heartbeat_s=HEARTBEAT_S,
                liveness=LIVENESS,
                lease_s=LEASE_S,
                max_attempts=1000,  # faults must not use them up: the trained set is to be the whole issued set
                min_free_mb=6,
                blob_bytes=64 << 10,
            ),
            weights=WeightsSection(
                port=self._servers["learner"],
                relay_port=self._servers["relay"],
                chunk_bytes=32 << 10,
                credit=4,
                heartbeat_s=HEARTBEAT_S,
                liveness=LIVENESS,
            ),
            metrics=MetricsSection(broker_port=ports[7], relay_port=ports[8]),
            security=SecuritySection(mode="curve" if curve else "none", keys=directory.resolve() / name / "keys"),
            supervisor=SupervisorSection(
                restart_backoff_s=0.05, restart_max_backoff_s=0.1, restart_reset_s=0.001, grace_s=DRAIN_S + 8.5
            ),
        )
        self.run_dir = self.settings.run_dir
        self.network = Network(
            [Link(name, port, self._servers[name.partition("-")[2]]) for name, port in self._proxies.items()]
        )
        self.disk = Disk(self.run_dir / "broker", self._broker_pid)
        self.clocks = Clocks(self.run_dir / "clocks")
        self.children: dict[str, Child] = {}
        self.injected: list[Fault] = []
        self.crashes: list[str] = []
        self.num_shared = 0  # trajectories that needed no message of their own, at least
        self.fetched: Counter[str] = Counter()  # versions by how they came to actors: anchor, delta
        self.disposable = False  # whether nothing of it is kept
        self._stack = contextlib.ExitStack()

    @property
    def num_tickets(self) -> int:
        """The work."""
        return self.settings.learner.num_steps * TICKETS_PER_STEP

    @property
    def unavailable(self) -> dict[str, str]:
        """Kinds of faults that this machine does not allow, and why."""
        missing = {} if self.disk.mounted else {"disk_low": "needs a mounted file system, that is root"}
        return missing | ({"clock": self.clocks.problem} if self.clocks.problem else {})

    def __enter__(self) -> Stage:
        self.run_dir.mkdir(parents=True)
        for name in ("logs", "staging", ORDERS):
            (self.run_dir / name).mkdir()
        with self._stack:
            self._stack.callback(self._clean)
            self.disk.mount()
            self.clocks.build()
            if self.settings.security.mode == "curve":
                make_keys(self.settings.security.keys)
            self._stack.enter_context(self.network)
            save_settings(self.settings, self.run_dir / "config.toml")
            self.children = {child.name: child for child in self._children()}
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def run(self, schedule: Sequence[Fault], deadline_s: float, stop: threading.Event) -> Timing:
        """Do the work under these faults. Raises UnfinishedError, and ErgonError where a process cannot be kept alive.

        Leaves no process behind.
        """
        progress = Progress(self.run_dir / AUDIT)
        injector = Injector(
            schedule,
            self.num_tickets,
            progress,
            self.children,
            self.network.links,
            self.disk,
            self.clocks,
            self.run_dir / "faults.jsonl",
        )
        children = list(self.children.values())
        supervisor = Mender(self.settings.supervisor, children, injector.finish, injector.drained)
        watch = ParcelWatch(self.settings.metrics.broker_port)
        started = time.monotonic()

        def ended() -> bool:
            late = time.monotonic() - started > deadline_s
            return stop.is_set() or injector.error is not None or late or len(supervisor.crashes) > MAX_CRASHES

        injector.start()
        watch.start()
        try:
            finished = supervisor.run(ended, lambda: None)
        finally:
            injector.finish()
            watch.finish()
            self.injected, self.crashes, self.num_shared = injector.done, supervisor.crashes, watch.num_shared
            for log in (self.run_dir / "logs").glob("actor-*.log"):
                self.fetched += count_fetched(log.read_text(encoding="utf-8", errors="replace"))
        total_s = time.monotonic() - started
        if injector.error is not None:
            raise injector.error
        if not finished:
            raise UnfinishedError(f"only {progress()} of {self.num_tickets} tickets were trained after {total_s:.0f} s")
        num_in_flight = (self.settings.learner.max_staleness + 1) * TICKETS_PER_STEP
        return Timing(total_s, progress.rate(self.num_tickets - num_in_flight))

    def _children(self) -> Iterator[Child]:
        through = self._proxies
        yield self._child("broker", "broker", "serve")
        yield self._child("relay", "broker", "relay", sets={"weights.port": through["relay-learner"]})
        yield self._child("learner", "tests.chaos.scripted_learner", sets={"broker.port": through["learner-broker"]})
        for index in range(NUM_ACTORS):
            sets = {"broker.port": through["actor-broker"], "weights.relay_port": through["actor-relay"]}
            yield self._child(f"actor-{index}", "tests.chaos.scripted_actor", "--index", str(index), sets=sets)

    def _child(self, name: str, *words: str, sets: dict[str, int] | None = None) -> Child:
        environment = [f"PYTHONPATH={ROOT}", *self.clocks.environment(name)]
        overrides = [word for key, value in (sets or {}).items() for word in ("--set", f"{key}={value}")]
        config = ("--config", str(self.run_dir / "config.toml"))
        command = ("env", *environment, sys.executable, "-m", *words, *config, *overrides)
        return Child(name, command, self.run_dir / "logs" / f"{name}.log")

    def _broker_pid(self) -> int | None:
        child = self.children["broker"]
        return child.process.pid if child.process is not None and child.running() else None

    def _clean(self) -> None:
        self.disk.unmount(keep=not self.disposable)
        if self.disposable:
            shutil.rmtree(self.run_dir)


def count_fetched(log: str) -> Counter[str]:
    """How the versions came that an actor says it has fetched."""
    lines = [line for line in log.splitlines() if "fetched version=" in line]
    return Counter("anchor" if "parent=None" in line else "delta" for line in lines)


def _ports(num: int) -> list[int]:
    """Free ports below those that outgoing connections take: a server that is down must not lose its port to one."""
    found: list[int] = []
    candidates = list(range(20_000, 32_000))
    random.SystemRandom().shuffle(candidates)
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
        if len(found) == num:
            return found
    raise OSError(f"fewer than {num} free ports between 20000 and 32000")
