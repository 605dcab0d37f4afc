"""A frozen copy of the trained weights, which can be swapped in for a forward pass: the reference policy of a loss.

Owns this rank's part of the copy: with ZeRO-3 the part of every weight that the rank has, with adapters the adapters
only. There is no second model: the live weights step aside for the pass and come back untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from broker.process.lifecycle import ErgonError


class Reference:
    """The reference weights of one rank's DeepSpeed engine. `swapped_in` is collective."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._copies: list[torch.Tensor] = []

    @property
    def taken(self) -> bool:
        """Whether there is a copy."""
        return bool(self._copies)

    def take(self) -> None:
        """Copy the weights as they are now."""
        self._copies = [holder.data.clone() for holder in self._holders()]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The engine computes with the reference weights; no gradient and no step in here."""
        self._engine.empty_partition_cache()  # ZeRO-3: whole weights that linger would be the live ones
        live = [holder.data for holder in self._holders()]
        try:
            self._point_to(self._copies)
            yield
        finally:
            self._engine.empty_partition_cache()
            self._point_to(live)

    def state(self) -> list[torch.Tensor]:
        """The copy, for a checkpoint; empty where none was taken."""
        return self._copies

    def load(self, path: Path) -> None:
        """Read `state` from a file, or forget the copy where there is no file."""
        copies = torch.load(path, map_location="cpu") if path.exists() else []
        holders = self._holders() if copies else []
        if [copy.shape for copy in copies] != [holder.shape for holder in holders]:
            raise ErgonError(
                f"{path} holds other weights than this engine has; resume with the ranks, the ZeRO stage and the "
                "adapters that it was saved with"
            )
        self._copies = [copy.to(holder.device) for copy, holder in zip(copies, holders, strict=True)]

    def _point_to(self, tensors: list[torch.Tensor]) -> None:
        for holder, tensor in zip(self._holders(), tensors, strict=True):
            holder.data = tensor

    def _holders(self) -> list[torch.Tensor]:
        """What holds the numbers of each trained weight on this rank."""
        holders = []
        for parameter in self._engine.module.parameters():
            if parameter.requires_grad:
                holder = getattr(parameter, "ds_tensor", parameter)
                if not holder.numel():
                    raise ErgonError(
                        "a reference policy needs the weights in memory; set learner.offload_parameters to none or cpu"
                    )
                holders.append(holder)
        return holders
