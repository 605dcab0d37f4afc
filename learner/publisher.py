"""Weights out: the engine's state dict -> the weight channel. Owns the publishing client; copies nothing itself."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from broker.process.keys import Identity
from broker.process.security import load_security
from broker.process.settings import Settings
from broker.protocol.trajectory import PolicyVersion
from broker.weights.publisher import WeightPublisher
from learner.engine import TrainEngine


class Publisher:
    """Publishes each version once. Raises ErgonError where the port is taken."""

    def __init__(self, settings: Settings) -> None:
        section = settings.weights
        self._client = WeightPublisher(
            f"tcp://{section.host}:{section.port}",
            settings.run.name,
            chunk_bytes=section.chunk_bytes,
            heartbeat_s=section.heartbeat_s,
            liveness=section.liveness,
            security=load_security(settings, Identity.LEARNER),
        )
        self._published: PolicyVersion | None = None

    def publish(self, lineage: int, engine: TrainEngine) -> float:
        """Make the engine's current weights the newest version; returns the seconds it took, 0 where they already are.

        The weights may change once this returns.
        """
        version = PolicyVersion(lineage, engine.policy_version)
        if version == self._published:
            return 0.0
        started = time.monotonic()
        self._client.publish(version, wire_tensors(engine))
        self._published = version
        return time.monotonic() - started

    def close(self) -> None:
        """Stop serving."""
        self._client.close()


def wire_tensors(engine: TrainEngine) -> Iterator[tuple[str, str, tuple[int, ...], npt.NDArray[np.uint8]]]:
    """(name, dtype name, shape, little-endian bytes) of every tensor; the bytes are views wherever that is possible."""
    for name, tensor in engine.weights():
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield name, dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy()
