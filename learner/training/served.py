"""The weights as the engine that samples has them: names, shapes and, one after another, the tensors.

Owns how a name becomes a tensor: tied ones once, adapters merged into their layers, and with ZeRO-3, where no rank has
a whole tensor, gathered in buckets of neighbours, so that never more than a bucket is whole on any rank. Knows nothing
of the weight channel but the order in which it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch

from broker.protocol.weights import lay_out
from learner.engine import WeightChanges, WeightSpec
from learner.training import lora
from learner.training.shards import Shards

BUCKET_BYTES = 32 << 20
_BASE = ".base_layer"


@dataclass(frozen=True, slots=True)
class _Served:
    """A tensor to be served: the parameters it is computed from and how, while they are there."""

    spec: WeightSpec
    parameters: tuple[torch.Tensor, ...]
    read: Callable[[], torch.Tensor]

    @property
    def plain(self) -> bool:
        """Whether it is one parameter as it is."""
        return len(self.parameters) == 1


class ServedWeights:
    """What a causal language model serves. One per rank; `gather` is collective."""

    def __init__(self, causal_lm: torch.nn.Module) -> None:
        self._served = {served.spec.name: served for served in _served(causal_lm)}
        self.partitioned = any(hasattr(p, "ds_id") for served in self._served.values() for p in served.parameters)
        self.buckets = _buckets(self.layout) if self.partitioned else []

    @property
    def layout(self) -> list[WeightSpec]:
        """All tensors, in the order in which the weight channel reads them."""
        specs = {name: served.spec for name, served in self._served.items()}
        return [specs[spec.name] for spec in lay_out((s.name, s.dtype, s.shape) for s in specs.values())]

    def local(self, name: str) -> torch.Tensor:
        """A tensor that this rank has whole; valid until the next step."""
        return self._served[name].read()

    def gather(self, bucket: int, *, keep: bool) -> Mapping[str, torch.Tensor]:
        """ZeRO-3: make the tensors of a bucket whole; copies of them where `keep` says so, else nothing is held."""
        members = [self._served[name] for name in self.buckets[bucket]]
        parameters = [parameter for served in members for parameter in served.parameters]
        with deepspeed.zero.GatheredParameters(parameters):
            return {served.spec.name: served.read().clone() for served in members} if keep else {}

    def mark(self, shards: Shards) -> None:
        """ZeRO-3: all tensors that are a parameter as it is are published as they are now."""
        shards.mark(served.parameters[0] for served in self._served.values() if served.plain)

    def changes(self, bucket: int, shards: Shards) -> dict[str, WeightChanges]:
        """ZeRO-3: what changed in this rank's parts of a bucket since then; merged tensors are left out."""
        members = [self._served[name] for name in self.buckets[bucket]]
        return {served.spec.name: shards.changes(served.parameters[0]) for served in members if served.plain}


def _served(causal_lm: torch.nn.Module) -> Iterator[_Served]:
    adapted = lora.adapted_layers(causal_lm)
    seen: set[int] = set()
    for name, tensor in causal_lm.state_dict(keep_vars=True).items():
        if id(tensor) in seen or ".lora_" in name:
            continue
        seen.add(id(tensor))
        plain = name.replace(_BASE, "")
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        spec = WeightSpec(plain, str(tensor.dtype).removeprefix("torch."), shape)
        layer = adapted.get(plain.removesuffix(".weight")) if plain != name and name.endswith(".weight") else None
        if layer is None:
            yield _Served(spec, (tensor,), tensor.detach)
        else:
            yield _Served(spec, lora.parameters_of(layer), _merged(layer))


def _merged(layer: Any) -> Callable[[], torch.Tensor]:
    return lambda: lora.merged_weight(layer)


def _buckets(layout: list[WeightSpec]) -> list[tuple[str, ...]]:
    """Names of neighbours, up to BUCKET_BYTES together; a larger tensor is alone."""
    buckets: list[list[str]] = []
    room = 0
    for spec in layout:
        size = math.prod(spec.shape) * getattr(torch, spec.dtype).itemsize
        if not buckets or size > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(spec.name)
        room -= size
    return [tuple(bucket) for bucket in buckets]
