"""`make bench-broker`: Ergon's broker against Redis Streams and bare pyzmq, in one run on one machine over loopback.

Prints a Markdown report and, as its last line, JSON. Every run is a closed loop of simulated actors that hand over a
window of trajectories, wait until all of it is durable and go on, and of one learner that receives and acknowledges;
the sides are the same for every system (tests/bench/exchange). Systems take turns, figures are medians of the repeats.
Ergon's tickets are issued and leased before the clock starts, because neither of the others has any; what that costs
stands in a table of its own. With `--curve` Ergon takes part a second time, encrypted and with keys.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from broker.process.keys import make_keys
from broker.process.lifecycle import ErgonError, raise_file_limit, run_main
from tests.bench.exchange import report, standing
from tests.bench.exchange.bare_pyzmq import PyzmqActors, PyzmqLearner
from tests.bench.exchange.durable_floor import FloorActors, FloorLearner
from tests.bench.exchange.ergon import ErgonActors, ErgonLearner
from tests.bench.exchange.load import Job, Worker, run
from tests.bench.exchange.redis_streams import RedisActors, RedisLearner
from tests.bench.exchange.report import BARE, CURVE, ERGON, EVERYSEC, FLOOR, REDIS, SYSTEMS, Cell, Figures
from tests.bench.exchange.servers import Server, start_ergon, start_floor, start_redis
from tests.ports import free_ports

SIZES = {"2KiB": 2 << 10, "16KiB": 16 << 10, "256KiB": 256 << 10, "16MiB": 16 << 20}
TICKETS = {"2KiB": 64_000, "16KiB": 32_000, "256KiB": 6_000, "16MiB": 160}  # more than a run can use up
TICKETS_PER_ACTOR = 16_000
ACTORS = (1, 16, 256)
IDLE_ACTORS = 2_000
DONE = (10_000, 1_000_000)


class Plan(NamedTuple):
    """How much of it is run. `cells`: by size, for how many actors. `standing`: also what costs without being sent."""

    cells: dict[str, tuple[int, ...]]
    repeats: int
    seconds: float
    done: tuple[int, int]
    systems: tuple[str, ...] = SYSTEMS
    standing: bool = True


FULL = Plan(dict.fromkeys(SIZES, ACTORS), 3, 1.5, DONE)
QUICK = Plan(dict.fromkeys(("2KiB", "256KiB", "16MiB"), (1, 16)), 1, 0.8, (10_000, 100_000))


def only(text: str) -> dict[str, tuple[int, ...]]:
    """The cells of `--only`. Raises ArgumentTypeError for one that does not exist."""
    cells: dict[str, tuple[int, ...]] = {}
    for word in text.split(","):
        size, _, actors = word.partition("/")
        if size not in SIZES or not actors.isdecimal() or int(actors) not in ACTORS:
            raise argparse.ArgumentTypeError(
                f"{word!r} is no cell; allowed: SIZE/ACTORS with a size of {', '.join(SIZES)} "
                f"and {', '.join(map(str, ACTORS))} actors, several with commas between"
            )
        cells[size] = tuple(dict.fromkeys((*cells.get(size, ()), int(actors))))
    return cells


def make_job(plan: Plan, size: str, actors: int, name: str) -> Job:
    """One run; the port is the system's."""
    tickets = int(min(TICKETS[size], TICKETS_PER_ACTOR * actors) * plan.seconds / FULL.seconds) // actors * actors
    return Job(name, SIZES[size], actors, plan.seconds, max(tickets, actors), port=0)


def measure(system: str, server: Server | None, job: Job, workers: tuple[Worker, Worker]) -> Figures:
    """One run of one system."""
    if server is None:
        sent, received, server_s = run(system, replace(job, port=free_ports(1)[0]), *workers)
    else:
        server.reset_peak()
        sent, received, server_s = run(system.split()[0], replace(job, port=server.port), *workers, server.cpu_s)
    num_bytes = sent.num * job.size
    elapsed_s = received.ended - sent.started
    extra = sent.extra | received.extra
    return Figures(
        per_s=sent.num / elapsed_s,
        mb_per_s=num_bytes / elapsed_s / 1e6,
        p50_ms=1000 * statistics.median(sent.latencies_s),
        p99_ms=1000 * statistics.quantiles(sent.latencies_s, n=100, method="inclusive")[98],
        cpu_s_per_gb=server_s / (num_bytes / 1e9),
        peak_mib=server.memory_mib() if server is not None else 0.0,
        server_cores=server_s / elapsed_s,
        actors_core=sent.main_cpu_s / (sent.ended - sent.started),
        learner_core=received.main_cpu_s / (received.ended - received.started),
        issue_per_s=extra["issued"] / extra["issue_s"] if "issued" in extra else 0.0,
        lease_per_s=extra["leased"] / extra["lease_s"] if "leased" in extra else 0.0,
    )


