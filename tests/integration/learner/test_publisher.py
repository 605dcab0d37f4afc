"""The learner's publisher: an engine's tensors as they are, whole the first time and as deltas afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from broker.process.settings import Settings
from broker.protocol.trajectory import PolicyVersion
from broker.weights.basefile import BaseFile
from broker.weights.subscriber import WeightSubscriber
from learner.publisher import Publisher
from tests.ports import free_ports


class Weights:
    """What the publisher needs of a TrainEngine."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.policy_version = 0
        self.tensors = {
            "z.weight": torch.randn(64, 32).to(torch.bfloat16),
            "a.bias": torch.randn(33),
            "half": torch.randn(8, 8).to(torch.float16).t(),  # not contiguous
        }

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()


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
