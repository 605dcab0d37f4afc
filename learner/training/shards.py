"""ZeRO-3: what changed in this rank's part of each weight since the weights were last published. Gathers nothing.

Owns a copy of the parts as they were published, one model copy over all ranks together. It reads DeepSpeed's internals
(`ds_tensor`: a rank's part, flat and padded; parts lie in the order of the ranks), so it says where they are not what
it knows, and a test rebuilds whole weights from parts. Knows nothing of names and of what is published.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from learner.engine import WeightChanges

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Shards:
    """One rank's parts. Local: no method is collective."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._published: dict[int, torch.Tensor] = {}  # by the parameter's ds_id: the bits of its part

    def mark(self, parameters: Iterable[Any]) -> None:
        """What these hold now is what is published."""
        for parameter in parameters:
            part = self._part(parameter)
            published = self._published.get(parameter.ds_id)
            if published is None:
                self._published[parameter.ds_id] = part.clone()
            else:
                published.copy_(part)

    def changes(self, parameter: Any) -> WeightChanges:
        """What changed in this rank's part, placed in the whole weight; it counts as published from now on."""
        live, published = self._part(parameter), self._published[parameter.ds_id]
        places = (live != published).nonzero().flatten()
        bits = live[places]
        published[places] = bits
        positions = places.cpu().numpy() + self._rank * parameter.ds_tensor.ds_numel
        elements: npt.NDArray[Any] = bits.cpu().numpy()
        return WeightChanges(positions, elements.view(f"u{elements.itemsize}"))

    def _part(self, parameter: Any) -> torch.Tensor:
        """The bits of this rank's part, without the padding behind the last one."""
        shard = parameter.ds_tensor
        if shard.numel() != shard.ds_numel or shard.ds_numel * self._world_size < parameter.ds_numel:
            raise RuntimeError(
                f"a ZeRO-3 part of {shard.numel()} of {shard.ds_numel} elements, {self._world_size} ranks and a weight "
                f"of {parameter.ds_numel}: this is not how deepspeed is known to divide weights"
            )
        start = self._rank * shard.ds_numel
        size = min(max(parameter.ds_numel - start, 0), shard.ds_numel)
        part: torch.Tensor = shard.data.flatten()[:size].view(_BITS[shard.element_size()])
        return part


def joined(parts: list[WeightChanges]) -> WeightChanges:
    """Changes of all ranks' parts of one weight, in the order of the ranks, so that positions ascend."""
    return WeightChanges(
        np.concatenate([part.positions for part in parts]), np.concatenate([part.elements for part in parts])
    )
