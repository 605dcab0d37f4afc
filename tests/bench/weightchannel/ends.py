"""The two ends of the weight channel as workers of the benchmark: a learner with real versions, an actor with a base.

Owns what is timed at each end; times are of the machine's monotonic clock, so those of different workers compare. Also
a bare socket and gloo, for comparison. Functions take a worker's state; see `workers.py`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
from prometheus_client import REGISTRY

from broker.process.keys import Identity
from broker.process.security import OPEN, Security, keyed
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import TensorSpec
from broker.weights.basefile import BaseFile
from broker.weights.publisher import WeightPublisher
from broker.weights.subscriber import WeightSubscriber
from tests.bench.weight_versions import read_snapshot
from tests.bench.weightchannel.workers import State

RUN = "bench-weights"
LINEAGE = 1
PATIENCE_S = 240.0


class Published(NamedTuple):
    """What one `publish` did. Times of the monotonic clock; `payload_bytes` of the delta, or of the snapshot."""

    started: float
    seconds: float
    cpu_s: float
    diff_s: float  # of these seconds, to compare and encode; the rest is hashing and switching
    payload_bytes: int
    changed_fraction: float
    full: bool


class Arrived(NamedTuple):
    """A version verified in the actor's base."""

    at: float
    seconds: float  # since it was announced there
    cpu_s: float
    transfer_s: float  # of these seconds, until every chunk was there and checked
    apply_s: float  # of these seconds, to decode, apply and verify the whole
    payload_bytes: int
    full: bool


def open_learner(state: State, specs: Sequence[TensorSpec], files: Sequence[Path]) -> None:
    """Hold real versions in memory, as a learner holds its model."""
    state["specs"], state["snapshots"] = specs, [read_snapshot(file) for file in files]


def serve(state: State, endpoint: str, keys: Path | None) -> None:
    """Open the publisher, encrypted where there are keys."""
    state["publisher"] = WeightPublisher(endpoint, RUN, security=_security(keys, Identity.LEARNER))


def close_learner(state: State) -> None:
    """Close the publisher."""
    state["publisher"].close()


def publish(state: State, number: int, step_s: float = 0.0) -> Published:
    """Publish a version. They go up and down the real ones, so that two consecutive ones are a real step apart.

    step_s: compute for so long before, as a learner does; one that sleeps publishes with cores that have to wake up.
    """
    _compute(step_s)
    snapshots = state["snapshots"]
    turn = number % (2 * len(snapshots) - 2) if len(snapshots) > 1 else 0
    snapshot = snapshots[min(turn, 2 * len(snapshots) - 2 - turn)]
    tensors = [
        (spec.name, spec.dtype, spec.shape, snapshot[spec.offset : spec.offset + spec.num_bytes])
        for spec in state["specs"]
    ]
    diff_s = total("ergon_weights_diff_seconds_sum")
    started, cpu = time.monotonic(), time.process_time()
    stats = state["publisher"].publish(PolicyVersion(LINEAGE, number), tensors)
    return Published(
        started,
        time.monotonic() - started,
        time.process_time() - cpu,
        total("ergon_weights_diff_seconds_sum") - diff_s,
        stats.payload_bytes,
        stats.num_changed / stats.num_elements,
        stats.full,
    )


def _compute(seconds: float) -> None:
    until = time.monotonic() + seconds
    numbers = np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    while time.monotonic() < until:
        np.tanh(numbers)


def cpu_s(_: State) -> float:
    """CPU seconds of the worker so far."""
    return time.process_time()


def open_nothing(_: State) -> None:
    """Import what an actor needs, so that this is not counted as its memory."""


def open_actor(state: State, endpoint: str, path: Path, keys: Path | None) -> None:
    """Subscribe to the publisher itself, with a base file at `path`."""
    state["subscriber"] = WeightSubscriber(
        endpoint, RUN, f"actor-{os.getpid()}", security=_security(keys, Identity.ACTOR), server=Identity.LEARNER
    )
    state["base"] = BaseFile(path)


def fetch(state: State, number: int) -> Arrived:
    """Wait for a version, fetch it into the base and verify it."""
    subscriber: WeightSubscriber = state["subscriber"]
    base: BaseFile = state["base"]
    wanted = PolicyVersion(LINEAGE, number)
    if subscriber.wait_coming(PolicyVersion(LINEAGE, number - 1) if number else None, PATIENCE_S) != wanted:
        raise RuntimeError(f"version {number} was never announced")
    names = ["ergon_weights_fetch_seconds_sum", "ergon_weights_transfer_seconds_sum", "ergon_weights_apply_seconds_sum"]
    before = [total(name) for name in names]
    cpu = time.process_time()
    manifest = subscriber.fetch_base(wanted, base, PATIENCE_S)
    at, cpu = time.monotonic(), time.process_time() - cpu
    seconds, transfer_s, apply_s = (total(name) - was for name, was in zip(names, before, strict=True))
    return Arrived(at, seconds, cpu, transfer_s, apply_s, manifest.payload_bytes, manifest.parent is None)


def total(name: str) -> float:
    """A metric of this process, 0 before its first use."""
    return REGISTRY.get_sample_value(name) or 0.0


def close_actor(state: State) -> None:
    """Remove the base file."""
    state["subscriber"].close()
    state["base"].close()


def _security(keys: Path | None, identity: Identity) -> Security:
    return OPEN if keys is None else keyed(keys, identity)


# --- for comparison -------------------------------------------------------------------------------------------------


def gloo(
    _: State, rank: int, address: str, port: int, interface: str, num_bytes: int, repeats: int, warm: bool
) -> list[tuple[float, float]]:
    """Broadcasts of one flat tensor from rank 0 to rank 1: (begin, end) of each on this side."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # else it complains that addresses have no names
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE_S)
    )
    data = torch.zeros(num_bytes, dtype=torch.uint8) + rank
    small = torch.zeros(1)
    dist.broadcast(small, 0)
    times = []
    for repeat in range(repeats + warm):
        dist.barrier()
        begun = time.monotonic()
        dist.broadcast(data, 0)
        if repeat >= warm:
            times.append((begun, time.monotonic()))
    if int(data[-1]) != 0:
        raise RuntimeError("gloo's broadcast did not arrive")
    dist.barrier()
    dist.destroy_process_group()
    return times


def send_plainly(_: State, address: str, port: int, num_bytes: int) -> tuple[float, float]:
    """Listen, and send so many bytes to who connects; begin and end until the other side has said it has them."""
    with socket.create_server((address, port)) as server:
        peer, _address = server.accept()
        with peer:
            data = memoryview(bytes(num_bytes))
            begun = time.monotonic()
            peer.sendall(data)
            peer.recv(1)
            return begun, time.monotonic()


def receive_plainly(_: State, address: str, port: int, num_bytes: int) -> None:
    """Connect and read so many bytes."""
    deadline = time.monotonic() + 10
    while True:
        try:
            peer = socket.create_connection((address, port))
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    with peer:
        into = bytearray(1 << 20)
        left = num_bytes
        while left:
            left -= peer.recv_into(into)
        peer.sendall(b"!")
