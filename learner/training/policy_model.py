"""The model being trained: loaded from a Hugging Face directory, wrapped so that packed micro-batches go in and the
log-probs of their trained tokens come out. Owns no optimiser, no ranks and no loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import logging as transformers_logging

from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from learner.training import attention, lora
from learner.training.logprobs import selected_logprobs
from learner.training.packing import MicroBatch

transformers_logging.disable_progress_bar()  # noise in a log


class PackedPolicy(torch.nn.Module):
    """A causal language model that maps a packed micro-batch to the log-probs of its trained tokens."""

    def __init__(self, causal_lm: torch.nn.Module, temperature: float) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature

    def forward(self, micro: MicroBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 log-probs (differentiable) and entropies of the N trained tokens."""
        trees = [
            attention.TreeSpan(
                tree.start,
                tree.num_tokens,
                None if tree.mask_NN is None else torch.from_numpy(tree.mask_NN)[None, None].to(device),
            )
            for tree in micro.trees
        ]
        model: Any = self.causal_lm
        hidden_1PH = model.base_model(
            input_ids=torch.from_numpy(micro.token_ids_P)[None].to(device),
            position_ids=torch.from_numpy(micro.position_ids_P)[None].to(device),
            use_cache=False,
            packed_trees=trees,
        ).last_hidden_state
        rows_UH = hidden_1PH[0].index_select(0, torch.from_numpy(micro.rows_U).to(device))
        targets_U = torch.from_numpy(micro.targets_U).to(device)
        weight_VH = model.get_output_embeddings().weight
        logprobs_U, entropy_U = selected_logprobs(rows_UH, weight_VH, targets_U, self.temperature)
        index_N = torch.from_numpy(micro.index_N).to(device)
        return logprobs_U[index_N], entropy_U[index_N]


def load_policy(settings: Settings, config: Mapping[str, Any]) -> PackedPolicy:
    """The model of `model.path` in the learner's dtype, with adapters and checkpointing as the settings ask for.

    config: DeepSpeed's; with ZeRO-3 each rank makes and reads only its part of every weight. Raises ErgonError for a
    model that cannot be trained.
    """
    learner = settings.learner
    model = _load_causal_lm(settings.model.path, getattr(torch, learner.dtype), config)
    if learner.lora.rank:
        lora.add_adapters(model, learner.lora)
    if learner.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if learner.lora.rank:
            model.enable_input_require_grads()
    return PackedPolicy(model, settings.sampling.temperature)


def _load_causal_lm(path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Any:
    if not (Path(path) / "config.json").is_file():
        raise ErgonError(
            f"model.path is {path!r}, which is no Hugging Face model directory (no config.json); "
            "name a local directory with config.json, safetensors and tokenizer"
        )
    with _born_partitioned(config):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention.NAME)
    if config["zero_optimization"]["stage"] == 3:
        _restore_tables(model)
    head = model.get_output_embeddings()
    scaled = (
        getattr(model.config, "final_logit_softcapping", None) or getattr(model.config, "logits_scaling", 1.0) != 1.0
    )
    if head is None or head.bias is not None or scaled:
        raise ErgonError(
            f"model.path is {path!r}, whose {type(model).__name__} has an LM head with a bias, scaling or a soft cap; "
            "the learner trains plain linear heads (Llama, Qwen, SmolLM and the like)"
        )
    return model


@contextlib.contextmanager
def _born_partitioned(config: Mapping[str, Any]) -> Iterator[None]:
    """With ZeRO-3, let `from_pretrained` keep only this rank's part of what it loads."""
    if config["zero_optimization"]["stage"] != 3:
        yield
        return
    told = HfDeepSpeedConfig(dict(config))  # the library holds it weakly: it counts as long as this variable lives
    yield
    del told


def _restore_tables(model: Any) -> None:
    """Compute the model's tables (rotary frequencies) anew in float32: born under ZeRO-3 they were made in the weights'
    dtype, and in bf16 positions in the thousands would be off by whole radians."""
    for name, module in model.named_modules():
        tables = [key for key in module._non_persistent_buffers_set if module._buffers[key].is_floating_point()]
        if not tables:
            continue
        if not {"inv_freq", "original_inv_freq"}.issuperset(tables):
            raise ErgonError(
                f"{type(model).__name__} has tables ({name}: {', '.join(tables)}) that ZeRO-3 cannot load exactly; "
                "set learner.zero_stage to 2 or less"
            )
        for key in tables:
            module._buffers[key] = module._buffers[key].float()
        model._init_weights(module)
