"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft, put into the model in place, so that it stays what it was.

Owns which layers get adapters and what their merged weights are. Adapters are never published by themselves: what
leaves the learner are the merged weights, under the model's own names.
"""

from __future__ import annotations

from typing import Any

import torch

from broker.process.learner_settings import LoraSection
from broker.process.lifecycle import ErgonError

_ADAPTER = "default"
_ALL = "all-linear"


def add_adapters(model: Any, section: LoraSection) -> None:
    """Freeze the model's weights and add trainable adapters, in place. Raises ErgonError for targets that cannot be."""
    from peft import LoraConfig, inject_adapter_in_model  # seconds of imports that few runs need
    from peft.tuners.lora import Linear

    targets = _ALL if section.targets == (_ALL,) else list(section.targets)
    config = LoraConfig(
        r=section.rank, lora_alpha=section.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    try:
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ErgonError(
            f"learner.lora.targets = {list(section.targets)} fits no layer of {type(model).__name__}; "
            f"name linear layers such as q_proj and down_proj, or {_ALL}"
        ) from error
    wrong = [name for name, layer in model.named_modules() if _adapted(layer) and type(layer) is not Linear]
    if wrong or _adapted(model.get_output_embeddings()):
        raise ErgonError(
            f"learner.lora.targets = {list(section.targets)} names {wrong[0] if wrong else 'the LM head'}, which "
            f"cannot have an adapter here; name linear layers inside the model, or {_ALL}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name


def _adapted(layer: Any) -> bool:
    return hasattr(layer, "lora_A")


def adapted_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers with adapters, by the name that the layer has without them."""
    return {name: layer for name, layer in model.named_modules() if _adapted(layer)}


def parameters_of(layer: Any) -> tuple[torch.nn.Parameter, ...]:
    """What `merged_weight` is computed from."""
    return layer.base_layer.weight, layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def merged_weight(layer: Any) -> torch.Tensor:
    """The weight that does what layer and adapter do together; its parameters must be there (ZeRO-3)."""
    merged: torch.Tensor = layer.base_layer.weight.detach() + layer.get_delta_weight(_ADAPTER).detach()
    return merged
