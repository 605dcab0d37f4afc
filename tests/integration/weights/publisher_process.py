"""`python -m tests.integration.weights.publisher_process PORT LINEAGE HOLD`: a learner's publisher, to be killed.

It publishes version 0 and says so; after a line on standard input, version 1, in which it stops for ever at HOLD:
`tensor`, between two tensors; `commit`, when all is made and nothing is told; or `nowhere`.
"""

from __future__ import annotations

import sys
import threading

import numpy as np

from broker.protocol.trajectory import PolicyVersion
from broker.weights.publisher import WeightPublisher
from broker.weights.store import WeightStore
from tests.integration.weights.ends import HEARTBEAT_S, LIVENESS, RUN, SIZE, Tensors, random_tensors


def content(lineage: int, number: int) -> Tensors:
    """What version `number` of a lineage is: each differs from the one before by a sixteenth of its elements."""
    tensors = random_tensors(SIZE, seed=100 + lineage)
    rng = np.random.default_rng(lineage)
    for _ in range(number):
        for *_, data in tensors:
            places = rng.integers(0, data.size, data.size // 16)
            data[places] = rng.integers(0, 256, places.size, np.uint8)
    return tensors


def hold(place: str) -> None:
    """Say where it stands, and stay there."""
    print(f"held {place}", flush=True)
    threading.Event().wait()


def main() -> None:
    """Publish, and be killed."""
    port, lineage, place = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    publisher = WeightPublisher(
        f"tcp://127.0.0.1:{port}", RUN, chunk_bytes=64 << 10, heartbeat_s=HEARTBEAT_S, liveness=LIVENESS
    )
    publisher.publish(PolicyVersion(lineage, 0), content(lineage, 0))
    print("published 0", flush=True)
    sys.stdin.readline()
    tensors = content(lineage, 1)
    sources = {name: data for name, _, _, data in tensors}

    def read(name: str) -> np.ndarray:
        if place == "tensor" and name == "embed.weight":  # the second of the snapshot, whose elements are narrower
            hold(place)
        return sources[name]

    if place == "commit":
        WeightStore.commit = lambda *_: hold(place)  # type: ignore[method-assign,assignment,misc]
    layout = [(name, dtype, shape) for name, dtype, shape, _ in tensors]
    publisher.publish_from(PolicyVersion(lineage, 1), layout, read)
    print("published 1", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
