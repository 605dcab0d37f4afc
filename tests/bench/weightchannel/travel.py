"""A version from the learner's `publish` to the actor's verified base, on one link: as deltas, whole, and by gloo.

Owns the order of things on a link: loopback, or shaped (`link.py`). Off loopback the channel is encrypted, as it
must be there, and gloo is not. Times nothing itself: the ends do.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from broker.process.keys import make_keys
from broker.protocol.weights import TensorSpec
from tests.bench.weightchannel import ends
from tests.bench.weightchannel.ends import Arrived, Published
from tests.bench.weightchannel.link import ADDRESSES, DEVICE, ShapedLink
from tests.bench.weightchannel.workers import PeakMemory, Worker, load
from tests.ports import free_ports

DELAY_S = 0.02
PORT, GLOO_PORT, PLAIN_PORT = 7710, 7750, 7760
STEP_S = 1.5  # between two versions: longer than a heartbeat, as any learner's step is
STAGING = Path("/dev/shm")  # as actor.staging


class Way(NamedTuple):
    """A link. `bits_per_s` None: loopback."""

    name: str
    bits_per_s: float | None


LOOPBACK = Way("loopback", None)
GIGABIT, SLOW = Way("1 Gbit/s, 20 ms", 1e9), Way("100 Mbit/s, 20 ms", 1e8)


class Travel(NamedTuple):
    """Medians, seconds. `delta_s`, `full_s`: from the call of publish() until the actor's base is verified. That of a
    delta is made of publish(), `wire_s` and the fetch."""

    way: Way
    delta_s: float
    publish_s: float
    publish_cpu_s: float
    diff_s: float  # of publish(), to compare and encode
    wire_s: float  # from the end of publish() to the arrival of its announcement, with the delta where that is pushed
    transfer_s: float  # of the fetch, until every chunk was there
    apply_s: float  # of the fetch, to decode, apply and verify the whole
    fetch_s: float  # from the announcement's arrival to the verified base
    fetch_cpu_s: float
    full_s: float
    gloo_s: float
    gloo_measured: bool  # else it is bytes over bandwidth
    plain_s: float | None  # a bare socket, for as many bytes as a snapshot has
    learner_mb: float  # memory beyond the model and the version in it
    actor_mb: float
    load: str

    @property
    def speedup(self) -> float:
        """Of a delta over gloo's broadcast of everything."""
        return self.gloo_s / self.delta_s


def measure(
    way: Way, specs: Sequence[TensorSpec], files: Sequence[Path], rounds: int, gloo_repeats: int, warm: bool = True
) -> Travel:
    """Everything on one link; without `gloo_repeats` gloo's time is computed."""
    num_bytes = specs[-1].offset + specs[-1].num_bytes
    with ExitStack() as stack:
        learner, actor = _workers(way, stack)
        address = ADDRESSES[0] if way.bits_per_s else "127.0.0.1"
        ports = (PORT, GLOO_PORT, PLAIN_PORT) if way.bits_per_s else tuple(free_ports(3))
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ergon-bench-", dir=STAGING)))
        keys = path / "keys" if way.bits_per_s else None
        if keys is not None:
            make_keys(keys)
        versions, learner_mb, actor_mb = _versions(
            learner, actor, specs, files, f"tcp://{address}:{ports[0]}", path, keys, rounds
        )
        plain_s, gloo_s = None, float("nan")
        if way.bits_per_s and gloo_repeats:
            plain_s = _plain_s(learner, actor, address, ports[2], num_bytes)
        if gloo_repeats:
            interface = DEVICE if way.bits_per_s else "lo"
            order = (address, ports[1], interface, num_bytes, gloo_repeats, warm)
            learner.begin(ends.gloo, 0, *order)
            received = actor.call(ends.gloo, 1, *order)
            sent = learner.answer()
            gloo_s = statistics.median(end - begun for (begun, _), (_, end) in zip(sent, received, strict=True))
        elif way.bits_per_s:
            gloo_s = num_bytes * 8 / way.bits_per_s + DELAY_S
    (first_published, first_arrived), *deltas = versions
    if any(arrived.full for _, arrived in deltas):
        raise RuntimeError("a snapshot travelled where a delta was due")
    return Travel(
        way=way,
        delta_s=statistics.median(arrived.at - published.started for published, arrived in deltas),
        publish_s=statistics.median(published.seconds for published, _ in deltas),
        publish_cpu_s=statistics.median(published.cpu_s for published, _ in deltas),
        diff_s=statistics.median(published.diff_s for published, _ in deltas),
        wire_s=statistics.median(a.at - a.seconds - p.started - p.seconds for p, a in deltas),
        transfer_s=statistics.median(arrived.transfer_s for _, arrived in deltas),
        apply_s=statistics.median(arrived.apply_s for _, arrived in deltas),
        fetch_s=statistics.median(arrived.seconds for _, arrived in deltas),
        fetch_cpu_s=statistics.median(arrived.cpu_s for _, arrived in deltas),
        full_s=first_arrived.at - first_published.started,
        gloo_s=gloo_s,
        gloo_measured=bool(gloo_repeats),
        plain_s=plain_s,
        learner_mb=learner_mb,
        actor_mb=actor_mb,
        load=load(),
    )


def _workers(way: Way, stack: ExitStack) -> tuple[Worker, Worker]:
    if way.bits_per_s is None:
        learner, actor = Worker("learner"), Worker("actor")
    else:
        link = ShapedLink(way.bits_per_s, DELAY_S)
        stack.callback(link.close)
        learner, actor = link.start(0, "learner"), link.start(1, "actor")
    stack.callback(learner.close)
    stack.callback(actor.close)
    return learner, actor


def _versions(
    learner: Worker,
    actor: Worker,
    specs: Sequence[TensorSpec],
    files: Sequence[Path],
    endpoint: str,
    directory: Path,
    keys: Path | None,
    rounds: int,
) -> tuple[list[tuple[Published, Arrived]], float, float]:
    """One anchor and `rounds` deltas through the channel; the growth of either end's memory by all that."""
    learner.call(ends.open_learner, specs, files)
    actor.call(ends.open_nothing)
    versions = []
    with PeakMemory(learner.pid) as learners, PeakMemory(actor.pid) as actors:
        learner.call(ends.serve, endpoint, keys)
        actor.call(ends.open_actor, endpoint, directory / "base.safetensors", keys)
        for number in range(rounds + 1):
            actor.begin(ends.fetch, number)
            published: Published = learner.call(ends.publish, number, STEP_S)
            versions.append((published, actor.answer()))
    actor.call(ends.close_actor)
    learner.call(ends.close_learner)
    return versions, learners.growth_mb, actors.growth_mb


def _plain_s(learner: Worker, actor: Worker, address: str, port: int, num_bytes: int) -> float:
    learner.begin(ends.send_plainly, address, port, num_bytes)
    actor.call(ends.receive_plainly, address, port, num_bytes)
    begun, ended = learner.answer()
    return float(ended - begun)
