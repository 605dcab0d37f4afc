"""The learner of the simulation: the real client and the real publisher, and no training.

It takes trajectories as they come, under credit, acknowledges and issues anew each ACK_S, and publishes a version each
step: a snapshot as large as SmolLM2-135M's, of which as many elements change as were measured at a learning rate of
1e-6. Functions take a worker's state.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from broker.client import LearnerClient
from broker.protocol.trajectory import Mode, PolicyVersion, TaskRef, Ticket, Trajectory
from broker.protocol.weights import Bytes
from broker.weights.publisher import WeightPublisher
from tests.bench.exchange.load import GROUP_SIZE, RUN_ID
from tests.bench.weightchannel.workers import State

WINDOW = 2048  # trajectories that may lie in the client, as the credit says
ACK_S = 1.0
ELEMENTS = 134_500_000  # bf16
TENSORS = 25
CHANGED = 0.0036  # share of the elements, a step


class Received(NamedTuple):
    """What the learner saw of a window. versions: number -> when its publication began and its delta's bytes.
    staleness: of the trajectories, versions, mean."""

    num: int
    cpu_s: float
    staleness: float
    versions: dict[int, tuple[float, int]]


class Learner:
    """One run's."""

    def __init__(self, port: int, weights_port: int) -> None:
        self._client = LearnerClient(f"tcp://127.0.0.1:{port}", RUN_ID, window=WINDOW)
        self._client.connect()
        self._client.resume()
        self._publisher = WeightPublisher(f"tcp://127.0.0.1:{weights_port}", RUN_ID)
        self._rng = np.random.default_rng(0)
        # Of weights of about 0.02, as they are; only where their bits change matters here.
        block_E = self._rng.normal(0, 0.02, ELEMENTS // TENSORS).astype(np.float32).view(np.uint32) >> 16
        self._weights_TE = np.tile(block_E.astype(np.uint16), (TENSORS, 1))
        self._num_issued = self._version = 0
        self.versions: dict[int, tuple[float, int]] = {}

    @property
    def version(self) -> PolicyVersion:
        """The newest."""
        return PolicyVersion(self._client.lineage, self._version)

    def issue(self, num: int) -> None:
        """Issue so many more tickets."""
        numbers = range(self._num_issued, self._num_issued + num)
        self._num_issued += num
        self._client.issue([_ticket(number) for number in numbers])

    def publish(self) -> None:
        """The next version."""
        self._version += 1
        num = int(CHANGED * self._weights_TE.size)
        places = self._rng.integers(0, self._weights_TE.size, num)
        self._weights_TE.reshape(-1)[places] ^= self._rng.integers(1, 4, num, dtype=np.uint16)
        tensors = [(f"w{i:02d}", "bfloat16", (row.size,), _bytes(row)) for i, row in enumerate(self._weights_TE)]
        begun = time.monotonic()
        self.versions[self._version] = begun, self._publisher.publish(self.version, tensors).payload_bytes

    def run(self, starts: float, ends: float, step_s: float) -> Received:
        """Until `ends`; what is told is of the time from `starts` on, but for the versions."""
        num, behind, cpu_s, ids = 0, 0, 0.0, list[str]()
        next_ack = time.monotonic() + ACK_S
        next_step = starts
        measuring = False
        while (now := time.monotonic()) < ends:
            if not measuring and now >= starts:
                measuring, cpu_s = True, time.process_time()
            if now >= next_step and ends - now > step_s / 2:
                self.publish()
                next_step += step_s
            if ids and (now >= next_ack or self._client.full):
                next_ack = now + ACK_S
                self._client.ack(ids)
                self.issue(len(ids))
                ids.clear()
            item = self._client.receive(min(0.05, max(0.0, ends - now)))
            if item is None:
                continue
            if not isinstance(item, Trajectory):
                raise RuntimeError(f"a dead letter: {item.error}")
            ids.append(item.ticket.ticket_id)
            if measuring:
                num += 1
                behind += self._version - item.segments[0].version_runs[0].version
        return Received(num, time.process_time() - cpu_s, behind / max(1, num), self.versions)

    def close(self) -> None:
        """End both connections."""
        self._client.close()
        self._publisher.close()


def _bytes(row: np.ndarray) -> Bytes:
    return row.view(np.uint8)


def _ticket(number: int) -> Ticket:
    return Ticket(
        ticket_id=f"{RUN_ID}/train/{number // GROUP_SIZE}/{number % GROUP_SIZE}",
        group_id=f"{RUN_ID}/train/{number // GROUP_SIZE}",
        group_size=GROUP_SIZE,
        task=TaskRef(env="scripted", split="train", index=number // GROUP_SIZE),
        mode=Mode.TRAIN,
        deadline_s=3600.0,
    )


def open_learner(state: State, port: int, weights_port: int, num_tickets: int) -> tuple[int, int]:
    """Connect, publish the first version and issue so many tickets; that version."""
    learner = state["learner"] = Learner(port, weights_port)
    learner.publish()
    learner.issue(num_tickets)
    return tuple(learner.version)


def run_learner(state: State, starts: float, ends: float, step_s: float) -> Received:
    """See Learner.run."""
    received: Received = state["learner"].run(starts, ends, step_s)
    return received


def close_learner(state: State) -> None:
    """End it."""
    state.pop("learner").close()
