"""Many actors at once: what they cost the publisher, directly and behind relays, and when the last one has a version.

The relays are real processes. The actors are real subscribers, all in one process; they verify every chunk of a delta,
and do not apply it, because a base for each of 64 would fit neither this machine's memory nor its two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from prometheus_client import REGISTRY

from broker.process.config import save_settings
from broker.process.settings import MetricsSection, RunSection, Settings, WeightsSection
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Buffer, Manifest, TensorSpec
from broker.weights.sinks import DeltaBuffer
from broker.weights.subscriber import WeightSubscriber
from tests.bench.weightchannel import ends
from tests.bench.weightchannel.workers import State, Worker, load
from tests.ports import free_ports

START_S = 60.0
SETTLE_S = 1.5  # longer than a heartbeat: by then the publisher knows that no relay fetches its snapshot any more


class Crowd(NamedTuple):
    """Medians for so many actors behind so many relays in a row. CPU and bytes are the publisher's, for one version."""

    relays: int
    actors: int
    publish_cpu_s: float  # of publish() itself, which no actor adds to
    serve_cpu_s: float  # from its return until the last actor has the version
    served_bytes: float
    last_s: float  # from the call of publish() until the last actor has verified every chunk
    load: str

    @property
    def cpu_s(self) -> float:
        """All of it."""
        return self.publish_cpu_s + self.serve_cpu_s


class DeltaSink:
    """A Sink of an actor that says it holds a version, and takes the delta to the next without applying it."""

    def __init__(self, have: PolicyVersion) -> None:
        self.have: PolicyVersion | None = have
        self._manifest: Manifest | None = None
        self._delta: DeltaBuffer | None = None

    def begin(self, manifest: Manifest) -> None:
        """See Sink. Raises RuntimeError for an anchor, of which there would be many copies here."""
        if manifest.parent is None:
            raise RuntimeError(f"version {manifest.version} comes whole where a delta is due")
        self._manifest, self._delta = manifest, DeltaBuffer(manifest, manifest.tensors)

    def write(self, index: int, data: Buffer) -> None:
        """See Sink."""
        assert self._delta is not None
        self._delta.write(index, data)

    def finish(self) -> None:
        """See Sink. Every chunk has been verified."""
        assert self._manifest is not None
        self.have = self._manifest.version
        self._delta = None

    def abort(self) -> None:
        """See Sink."""
        self._delta = None

    def forget(self) -> None:
        """See Sink."""
        self.have = None


def open_crowd(state: State, endpoint: str, num: int, have: int) -> None:
    """So many actors that hold this version; returns when all of them have heard of it."""
    version = PolicyVersion(ends.LINEAGE, have)
    state["crowd"] = [WeightSubscriber(endpoint, ends.RUN, f"actor-{i:03d}") for i in range(num)]
    state["sinks"] = [DeltaSink(version) for _ in range(num)]
    state["threads"] = ThreadPoolExecutor(num)
    for subscriber in state["crowd"]:
        heard = subscriber.wait_newer(None, START_S)
        while heard is not None and heard < version:  # a relay pushes a version on before it holds and announces it
            heard = subscriber.wait_newer(heard, START_S)
        if heard != version:
            raise RuntimeError(f"{endpoint} announces {heard}, not version {have}")


def fetch_all(state: State, number: int) -> float:
    """Let everybody fetch this version as soon as it is announced; when the last one had it."""
    version, before = PolicyVersion(ends.LINEAGE, number), PolicyVersion(ends.LINEAGE, number - 1)

    def fetch(subscriber: WeightSubscriber, sink: DeltaSink) -> float:
        if subscriber.wait_newer(before, START_S) != version:
            raise RuntimeError(f"version {number} was never announced")
        subscriber._fetch(version, sink, START_S)  # its public ways lead to a base file or a store
        return time.monotonic()

    return float(max(state["threads"].map(fetch, state["crowd"], state["sinks"])))


def close_crowd(state: State) -> None:
    """Let all of them go."""
    for subscriber in state["crowd"]:
        subscriber.close()
    state["threads"].shutdown()


def served_bytes(_: State) -> float:
    """Chunk bytes that the publisher has handed to the network so far."""
    kinds = ("anchor", "delta")
    return sum(REGISTRY.get_sample_value("ergon_weights_served_bytes_total", {"kind": kind}) or 0.0 for kind in kinds)


def measure(
    specs: Sequence[TensorSpec],
    files: Sequence[Path],
    cells: Mapping[int, Sequence[int]],
    rounds: int,
    directory: Path,
    tell: Callable[[Crowd], None],
) -> list[Crowd]:
    """`cells`: by number of relays in a row, for how many actors."""
    results = []
    for relays, numbers in cells.items():
        with ExitStack() as stack:
            learner, actors = Worker("learner"), Worker("crowd")
            stack.callback(learner.close)
            stack.callback(actors.close)
            port = free_ports(1)[0]
            learner.call(ends.open_learner, specs, files)
            learner.call(ends.serve, f"tcp://127.0.0.1:{port}", None)
            learner.call(ends.publish, 0)
            for _ in range(relays):
                port = stack.enter_context(_relay(port, directory))
            newest = 0
            for num in numbers:
                results.append(_one(learner, actors, f"tcp://127.0.0.1:{port}", relays, num, newest, rounds))
                newest += rounds
                tell(results[-1])
    return results


def _one(learner: Worker, actors: Worker, endpoint: str, relays: int, num: int, newest: int, rounds: int) -> Crowd:
    actors.call(open_crowd, endpoint, num, newest)
    time.sleep(SETTLE_S)
    figures: list[tuple[float, float, float, float]] = []
    for number in range(newest + 1, newest + 1 + rounds):
        time.sleep(0.3)
        bytes_before = learner.call(served_bytes)
        actors.begin(fetch_all, number)
        cpu_before = learner.call(ends.cpu_s)
        published: ends.Published = learner.call(ends.publish, number)
        last_at = actors.answer()
        serve_cpu_s = learner.call(ends.cpu_s) - cpu_before - published.cpu_s
        num_bytes = learner.call(served_bytes) - bytes_before
        figures.append((published.cpu_s, serve_cpu_s, num_bytes, last_at - published.started))
    actors.call(close_crowd)
    publish_cpu_s, serve_cpu_s, num_bytes, last_s = (statistics.median(column) for column in zip(*figures, strict=True))
    return Crowd(relays, num, publish_cpu_s, serve_cpu_s, num_bytes, last_s, load())


@contextmanager
def _relay(upstream_port: int, directory: Path) -> Iterator[int]:
    """`python -m broker relay` that holds what its upstream does; its port."""
    port, metrics_port = free_ports(2)
    settings = Settings(
        run=RunSection(name=ends.RUN),
        weights=WeightsSection(port=upstream_port, relay_port=port),
        metrics=MetricsSection(relay_port=metrics_port),
    )
    config, log = directory / f"relay-{port}.toml", directory / f"relay-{port}.log"
    save_settings(settings, config)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "broker", "relay", "--config", str(config)], stdout=out, stderr=out, env=os.environ
        )
    try:
        deadline = time.monotonic() + START_S
        while not _holds_a_version(metrics_port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a relay did not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def _holds_a_version(metrics_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/healthz", timeout=5) as reply:
            return bool(json.loads(reply.read()).get("newest"))
    except (urllib.error.URLError, OSError):
        return False
