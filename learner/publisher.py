"""Weights out: the engine's state dict -> the weight channel, one tensor at a time.

Owns the publishing client; holds no bytes of its own, and what it brings from a GPU is one tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from broker.process.keys import Identity
from broker.process.security import load_security
from broker.process.settings import Settings
from broker.protocol.trajectory import PolicyVersion
from broker.weights.filling import Changes
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
            max_bytes=section.max_mb << 20,
            max_delta_bytes=section.delta_mb << 20,
            heartbeat_s=section.heartbeat_s,
            liveness=section.liveness,
            security=load_security(settings, Identity.LEARNER),
        )
        self._published: PolicyVersion | None = None
        self._engine_knows = False  # what was published last

    def publish(self, lineage: int, engine: TrainEngine) -> float:
        """Make the engine's current weights the newest version; returns the seconds it took, 0 where they already are.

        The weights may change once this returns.
        """
        version = PolicyVersion(lineage, engine.policy_version)
        if version == self._published:
            return 0.0
        started = time.monotonic()
        layout = [(spec.name, spec.dtype, spec.shape) for spec in engine.weight_layout()]
        knows, self._engine_knows = self._engine_knows, False  # until this version is complete
        self._client.publish_from(
            version, layout, lambda name: wire_bytes(engine.read_weight(name)), _changed(engine) if knows else None
        )
        engine.mark_published()
        self._published, self._engine_knows = version, True
        return time.monotonic() - started

    def close(self) -> None:
        """Stop serving."""
        self._client.close()


def _changed(engine: TrainEngine) -> Callable[[str], Changes | None]:
    def changed(name: str) -> Changes | None:
        found = engine.changed_weight(name)
        return None if found is None else Changes(found.positions, found.elements)

    return changed


def wire_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The tensor's little-endian bytes in C order, on the CPU; a view wherever that is possible."""
    return tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
