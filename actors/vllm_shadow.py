"""The shadow: a second tree of the modules of the model that serves, with parameters of its own. Runs in vLLM's worker.

Owns what is shared between the two trees and what is not, and says for which models that can be known (`obstacle`).
Loads, packs and switches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.platforms import current_platform

PACKING_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


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
    shadow, _ = make_shadow(model, lambda tensor: tensor)
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
    present = parameters_of(module).keys() - {"bias"}  # of a bias vLLM records nothing: it is never packed
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


def make_shadow(
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
        if parameters_of(live):
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


def packs(module: nn.Module) -> bool:
    return isinstance(getattr(module, "quant_method", None), PACKING_METHODS)


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