def compare(plan: Plan, directory: Path, workers: tuple[Worker, Worker]) -> Iterator[tuple[Cell, Figures]]:
    """Every cell of the plan, system by system in turn."""
    keys = directory / "keys"
    if CURVE in plan.systems:
        make_keys(keys)
    for size in plan.cells:
        with ExitStack() as running:
            servers = {system: _start(system, directory, keys) for system in plan.systems}
            for server in servers.values():
                if server is not None:
                    running.callback(server.stop)
            for repeat in range(plan.repeats):
                for actors in plan.cells[size]:
                    for turn in range(len(servers)):
                        system = plan.systems[(turn + repeat) % len(servers)]
                        job = make_job(plan, size, actors, f"{size}-{actors:03d}-{repeat}")
                        job = replace(job, keys=keys if system == CURVE else None)
                        yield Cell(size, actors, system), measure(system, servers[system], job, workers)
                    if actors == 16 and size in ("2KiB", "16KiB"):
                        job = make_job(plan, size, actors, f"{size}-{actors:03d}-{repeat}-leases")
                        figures = measure(ERGON, servers[ERGON], replace(job, lease_in_loop=True), workers)
                        yield Cell(size, actors, report.WITH_LEASES), figures


def _start(system: str, directory: Path, keys: Path) -> Server | None:
    """The server of a system, if it has one."""
    if system == BARE:
        return None
    if system == FLOOR:
        return start_floor(directory / system)
    if system in (REDIS, EVERYSEC):
        return start_redis(directory / system.split()[1], system.split()[1])
    return start_ergon(directory / system.replace(" ", "-"), keys=keys if system == CURVE else None)


def benchmark(plan: Plan) -> None:
    """Run everything and print the report."""
    started = time.monotonic()
    raise_file_limit()
    directory = Path(tempfile.mkdtemp(prefix="ergon-bench-"))
    sides = (
        {"ergon": ErgonActors, "redis": RedisActors, "pyzmq": PyzmqActors, FLOOR: FloorActors},
        {"ergon": ErgonLearner, "redis": RedisLearner, "pyzmq": PyzmqLearner, FLOOR: FloorLearner},
    )
    workers = (Worker("actors", sides[0]), Worker("learner", sides[1]))
    try:
        idle, done = None, None
        if plan.standing:
            idle = standing.idle_peers(directory / "idle", IDLE_ACTORS)
            job = make_job(plan, "2KiB", 16, "done")
            done = standing.done_tickets(directory / "done", plan.done, job, plan.repeats, workers)
        cells: dict[Cell, list[Figures]] = {}
        for cell, figures in compare(plan, directory, workers):
            cells.setdefault(cell, []).append(figures)
            print(f"{cell.key} {cell.system}: {figures.per_s:,.1f}/s p99 {figures.p99_ms:,.1f} ms", file=sys.stderr)
    finally:
        for worker in workers:
            worker.close()
        shutil.rmtree(directory)
    medians = {cell: report.median(runs) for cell, runs in cells.items()}
    wall_s = time.monotonic() - started
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}"
    print(report.markdown(medians, idle, done, f"{machine}; {plan.repeats} repeats, {wall_s:.0f} s in all"))
    print(json.dumps(report.summary(medians, idle)))


def main() -> None:
    """Parse the command line; end with one sentence where Redis is missing."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.broker", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, actors and repeats: below 90 seconds")
    parser.add_argument("--only", type=only, metavar="SIZE/ACTORS,...", help="these cells alone, for instance 2KiB/16")
    parser.add_argument(
        "--curve", action="store_true", help="Ergon once more with security.mode curve: what that costs"
    )
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    if arguments.only:
        plan = plan._replace(cells=arguments.only, standing=False)
    if arguments.curve:
        plan = plan._replace(systems=(*SYSTEMS, CURVE))

    def start() -> None:
        if shutil.which("redis-server") is None:
            raise ErgonError("redis-server is not installed; type: sudo apt-get install redis-server")
        benchmark(plan)

    run_main("bench-broker", start)


if __name__ == "__main__":
    main()
