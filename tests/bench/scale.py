"""`make bench-scale`: a real broker and a real relay with up to 1,000 simulated actors. What is full first?

A simulated actor does on both channels what a real one does, with a scripted engine: token times and tool latencies are
drawn from measured distributions (`scaling/profile.py`), and nothing is sampled. The learner is the real client and the
real publisher, without training. All over loopback, on one machine, the simulated actors included; so beside what was
delivered stands what each part took of a core.

Prints a Markdown report and, as its last line, JSON: for each profile what is full first and with how many actors, and
the figures for each number of them. `--picture` draws them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from broker.process.config import save_settings
from broker.process.lifecycle import raise_file_limit, run_main
from broker.process.settings import BrokerSection, MetricsSection, RunSection, Settings, WeightsSection
from tests.bench.exchange.load import RUN_ID
from tests.bench.exchange.servers import Server, start_ergon
from tests.bench.scaling import fleet, learner
from tests.bench.scaling.picture import draw
from tests.bench.scaling.profile import GPU, MEASURED, PROFILES, Script
from tests.bench.scaling.report import Cell, markdown, summary
from tests.bench.weightchannel.workers import Worker, load
from tests.ports import free_ports

NUM_FLEETS = 2  # processes that the simulated actors share
SPARE = 1.25  # tickets issued ahead, as a multiple of those in flight
RAMP_S = 5.0


class Plan(NamedTuple):
    """How much of it is run: by profile, for how many actors; seconds of measuring; seconds between versions."""

    cells: dict[str, tuple[int, ...]]
    seconds: float = 30.0
    step_s: float = 10.0


FULL = Plan({MEASURED.name: (10, 30, 100, 300, 1000), GPU.name: (100, 300, 1000)})
QUICK = Plan({MEASURED.name: (10, 100), GPU.name: (100,)}, 10.0, 5.0)


class _Cpu(NamedTuple):
    """CPU seconds so far, of each thread of both servers."""

    broker: dict[int, float]
    relay: dict[int, float]


def measure(profile: str, num: int, plan: Plan, directory: Path) -> Cell:
    """One number of actors, with servers and workers of its own."""
    script = Script(PROFILES[profile], seed=0)
    settings = _settings(directory)
    with ExitStack() as stack:
        broker = start_ergon(directory / "broker", settings)
        stack.callback(broker.stop)
        workers = [Worker(name) for name in ("learner", *(f"fleet-{i}" for i in range(min(num, NUM_FLEETS))))]
        for worker in workers:
            stack.callback(worker.close)
        trainer, *fleets = workers
        in_flight = num * script.episodes
        ports = (settings.broker.port, settings.weights.port)
        have = trainer.call(learner.open_learner, *ports, round(SPARE * in_flight) + 64)
        relay = _start_relay(directory / "relay", settings)
        stack.callback(relay.stop)
        shares = [num // len(fleets) + (i < num % len(fleets)) for i in range(len(fleets))]
        for i, worker in enumerate(fleets):
            channel = (settings.broker.port, settings.weights.relay_port)
            worker.begin(fleet.open_fleet, profile, channel, sum(shares[:i]), shares[i], have)
        _all(fleets)
        for worker in fleets:
            worker.begin(fleet.fill_fleet)
        _all(fleets)
        starts = time.monotonic() + RAMP_S
        ends = starts + plan.seconds
        trainer.begin(learner.run_learner, starts, ends, plan.step_s)
        for worker in fleets:
            worker.begin(fleet.run_fleet, starts, ends)
        time.sleep(max(0.0, starts - time.monotonic()))
        before, loaded = _Cpu(broker.thread_cpu_s(), relay.thread_cpu_s()), load()
        time.sleep(max(0.0, ends - time.monotonic()))
        after = _Cpu(broker.thread_cpu_s(), relay.thread_cpu_s())
        received: learner.Received = trainer.answer()
        sent: list[fleet.Sent] = _all(fleets)
    return _cell(script, num, plan, (before, after), received, sent, loaded)


def _all(workers: Sequence[Worker]) -> list:
    return [worker.answer() for worker in workers]


def _settings(directory: Path) -> Settings:
    """The defaults, on free ports."""
    port, weights_port, relay_port, broker_metrics, relay_metrics = free_ports(5)
    return Settings(
        run=RunSection(name=RUN_ID, directory=directory / "runs"),
        broker=BrokerSection(port=port),
        weights=WeightsSection(port=weights_port, relay_port=relay_port),
        metrics=MetricsSection(broker_port=broker_metrics, relay_port=relay_metrics),
    )


def _start_relay(directory: Path, settings: Settings) -> Server:
    directory.mkdir(parents=True)
    config = directory / "run.toml"
    save_settings(settings, config)
    command = [sys.executable, "-m", "broker", "relay", "--config", str(config)]
    return Server(command, settings.weights.relay_port, directory)


def _cell(
    script: Script,
    num: int,
    plan: Plan,
    cpu: tuple[_Cpu, _Cpu],
    received: learner.Received,
    sent: Sequence[fleet.Sent],
    loaded: str,
) -> Cell:
    """The figures of one number of actors."""
    seconds = plan.seconds
    threads = {
        part: [
            (used - getattr(cpu[0], part).get(thread, 0.0)) / seconds for thread, used in getattr(cpu[1], part).items()
        ]
        for part in ("broker", "relay")
    }
    learner_core = received.cpu_s / seconds
    durable_ms = [1000 * took for one in sent for took in one.durable_s]
    versions = {version: at for version, at in received.versions.items() if version > 1}  # the first was there before
    lags = [
        at - begun for version, (begun, _) in versions.items() for one in sent for at in one.arrived.get(version, ())
    ]
    return Cell(
        profile=script.profile.name,
        actors=num,
        in_flight=num * script.episodes,
        offered=num * script.per_s,
        finished=sum(one.num_finished for one in sent) / seconds,
        durable=len(durable_ms) / seconds,
        delivered=received.num / seconds,
        p50_ms=_percentile(durable_ms, 50),
        p99_ms=_percentile(durable_ms, 99),
        busiest={part: max(shares) for part, shares in threads.items()} | {"learner": learner_core},
        cores={part: sum(shares) for part, shares in threads.items()}
        | {"learner": learner_core, "actors": sum(one.cpu_s for one in sent) / seconds},
        late_s=max(one.late_s for one in sent),
        idle=sum(one.num_idle for one in sent) / (num * script.episodes),
        delta_bytes=statistics.fmean(num_bytes for _, num_bytes in versions.values()),
        versions=len(versions),
        lag_p50_s=_percentile(lags, 50),
        lag_p99_s=_percentile(lags, 99),
        missed=num * len(versions) - len(lags),
        pulled=sum(one.num_pulled for one in sent),
        lost=sum(one.num_lost for one in sent),
        not_taken=sum(one.num_not_taken for one in sent),
        staleness=received.staleness,
        load=loaded.removeprefix("load "),
    )


def _percentile(values: Sequence[float], percent: int) -> float:
    """NaN where there is no value."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def benchmark(plan: Plan, picture: Path | None) -> None:
    """Run it and print the report."""
    started, loaded = time.monotonic(), load()
    raise_file_limit()
    cells: list[Cell] = []
    for profile, numbers in plan.cells.items():
        for num in numbers:
            with tempfile.TemporaryDirectory(prefix="ergon-bench-") as directory:
                cell = measure(profile, num, plan, Path(directory))
            cells.append(cell)
            print(f"{profile}, {num} actors: {cell}", file=sys.stderr, flush=True)
    num_cores = os.cpu_count() or 1
    machine = f"{num_cores} cores, {platform.machine()}; {plan.seconds:g} s each, a version every {plan.step_s:g} s"
    print(markdown(cells, f"{machine}; {time.monotonic() - started:.0f} s in all, {loaded} at the start.", num_cores))
    told = summary(cells, num_cores)
    if picture is not None:
        picture.write_text(draw(cells), encoding="utf-8")
        data = json.dumps([cell._asdict() for cell in cells], indent=1)
        picture.with_suffix(".json").write_text(data + "\n", encoding="utf-8")
    print(json.dumps(told))


def _cells(text: str) -> dict[str, tuple[int, ...]]:
    """The cells of `--only`. Raises ArgumentTypeError for a profile or number that does not exist."""
    cells: dict[str, tuple[int, ...]] = {}
    for word in text.split(","):
        profile, _, actors = word.partition("/")
        if profile not in PROFILES or not actors.isdecimal() or not 0 < int(actors) <= 2000:
            raise argparse.ArgumentTypeError(
                f"{word!r} is no cell; allowed: PROFILE/ACTORS with a profile of {', '.join(PROFILES)} and 1 to 2000 "
                "actors, several with commas between"
            )
        cells[profile] = (*cells.get(profile, ()), int(actors))
    return cells


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 and 100 actors, 10 s each")
    parser.add_argument("--only", type=_cells, metavar="PROFILE/ACTORS,...", help="these alone, as measured/1000")
    parser.add_argument("--picture", type=Path, help="write the figures there as SVG, and as JSON beside it")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    if options.only:
        plan = plan._replace(cells=options.only)
    run_main("bench-scale", lambda: benchmark(plan, options.picture))


if __name__ == "__main__":
    main()
