"""The learner's publisher: an engine's tensors as they are, whole the first time and as deltas afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from broker.process.settings import Settings
from broker.protocol.trajectory import PolicyVersion
from broker.weights.basefile import BaseFile
from broker.weights.subscriber import WeightSubscriber
from learner.engine import WeightChanges, WeightSpec
from learner.publisher import Publisher
from tests.ports import free_ports


class Weights:
    """What the publisher needs of a TrainEngine."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.policy_version = self.num_read = 0
        self.known, self.fails_at = "z.weight", ""
        self.tensors = {
            "z.weight": torch.randn(64, 32).to(torch.bfloat16),
            "a.bias": torch.randn(33),
            "half": torch.randn(8, 8).to(torch.float16).t(),  # not contiguous
        }

    def weight_layout(self) -> list[WeightSpec]:
        return [
            WeightSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        ]

    def read_weight(self, name: str) -> torch.Tensor:
        self.num_read += 1
        if name == self.fails_at:
            raise OSError("gone")
        return self.tensors[name]

    def changed_weight(self, name: str) -> WeightChanges | None:
        """As of ZeRO-3: it knows of one tensor what changed, of the others nothing."""
        if name != self.known:
            return None
        bits, before = (each[name].flatten().view(torch.int16).numpy() for each in (self.tensors, self.published))
        self.published[name] = self.tensors[name].clone()
        positions = np.flatnonzero(bits != before)
        return WeightChanges(positions, bits[positions].view(np.uint16))

    def mark_published(self) -> None:
        self.published = {name: tensor.clone() for name, tensor in self.tensors.items()}


def test_versions_arrive_as_the_engine_has_them(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    settings = Settings.model_validate({"run": {"name": "r"}, "weights": {"port": port}})
    engine, publisher = Weights(), Publisher(settings)
    subscriber = WeightSubscriber(f"tcp://127.0.0.1:{port}", "r", "actor")
    base = BaseFile(tmp_path / "weights.safetensors")
    try:
        for number in range(3):
            assert publisher.publish(1, engine) > 0  # type: ignore[arg-type]
            assert publisher.publish(1, engine) == 0  # type: ignore[arg-type]
            assert engine.num_read == (2 * number + 3)  # of what it knows the changes of, nothing is read again
            version = PolicyVersion(1, number)
            assert subscriber.wait_newer(base.version, 30) == version
            manifest = subscriber.fetch_base(version, base, 30)
            assert manifest.parent == (PolicyVersion(1, number - 1) if number else None)
            arrived = load_file(base.path)
            assert arrived.keys() == engine.tensors.keys()
            for name, tensor in engine.tensors.items():
                assert arrived[name].dtype == tensor.dtype
                assert torch.equal(arrived[name], tensor)
            engine.tensors["z.weight"][number, 3:9] += 1.0
            engine.policy_version += 1
    finally:
        subscriber.close()
        publisher.close()


def test_after_a_failure_everything_is_read(tmp_path: Path) -> None:
    """What an engine says has changed is believed only if the version before was published whole."""
    (port,) = free_ports(1)
    settings = Settings.model_validate({"run": {"name": "r"}, "weights": {"port": port}})
    engine, publisher = Weights(), Publisher(settings)
    subscriber = WeightSubscriber(f"tcp://127.0.0.1:{port}", "r", "actor")
    base = BaseFile(tmp_path / "weights.safetensors")
    try:
        engine.known = "half"
        publisher.publish(1, engine)  # type: ignore[arg-type]
        engine.policy_version, engine.fails_at = 1, "z.weight"  # which is read after the known one was asked for
        engine.tensors["half"][3] += 1.0
        with pytest.raises(OSError, match="gone"):
            publisher.publish(1, engine)  # type: ignore[arg-type]
        engine.fails_at, engine.num_read = "", 0
        publisher.publish(1, engine)  # type: ignore[arg-type]
        assert engine.num_read == 3
        assert subscriber.wait_newer(PolicyVersion(1, 0), 30) == PolicyVersion(1, 1)
        subscriber.fetch_base(PolicyVersion(1, 1), base, 30)
        assert torch.equal(load_file(base.path)["half"], engine.tensors["half"])
    finally:
        subscriber.close()
        publisher.close()
