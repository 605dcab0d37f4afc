"""The settings, and a DeepSpeed JSON of the user's, as one DeepSpeed configuration. Owns which keys are Ergon's.

Ergon counts micro-batches, passes the learning rate and clips by its own settings, so it must own those keys: a JSON
that says something else about them is refused, with a sentence that names the key. Everything else of it is passed on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broker.process.learner_settings import LearnerSection
from broker.process.lifecycle import ErgonError

# Where a key of the JSON is decided instead. What is not listed is fixed by how the engine works.
_SETTINGS = {
    "gradient_clipping": "learner.clip_grad_norm",
    "bf16.enabled": "learner.dtype",
    "zero_optimization.stage": "learner.zero_stage",
    "zero_optimization.offload_optimizer.device": "learner.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "learner.offload_path",
    "zero_optimization.offload_param.device": "learner.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "learner.offload_path",
    "optimizer.params.lr": "learner.learning_rate",
    "optimizer.params.betas": "learner.betas",
    "optimizer.params.weight_decay": "learner.weight_decay",
}
_REFUSED = {
    "scheduler": "the trainer passes the rate of every step; set learner.learning_rate_schedule",
    "train_batch_size": "the trainer decides what a batch is; set learner.groups_per_step and learner.group_size",
    "fp16": "set learner.dtype",
    "amp": "set learner.dtype",
    "torch_autocast": "set learner.dtype",
    "activation_checkpointing": "the model's own is used; set learner.activation_checkpointing",
    "elasticity": "a run has a fixed number of ranks",
    "curriculum_learning": "Ergon's curriculum chooses the tasks",
    "data_efficiency": "Ergon's curriculum chooses the tasks",
    "sequence_parallel_size": "the engine runs data-parallel ranks only",
    "tensor_parallel": "the engine runs data-parallel ranks only",
}
AUTO = "auto"  # in a JSON written for the transformers library: to be filled in by whoever runs it


def deepspeed_config(section: LearnerSection) -> dict[str, Any]:
    """The whole configuration of these settings. Raises ErgonError for a JSON that cannot be used."""
    owned = _owned(section)
    if not section.deepspeed_config:
        return owned
    path = Path(section.deepspeed_config)
    return merged(_read(path), owned, f"learner.deepspeed_config {str(path)!r}")


def _owned(section: LearnerSection) -> dict[str, Any]:
    bf16 = section.dtype == "bfloat16"
    # Without ZeRO, DeepSpeed's float32 path takes the step whatever the gradient is; stage 1 checks first.
    stage = section.zero_stage if bf16 else max(1, section.zero_stage)
    params = {
        "lr": section.learning_rate,
        "betas": list(section.betas),
        "weight_decay": section.weight_decay,
        "torch_adam": True,  # no op to compile
        "fused": True,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": section.clip_grad_norm,
        "optimizer": {"type": "AdamW", "params": params},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if stage else {}),
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, **_offload(section)},
        "steps_per_print": 10**9,
    }


def _offload(section: LearnerSection) -> dict[str, Any]:
    """Where the optimiser's state and the parameters live when they are not needed."""
    if section.offload_parameters != "none" and section.zero_stage != 3:
        raise ErgonError(
            f"learner.offload_parameters = {section.offload_parameters!r} needs learner.zero_stage = 3, which keeps "
            f"the weights in parts; it is {section.zero_stage}"
        )
    if section.offload_optimizer != "none" and section.zero_stage == 0:
        raise ErgonError(
            f"learner.offload_optimizer = {section.offload_optimizer!r} needs learner.zero_stage 1, 2 or 3; it is 0"
        )
    offload: dict[str, Any] = {}
    wanted = {"offload_optimizer": section.offload_optimizer, "offload_param": section.offload_parameters}
    for key, device in wanted.items():
        if device == "none":
            continue
        offload[key] = {"device": device, **({"nvme_path": section.offload_path} if device == "nvme" else {})}
    return offload


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ErgonError(
            f"learner.deepspeed_config {str(path)!r} cannot be read ({error.strerror}); name a DeepSpeed JSON file"
        ) from error
    except ValueError as error:
        raise ErgonError(f"learner.deepspeed_config {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ErgonError(
            f"learner.deepspeed_config {str(path)!r} holds a {type(data).__name__}; a DeepSpeed JSON is an object"
        )
    return data


def merged(given: Mapping[str, Any], owned: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`owned` with what `given` adds to it. Keys that say "auto" count as absent.

    Raises ErgonError for a key of `given` that contradicts `owned` or that the engine cannot work with.
    """
    for key, instead in _REFUSED.items():
        value = given.get(key, AUTO)
        if value != AUTO and not _disabled(value):
            raise ErgonError(f"{source}: {key} = {_shown(value)} cannot be used; {instead}, and leave the key out")
    return _merge({key: value for key, value in given.items() if key not in _REFUSED}, owned, source, "")


def _merge(given: Mapping[str, Any], owned: Mapping[str, Any], source: str, prefix: str) -> dict[str, Any]:
    result = dict(owned)
    for key, value in given.items():
        name = prefix + key
        mine = owned.get(key)
        if value == AUTO:
            continue
        if isinstance(value, Mapping) and (mine is None or isinstance(mine, Mapping)):
            result[key] = _merge(value, mine or {}, source, f"{name}.")
        elif key not in owned:
            result[key] = value
        elif value != mine:
            setting = _SETTINGS.get(name)
            remedy = f"set {setting} and leave the key out" if setting else "leave the key out"
            raise ErgonError(f"{source}: {name} = {_shown(value)}, but Ergon needs {_shown(mine)}; {remedy}")
    return result


def _disabled(value: Any) -> bool:
    """A section that is switched off says nothing."""
    return isinstance(value, Mapping) and value.get("enabled") is False


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]
