"""The training engine on DeepSpeed: the only file that imports deepspeed. Owns the model, the optimiser and the process
group; owns no sockets of ours, so that several ranks can run it collectively.

bf16 weights with a float32 master copy, ZeRO 0-2, torch's fused AdamW. A step walks packed micro-batches and takes one
optimiser step, exactly as if the whole batch had been one forward pass.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import random
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Before deepspeed is imported: without these it probes for GPUs and starts compilers.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from learner.engine import LossFn, TokenBatch, TrainingError, TrainSequence
from learner.training import attention
from learner.training.logprobs import selected_logprobs
from learner.training.packing import MicroBatch, num_trained_tokens, pack

logger = logging.getLogger(__name__)

# A shared-memory kernel that only inference uses; building it takes the better part of a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# Progress reports: noise in a log.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
transformers_logging.disable_progress_bar()

_TAG = "engine"


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


class DeepSpeedEngine:
    """TrainEngine on DeepSpeed. One per process; collective where there are several ranks."""

    def __init__(self, settings: Settings) -> None:
        learner = settings.learner
        torch.set_num_threads(learner.threads)
        torch.manual_seed(settings.run.seed)
        self._micro_batch_tokens = learner.micro_batch_tokens
        self._policy_version = 0
        dtype = getattr(torch, learner.dtype)
        policy = PackedPolicy(_load_causal_lm(settings.model.path, dtype), settings.sampling.temperature)
        _init_process_group(learner.master_port)
        with _quiet():
            engine, *_ = deepspeed.initialize(model=policy, config=deepspeed_config(settings), dist_init_required=False)
        self._engine: Any = engine
        self._device = torch.device(engine.device)
        self._world_size = torch.distributed.get_world_size()
        engine.train()

    @property
    def policy_version(self) -> int:
        """Optimiser steps taken so far."""
        return self._policy_version

    @property
    def rank(self) -> int:
        """This process's rank; rank 0 alone talks to the other rooms."""
        return torch.distributed.get_rank()

    def step(self, sequences: Sequence[TrainSequence], loss: LossFn, learning_rate: float) -> Mapping[str, float]:
        """One optimiser step; returns token means of the loss's statistics, `loss`, `grad_norm` and token counts.

        Raises TrainingError, with the weights untouched, where there is no trained token, or loss or gradient norm is
        not finite.
        """
        num_tokens = num_trained_tokens(sequences)
        if num_tokens == 0:
            raise TrainingError("a batch without a single trained token has no gradient")
        micros = pack(sequences, self._micro_batch_tokens)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        sums: Counter[str] = Counter()
        for i, micro in enumerate(micros):
            self._engine.set_gradient_accumulation_boundary(i == len(micros) - 1)
            loss_sum, stats = loss(self._forward(micro))
            sums.update({"loss": float(loss_sum.detach()), **stats})
            if not math.isfinite(sums["loss"]):
                self._abandon(loss_sum)
                raise TrainingError(f"the loss is {sums['loss']} at version {self._policy_version}")
            # DeepSpeed averages gradients over the ranks; the denominator is the token count of all of them.
            self._engine.backward(loss_sum * (self._world_size / num_tokens))
            self._engine.step()
        grad_norm = self._grad_norm()
        if not math.isfinite(grad_norm):  # the optimiser saw it first and left the weights alone
            raise TrainingError(f"the gradient norm is {grad_norm} at version {self._policy_version}")
        self._policy_version += 1
        means = {name: total / num_tokens for name, total in sums.items()}
        num_packed = sum(len(micro.token_ids_P) for micro in micros)
        counts = {"num_trained_tokens": num_tokens, "num_packed_tokens": num_packed, "num_micro_batches": len(micros)}
        return {**means, **counts, "grad_norm": grad_norm}

    def logprobs(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """Log-probs of each micro-batch's trained tokens, in the packed order, without a gradient; for checks."""
        with torch.no_grad():
            return [
                self._forward(micro).logprobs_N.cpu().numpy() for micro in pack(sequences, self._micro_batch_tokens)
            ]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The state dict's tensors under their Hugging Face names, tied ones once; valid until the next step."""
        seen: set[int] = set()
        for name, tensor in self._causal_lm.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor.detach()

    def reset_optimizer(self) -> None:
        """Forget the optimiser's moments (not the weights): another objective begins."""
        optimizer = self._engine.basic_optimizer
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    def save(self, directory: Path) -> None:
        """Write weights, master copy, moments, counters and random states into an existing directory. Not atomic."""
        client_state = {
            "ergon_policy_version": self._policy_version,
            "ergon_rng": {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()},
        }
        self._engine.save_checkpoint(str(directory), tag=_TAG, client_state=client_state, save_latest=False)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, bit for bit, with the same number of ranks."""
        with _quiet():
            path, client_state = self._engine.load_checkpoint(str(directory), tag=_TAG)
        if path is None:
            raise ErgonError(f"the checkpoint {directory} holds no engine state; remove it to resume from an older one")
        self._policy_version = int(client_state["ergon_policy_version"])
        rng = client_state["ergon_rng"]
        torch.set_rng_state(rng["torch"])
        random.setstate(rng["python"])
        np.random.set_state(rng["numpy"])

    def close(self) -> None:
        """Release the process group."""
        self._engine.destroy()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @property
    def _causal_lm(self) -> torch.nn.Module:
        module: torch.nn.Module = self._engine.module.causal_lm
        return module

    def _forward(self, micro: MicroBatch) -> TokenBatch:
        logprobs_N, entropy_N = self._engine(micro, self._device)
        return TokenBatch(
            logprobs_N=logprobs_N,
            behaviour_logprobs_N=torch.from_numpy(micro.behaviour_logprobs_N).to(self._device),
            advantages_N=torch.from_numpy(micro.advantages_N).to(self._device),
            entropy_N=entropy_N,
            sequence_ids_N=torch.from_numpy(micro.sequence_ids_N).to(self._device),
        )

    def _abandon(self, loss_sum: torch.Tensor) -> None:
        """Throw the gradients gathered so far away, by DeepSpeed's own path for gradients that are not finite."""
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(loss_sum * math.nan)
        self._engine.step()

    def _grad_norm(self) -> float:
        norm = self._engine.get_global_grad_norm()
        if norm is None or norm < 0:  # DeepSpeed's mark of a norm that is not finite
            return math.inf
        return float(norm)


def deepspeed_config(settings: Settings) -> dict[str, Any]:
    """DeepSpeed's configuration for these settings. Micro-batches are counted by us, so its own counts are 1."""
    learner = settings.learner
    params = {
        "lr": learner.learning_rate,
        "betas": list(learner.betas),
        "weight_decay": learner.weight_decay,
        "torch_adam": True,  # no op to compile
        "fused": True,
    }
    # Without ZeRO, DeepSpeed's float32 path takes the step whatever the gradient is; stage 1 checks first.
    stage = learner.zero_stage if learner.dtype == "bfloat16" else max(1, learner.zero_stage)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": learner.clip_grad_norm,
        "optimizer": {"type": "AdamW", "params": params},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if stage else {}),
        "bf16": {"enabled": learner.dtype == "bfloat16"},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's printed memory reports out of the terminal; what it logs or raises still shows."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _load_causal_lm(path: str, dtype: torch.dtype) -> torch.nn.Module:
    if not (Path(path) / "config.json").is_file():
        raise ErgonError(
            f"model.path is {path!r}, which is no Hugging Face model directory (no config.json); "
            "name a local directory with config.json, safetensors and tokenizer"
        )
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention.NAME)
    head = model.get_output_embeddings()
    scaled = (
        getattr(model.config, "final_logit_softcapping", None) or getattr(model.config, "logits_scaling", 1.0) != 1.0
    )
    if head is None or head.bias is not None or scaled:
        raise ErgonError(
            f"model.path is {path!r}, whose {type(model).__name__} has an LM head with a bias, scaling or a soft cap; "
            "the learner trains plain linear heads (Llama, Qwen, SmolLM and the like)"
        )
    module: torch.nn.Module = model
    return module


def _init_process_group(master_port: int) -> None:
    """Join the process group that a launcher prepared, or be the only rank of a new one."""
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(master_port))
        _check_port(master_port)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False)


def _check_port(port: int) -> None:
    """Say in one sentence what torch.distributed would say in fifty lines."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ErgonError(
                f"learner.master_port {port} cannot be bound ({error.strerror}); set another one or stop its holder"
            ) from error
