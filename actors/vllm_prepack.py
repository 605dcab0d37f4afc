"""Weights made ready beside the model that is serving, so that the switch to them is short. Runs in vLLM's worker.

Owns the loading of one version into a shadow of the model (`vllm_shadow.py`) by vLLM's own loaders, its packing for the
CPU kernels by vLLM's own code, and the switch, which moves pointers. Only an embedding's table, which is served as it
is loaded, is written where it lies: it would cost the memory of another. Works in small units, so that the worker can
sample between them. Never changes a tensor that is being served before `switch`, and is never used where `obstacle`
names a reason: there the whole model is reloaded in the pause.
"""

from __future__ import annotations

import ctypes
import inspect
import mmap
import time
from collections.abc import Callable, Generator
from inspect import BoundArguments
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.meta import get_numel_loaded, materialize_meta_tensor
from vllm.model_executor.model_loader.reload.utils import get_layer_size
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from actors.checkpoint import StoredTensor, stored_tensors
from actors.vllm_shadow import make_shadow, packs, parameters_of
from broker.protocol.hashes import Hasher

LOAD_UNIT_BYTES = 4 << 20
PACKED = "cpu_linear"  # the attribute in which vLLM keeps the function that holds a layer's packed weights
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Preparation:
    """One version on its way into the model: `work` until it returns the hash, then `switch`, then `release`."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        """`path`: a safetensors file that was checked against the model; not to be written before `release`."""
        self._path = path
        self._shadow, self._pairs = make_shadow(model, materialize_meta_tensor)
        self._unpacked = [new for _, new in self._pairs if packs(new)]
        self._num_loaded = dict.fromkeys(self._unpacked, 0)  # elements, by layer
        self._owners: dict[int, list[nn.Module]] = {}  # by the identity of a parameter; tied layers share one
        for layer in self._unpacked:
            for parameter in parameters_of(layer).values():
                self._owners.setdefault(id(parameter), []).append(layer)
                if len(self._owners[id(parameter)]) == 1:
                    parameter.weight_loader = self._counted(parameter)  # type: ignore[attr-defined]
        self._packed: dict[int, Any] = {}  # by the identity of an embedding's weights, which packing leaves in place
        self._stored: dict[int, StoredTensor] = {}  # by the address of what a loader is given
        # What to do again in the switch, by the identity of a parameter; None where that is not known to be enough.
        self._again: dict[int, list[tuple[Callable[..., Any], BoundArguments]] | None] = {}
        self._map: mmap.mmap | None = None  # what `_again` reads
        self._hasher = Hasher()
        self._units = self._run()
        self._retired: list[Any] = []

    @torch.no_grad()
    def work(self, budget_s: float) -> str | None:
        """Go on for about this long, at least by one unit; once all is done, the hash of the bytes that were taken."""
        deadline = time.monotonic() + budget_s
        for _ in self._units:
            if time.monotonic() >= deadline:
                return None
        return self._hasher.digest().hex()

    @torch.no_grad()
    def switch(self) -> None:
        """Serve the prepared weights. Only while sampling is paused; a failure leaves a mixture of two versions."""
        for live, new in self._pairs:
            packing = packs(live)
            serving = parameters_of(live)
            for name, parameter in parameters_of(new).items():
                if not packing:
                    serving[name].copy_(parameter)  # small, and something else may look at the same memory
                elif self._again.get(id(parameter)) is not None:
                    parameter.data = serving[name].data
                else:
                    # The Parameter object stays, because tied layers share it.
                    self._retired.append(serving[name].data)
                    serving[name].data = parameter.data
            if packing:
                self._retired.append(live.__dict__.get(PACKED))
                live.__dict__[PACKED] = new.__dict__[PACKED]
        for calls in self._again.values():
            for loader, bound in calls or ():
                loader(*bound.args, **bound.kwargs)
        self._forget()

    def release(self, budget_s: float) -> bool:
        """Free the weights that were replaced, for about this long; whether all are gone."""
        deadline = time.monotonic() + budget_s
        self._unmap()
        while self._retired and time.monotonic() < deadline:
            self._retired.pop()
        if not self._retired:
            _return_freed_memory()
        return not self._retired

    def close(self) -> None:
        """Give up what is not yet served, the map of the file included. Idempotent."""
        self._units.close()
        self._forget()
        self._unmap()

    def _forget(self) -> None:
        for _, new in self._pairs:
            # Layers and loaders refer to each other: without this, memory would wait for the garbage collector.
            new._parameters.clear()
            new.__dict__.pop(PACKED, None)
        self._shadow = None
        for collection in (self._pairs, self._unpacked, self._num_loaded, self._packed, self._again, self._owners):
            collection.clear()

    def _unmap(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    def _run(self) -> Generator[None, None, None]:
        """Load the file's tensors in their order, hash what is taken, pack each layer once it is whole."""
        with self._path.open("rb") as file:
            mapped, self._map = (mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) for _ in range(2))
        batch: list[tuple[str, torch.Tensor]] = []
        num_bytes = 0
        for stored in stored_tensors(self._path):
            batch.append((stored.name, view_of(mapped, stored)))
            self._stored[batch[-1][1].data_ptr()] = stored
            with memoryview(mapped) as whole, whole[stored.offset :][: stored.num_bytes] as taken:
                self._hasher.update(taken)
            num_bytes += stored.num_bytes
            if num_bytes >= LOAD_UNIT_BYTES:
                self._shadow.load_weights(batch)
                batch.clear()
                num_bytes = 0
                yield
                yield from self._pack(lambda layer: self._num_loaded[layer] >= get_layer_size(layer))
        self._shadow.load_weights(batch)
        batch.clear()
        mapped.close()  # refuses while anything still looks at the file
        yield
        yield from self._pack(lambda layer: True)  # a padded layer is never counted as whole

    def _counted(self, parameter: torch.Tensor) -> Callable[..., Any]:
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        signature = inspect.signature(loader)
        key = id(parameter)  # a function that knows the parameter it belongs to would keep its memory

        def load(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            num_loaded, result = get_numel_loaded(loader, bound)
            owners = self._owners[key]
            for layer in owners:
                self._num_loaded[layer] += num_loaded
            if any(_is_embedding(layer) for layer in owners):
                self._note(key, loader, bound)
            return result

        return load

    def _note(self, loaded: int, loader: Callable[..., Any], bound: BoundArguments) -> None:
        """Remember how the parameter was loaded, with the tensor in the file that stays mapped until the switch."""
        given = [(key, value) for key, value in bound.arguments.items() if isinstance(value, torch.Tensor)]
        for key, value in given:
            stored = self._stored.get(value.data_ptr())
            if id(value) != loaded and stored is not None and stored.shape == tuple(value.shape) and self._map:
                bound.arguments[key] = view_of(self._map, stored)
                calls = self._again.setdefault(loaded, [])
                if calls is not None:
                    calls.append((loader, bound))
                return
        self._again[loaded] = None  # the loader was given something else than a tensor of the file

    def _pack(self, whole: Callable[[nn.Module], bool]) -> Generator[None, None, None]:
        for layer in [layer for layer in self._unpacked if whole(layer)]:
            self._unpacked.remove(layer)
            key = id(layer._parameters["weight"])
            if _is_embedding(layer) and key in self._packed:
                # A tied head has the embedding's weights, so one packed copy serves both.
                layer.__dict__[PACKED] = self._packed[key]
            else:
                _process(layer)
                if _is_embedding(layer):
                    self._packed[key] = layer.__dict__[PACKED]
                yield
            self._drop_loaded(layer)

    def _drop_loaded(self, layer: nn.Module) -> None:
        """Free what will be loaded again, into the memory that serves, once all who share it are packed."""
        for parameter in parameters_of(layer).values():
            waiting = any(owner in self._unpacked for owner in self._owners.get(id(parameter), ()))
            if self._again.get(id(parameter)) is not None and not waiting:
                parameter.data = parameter.data.new_empty(0)
                _return_freed_memory()  # what is packed next would rather fill smaller gaps


def _is_embedding(layer: Any) -> bool:
    return isinstance(layer.quant_method, UnquantizedEmbeddingMethod)


def _process(layer: Any) -> None:
    """Let vLLM pack a layer of the shadow."""
    before = dict(layer.__dict__)
    layer.quant_method.process_weights_after_loading(layer)
    changed = {key for key, value in layer.__dict__.items() if before.get(key) is not value}
    if not changed <= {PACKED}:
        raise RuntimeError(
            f"packing {type(layer).__name__} changed {sorted(changed - {PACKED})}, which is not switched"
        )


def _return_freed_memory() -> None:
    """Give what was freed back to the system; the allocators would keep it for the next adoption."""
    process = ctypes.CDLL(None)
    if hasattr(process, "MallocExtension_ReleaseFreeMemory"):  # tcmalloc is preloaded
        process.MallocExtension_ReleaseFreeMemory()
    elif hasattr(process, "malloc_trim"):
        process.malloc_trim(0)


def view_of(mapped: mmap.mmap, stored: StoredTensor) -> torch.Tensor:
    """A tensor on the bytes of a mapped file; the map cannot be closed while it lives."""
    if not stored.num_bytes:
        return torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
    flat = torch.frombuffer(mapped, dtype=TORCH_DTYPES[stored.dtype], count=stored.num_elements, offset=stored.offset)
    return flat.reshape(stored.shape)
