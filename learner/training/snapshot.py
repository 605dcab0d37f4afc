"""DeepSpeed's way to the disk: at once, or copied first and written later, so that training goes on meanwhile.

Owns the copy: host memory as large as the checkpoint, which every snapshot uses again. DeepSpeed decides what is in it
(weights, float32 master copy, moments, counters; per rank, whatever the ZeRO stage). Knows nothing of when a checkpoint
is due or complete.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

_PART = ".part"
_FAILED = ".failed"
_POLL_S = 0.05


class SnapshotEngine(CheckpointEngine):  # type: ignore[misc]  # deepspeed has no types
    """What DeepSpeed saves through. While `copying`, `save` only copies and `write` writes the files, from any thread.

    The next snapshot may begin when `write` has returned: they share the memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "SnapshotEngine"
        self.copying = True
        self._copies = _Copies()
        self._files: list[tuple[Path, Any]] = []

    def create(self, info: Any) -> None:
        """A new checkpoint begins."""
        self._copies.rewind()
        self._files = []

    def save(self, state_dict: Any, path: str) -> None:
        """Copy, or write at once."""
        if self.copying:
            self._files.append((Path(path), self._copies.copy_all(state_dict)))
        else:
            torch.save(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file of a checkpoint."""
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: Any) -> bool:
        """Nothing to do: who owns the folder says when it is complete."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """Whether DeepSpeed must make compact copies first; ours are."""
        return not self.copying

    @property
    def paths(self) -> list[Path]:
        """The files that `write` will write."""
        return [path for path, _ in self._files]

    def write(self) -> None:
        """Write this rank's files; each has its name once it is whole."""
        for path, state in self._files:
            part = path.with_name(path.name + _PART)
            try:
                torch.save(state, part)
                part.replace(path)
            except BaseException as error:
                path.with_name(path.name + _FAILED).write_text(f"{type(error).__name__}: {error}")
                raise


def wait_written(paths: list[Path], timeout_s: float = 3600.0) -> None:
    """Wait until other ranks' files are whole. Raises OSError where a rank failed, or after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    for path in paths:
        while not path.exists():
            failed = path.with_name(path.name + _FAILED)
            if failed.exists():
                raise OSError(f"another rank could not write {path}: {failed.read_text()}")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{path} was not written within {timeout_s:.0f} s; the run's folder must be the same for all ranks"
                )
            time.sleep(_POLL_S)


class _Copies:
    """Copies nested state to host memory, into the same tensors every time as long as the state keeps its layout."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._next: Iterator[torch.Tensor] = iter(())
        self._used: list[torch.Tensor] = []
        self._seen: dict[tuple[Any, ...], torch.Tensor] = {}

    def rewind(self) -> None:
        """The next copy goes over the last one."""
        if self._used:
            self._buffers = self._used
        self._next, self._used = iter(self._buffers), []

    def copy_all(self, state: Any) -> Any:
        """A copy of nested state. Tensors that are the same memory are copied once; not beyond this call, because what
        the next state holds may have been made since, where something lay that is gone."""
        self._seen = {}
        return self.copy(state)

    def copy(self, value: Any) -> Any:
        """Containers are made anew, tensors copied, all else is taken as it is."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value.detach())
        if isinstance(value, dict):
            copied = {key: self.copy(item) for key, item in value.items()}
            return copied if type(value) is dict else type(value)(copied)
        if type(value) in (list, tuple):
            return type(value)([self.copy(item) for item in value])
        return value

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        known = self._seen.get(key)
        if known is not None and tensor.numel():
            return known
        buffer = next(self._next, None)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # The layout changed (the first step makes moments): from here on the buffers are new ones.
            self._next = iter(())
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        buffer.copy_(tensor, non_blocking=False)
        self._used.append(buffer)
        self._seen[key] = buffer
        return buffer
