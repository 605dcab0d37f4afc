"""Weights made ready beside the model that is serving, so that the switch to them is short. Runs in vLLM's worker.

Owns the shadow: a second tree of the model's modules with parameters of their own, into which vLLM's own loaders put a
version and which vLLM's own code packs for the CPU kernels. The switch then moves pointers. Works in small units, so
that the worker can sample between them. Never changes a tensor that is being served before `switch`, never validates
a file, and is never used where `obstacle` names a reason: there the whole model is reloaded in the pause.
"""

from __future__ import annotations

import ctypes
import inspect
import mmap
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import xxhash
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import get_numel_loaded, materialize_meta_tensor, to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.model_executor.model_loader.reload.utils import get_layer_size
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform

from actors.checkpoint import StoredTensor, stored_tensors

LOAD_UNIT_BYTES = 4 << 20
PACKED = "cpu_linear"  # the attribute in which vLLM keeps the function that holds a layer's packed weights
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
PACKING_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


class Preparation:
    """One version on its way into the model: `work` until it returns the hash, then `switch`, then `release`."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        """`path`: a safetensors file that was checked against the model. It is mapped only while `work` loads."""
        self._path = path
        self._shadow, self._pairs = _shadow(model, materialize_meta_tensor)
        self._unpacked = [new for _, new in self._pairs if _packs(new)]
        self._num_loaded = dict.fromkeys(self._unpacked, 0)  # elements, by layer
        for layer in self._unpacked:
            for parameter in _parameters(layer).values():
                parameter.weight_loader = self._counted(layer, parameter)  # type: ignore[attr-defined]
        self._packed: dict[int, Any] = {}  # by the identity of an embedding's weights, which packing leaves in place
        self._hasher = xxhash.xxh3_128()
        self._units = self._run()
        self._retired: list[Any] = []

    @torch.no_grad()
    def work(self, budget_s: float) -> str | None:
        """Go on for about this long, at least by one unit; once all is done, the hash of the bytes that were taken."""
        deadline = time.monotonic() + budget_s
        for _ in self._units:
            if time.monotonic() >= deadline:
                return None
        return self._hasher.hexdigest()

    @torch.no_grad()
    def switch(self) -> None:
        """Serve the prepared weights. Only while sampling is paused; a failure leaves a mixture of two versions."""
        for live, new in self._pairs:
            packs = _packs(live)
            serving = _parameters(live)
            for name, parameter in _parameters(new).items():
                if packs:
                    # The Parameter object stays, because tied layers share it.
                    self._retired.append(serving[name].data)
                    serving[name].data = parameter.data
                else:
                    serving[name].copy_(parameter)  # small, and something else may look at the same memory
            if packs:
                self._retired.append(live.__dict__.get(PACKED))
                live.__dict__[PACKED] = new.__dict__[PACKED]
        self._forget()

    def release(self, budget_s: float) -> bool:
        """Free the weights that were replaced, for about this long; whether all are gone."""
        deadline = time.monotonic() + budget_s
        while self._retired and time.monotonic() < deadline:
            self._retired.pop()
        if not self._retired:
            _return_freed_memory()
        return not self._retired

    def close(self) -> None:
        """Give up what is not yet served, the map of the file included. Idempotent."""
        self._units.close()
        self._forget()

    def _forget(self) -> None:
        for _, new in self._pairs:
            # Layers and loaders refer to each other: without this, memory would wait for the garbage collector.
            new._parameters.clear()
            new.__dict__.pop(PACKED, None)
        self._shadow = None
        for collection in (self._pairs, self._unpacked, self._num_loaded, self._packed):
            collection.clear()

    def _run(self) -> Generator[None, None, None]:
        """Load the file's tensors in their order, hash what is taken, pack each layer once it is whole."""
        with self._path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        batch: list[tuple[str, torch.Tensor]] = []
        num_bytes = 0
        for stored in stored_tensors(self._path):
            batch.append((stored.name, _view(mapped, stored)))
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

    def _counted(self, layer: nn.Module, parameter: torch.Tensor) -> Callable[..., Any]:
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        signature = inspect.signature(loader)

        def load(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            num_loaded, result = get_numel_loaded(loader, bound)
            self._num_loaded[layer] += num_loaded
            return result

        return load

    def _pack(self, whole: Callable[[nn.Module], bool]) -> Generator[None, None, None]:
        for layer in [layer for layer in self._unpacked if whole(layer)]:
            self._unpacked.remove(layer)
            key = id(layer._parameters["weight"])
            embedding = isinstance(layer.quant_method, UnquantizedEmbeddingMethod)
            if embedding and key in self._packed:
                # A tied head has the embedding's weights, so one packed copy serves both.
                layer.__dict__[PACKED] = self._packed[key]
                continue
            _process(layer)
            if embedding:
                self._packed[key] = layer.__dict__[PACKED]
            yield


def obstacle(model: nn.Module, config: VllmConfig, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why weights cannot be prepared ahead of the pause for this model, as a clause, or None where they can.

    shapes: of the model's tensors as in its Hugging Face state dict. Nothing is allocated or changed: a version is
    rehearsed on tensors without memory.
    """
    if not current_platform.is_cpu():
        return "the device is not a CPU, and only the layers of vLLM's CPU build are known to be switched safely"
    if config.compilation_config.mode != CompilationMode.NONE:
        return "the model is compiled, so that its layers may be held elsewhere"
    if config.quant_config is not None or config.lora_config is not None or config.speculative_config is not None:
        return "the model is quantized, has adapters or a draft model"
    if callable(getattr(model, "process_weights_after_loading", None)):
        return f"{type(model).__name__} processes its weights as a whole"
    for name, module in model.named_modules():
        if reason := _module_obstacle(module):
            return f"{name} ({type(module).__name__}) {reason}"
    shadow, _ = _shadow(model, lambda tensor: tensor)
    dtype = config.model_config.dtype
    empty = [(name, torch.empty(shape, dtype=dtype, device="meta")) for name, shape in shapes.items()]
    try:
        loaded = shadow.load_weights(empty)
    except Exception as error:  # noqa: BLE001  any model may come here, and what it dislikes is the answer
        return f"its loader needs more than names and shapes ({type(error).__name__}: {error})"
    wanted = {name for name, _ in shadow.named_parameters()}
    if loaded is None or set(loaded) != wanted:
        return f"its loader does not fill exactly the model's parameters ({sorted(set(loaded or ()) ^ wanted)[:3]})"
    return None


def _module_obstacle(module: nn.Module) -> str | None:
    method = getattr(module, "quant_method", None)
    recorded, _ = get_layerwise_info(module).restore_metadata
    present = _parameters(module).keys() - {"bias"}  # of a bias vLLM records nothing: it is never packed
    if recorded.keys() - {"bias"} != present:
        return "has other parameters than when it was loaded"
    if type(method) in PACKING_METHODS:
        return None if recorded["weight"].ndim == 2 else "has weights that are no matrix"
    if not present:
        return (
            None
            if not callable(getattr(module, "process_weights_after_loading", None)) or type(module) is Attention
            else "derives tensors from the weights of other layers"
        )
    if method is not None or callable(getattr(module, "process_weights_after_loading", None)):
        return f"is processed after loading by {type(method or module).__name__}"
    return None


def _shadow(
    model: nn.Module, allocate: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[Any, list[tuple[nn.Module, nn.Module]]]:
    """A tree like the model's in the state before loading, and the pairs (live, shadow) of modules with parameters.

    allocate: makes of a parameter without memory the one that is loaded into. What is shared in the model (tied
    weights, a module in two places) is shared here.
    """
    modules: dict[int, nn.Module] = {}
    parameters: dict[int, torch.Tensor] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def module_like(live: nn.Module) -> nn.Module:
        if id(live) in modules:
            return modules[id(live)]
        new = modules[id(live)] = live.__class__.__new__(live.__class__)
        own = {"_parameters": {}, "_modules": {}, "_buffers": {k: _copy(v) for k, v in live._buffers.items()}}
        new.__dict__.update(live.__dict__, **own)
        recorded, _ = get_layerwise_info(live).restore_metadata
        for name, parameter in live._parameters.items():
            if parameter is not None and id(parameter) not in parameters:
                empty = to_meta_tensor(recorded.get(name, parameter))
                parameters[id(parameter)] = _own_loader(allocate(empty), live, new)
            new._parameters[name] = None if parameter is None else parameters[id(parameter)]  # type: ignore[assignment]
        for name, child in live._modules.items():
            new._modules[name] = None if child is None else module_like(child)
        if _parameters(live):
            pairs.append((live, new))
        return new

    root = module_like(model)
    modules.clear()  # a function that calls itself lives until the garbage collector comes, with all it knows
    parameters.clear()
    return root, pairs


def _copy(buffer: torch.Tensor | None) -> torch.Tensor | None:
    """Small buffers (scales) might be loaded into; the large ones (rotary tables) never are."""
    return buffer.clone() if buffer is not None and buffer.numel() <= 1024 else buffer


def _own_loader(parameter: torch.Tensor, live: nn.Module, new: nn.Module) -> torch.Tensor:
    """Bind what the parameter knows of its layer to the shadow's layer, without the hooks of an earlier reload."""
    for key, value in parameter.__dict__.items():
        while getattr(value, "__name__", "") == "online_process_loader":
            value = value.__wrapped__
        if isinstance(value, MethodType) and value.__self__ is live:
            value = value.__func__.__get__(new)
        parameter.__dict__[key] = value
    restore_layer_refs(parameter, new)
    return parameter


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
    """Give what was freed back to the system; the allocators would keep a copy of the model for the next adoption."""
    process = ctypes.CDLL(None)
    if hasattr(process, "MallocExtension_ReleaseFreeMemory"):  # tcmalloc is preloaded
        process.MallocExtension_ReleaseFreeMemory()
    elif hasattr(process, "malloc_trim"):
        process.malloc_trim(0)


def _packs(module: nn.Module) -> bool:
    return isinstance(getattr(module, "quant_method", None), PACKING_METHODS)


def _parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def _view(mapped: mmap.mmap, stored: StoredTensor) -> torch.Tensor:
    if not stored.num_bytes:
        return torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
    flat = torch.frombuffer(mapped, dtype=TORCH_DTYPES[stored.dtype], count=stored.num_elements, offset=stored.offset)
    return flat.reshape(stored.shape)
