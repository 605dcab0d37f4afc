"""Plain PyTorch as a trainer of the benchmark: AdamW on a float32 master copy, without DeepSpeed.

`PlainPacked` computes on our own packed layout with our own forward pass, so that DeepSpeed is all it differs in.
`PlainPadded` is what one writes first: one padded rectangle, the model's logits, log_softmax.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.engine import TokenBatch
from learner.losses.aggregation import token_weights
from learner.training import attention
from learner.training.packing import MicroBatch, pack
from learner.training.policy_model import PackedPolicy
from tests.bench.training.ours import our_loss
from tests.bench.training.recipe import (
    BETAS,
    CLIP_HIGH,
    CLIP_LOW,
    LEARNING_RATE,
    MAX_NORM,
    Gradient,
    Setup,
    Told,
    first_gradient,
    watched,
)
from tests.bench.training.workload import Padded, Sample, pad, train_sequences

CPU = torch.device("cpu")


class Master:
    """float32 copies of a model's weights, and the optimiser's step on them. Gradients are added up in float32 too."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._named = dict(model.named_parameters())
        self._weights = list(self._named.values())
        self._masters = [torch.nn.Parameter(weight.detach().float().clone()) for weight in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._masters, lr=LEARNING_RATE, betas=BETAS, eps=1e-8, weight_decay=0.0, fused=True
        )

    def gather(self) -> None:
        """Add the gradients of a micro-batch to those of the step."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight.grad is None:
                continue
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad.add_(weight.grad)
            weight.grad = None

    def step(self) -> float:
        """Clip, step, and write the weights; the gradient's norm before it was clipped."""
        norm = torch.nn.utils.clip_grad_norm_(self._masters, MAX_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for weight, master in zip(self._weights, self._masters, strict=True):
                weight.copy_(master)
        return float(norm)

    def gradient(self, names: list[str]) -> Gradient:
        """The gradients of the first step."""
        moments = {
            name: self._optimizer.state[master]["exp_avg"]
            for name, master in zip(self._named, self._masters, strict=True)
        }
        return {name: first_gradient(moments[name]) for name in names}


class _Plain(ABC):
    """A model, its master copy, and micro-batches whose losses are summed up."""

    def __init__(self, setup: Setup, attention_name: str) -> None:
        torch.set_num_threads(setup.threads)
        torch.manual_seed(0)
        self._setup = setup
        dtype = getattr(torch, setup.dtype)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            setup.model, dtype=dtype, attn_implementation=attention_name
        )
        self._model.train()
        self._master = Master(self._model)

    def step(self, samples: list[Sample]) -> Told:
        """One optimiser step."""
        total, num_processed, num_micro_batches = 0.0, 0, 0
        for loss, size in self._losses(samples):
            loss.backward()
            self._master.gather()
            total, num_processed, num_micro_batches = (
                total + float(loss.detach()),
                num_processed + size,
                num_micro_batches + 1,
            )
        return Told(total, self._master.step(), num_processed, num_micro_batches)

    def gradient(self) -> Gradient:
        """From the optimiser."""
        return self._master.gradient(watched(self._model.config.num_hidden_layers))

    @abstractmethod
    def _losses(self, samples: list[Sample]) -> Iterator[tuple[torch.Tensor, int]]:
        """Each micro-batch's loss and how many token positions it computes."""


class PlainPacked(_Plain):
    """On the learner's packed layout."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, attention.NAME)
        self._policy = PackedPolicy(self._model, 1.0)
        self._loss = our_loss()

    def _losses(self, samples: list[Sample]) -> Iterator[tuple[torch.Tensor, int]]:
        sequences = train_sequences(samples)
        weights = token_weights(sequences, self._loss.aggregation)
        for micro in pack(sequences, self._setup.tokens, weights):
            loss, _ = self._loss(self._forward(micro))
            yield loss, len(micro.token_ids_P)

    def _forward(self, micro: MicroBatch) -> TokenBatch:
        logprobs_N, entropy_N = self._policy(micro, CPU)
        return TokenBatch(
            logprobs_N=logprobs_N,
            behaviour_logprobs_N=torch.from_numpy(micro.behaviour_logprobs_N),
            advantages_N=torch.from_numpy(micro.advantages_N),
            weights_N=torch.from_numpy(micro.weights_N),
            entropy_N=entropy_N,
            sequence_ids_N=torch.from_numpy(micro.sequence_ids_N),
        )


class PlainPadded(_Plain):
    """On the rectangle, some rows at a time."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, "sdpa")
        self._pad_id = int(AutoTokenizer.from_pretrained(setup.model).eos_token_id)

    def _losses(self, samples: list[Sample]) -> Iterator[tuple[torch.Tensor, int]]:
        batch, rows = pad(samples, self._pad_id), self._setup.rows
        num_tokens = int(batch.loss_mask_BC.sum())
        for low in range(0, len(samples), rows):
            part = batch.rows(low, low + rows)
            yield self._loss_sum(part) / num_tokens, part.input_ids_BT.size

    def _loss_sum(self, part: Padded) -> torch.Tensor:
        input_ids_BT, num = torch.from_numpy(part.input_ids_BT), part.num_completion
        logits_BCV = self._model(
            input_ids=input_ids_BT,
            attention_mask=torch.from_numpy(part.attention_BT),
            use_cache=False,
            logits_to_keep=num + 1,
        ).logits[:, :-1]
        all_BCV = torch.log_softmax(logits_BCV.float(), dim=-1)
        logprobs_BC = all_BCV.gather(-1, input_ids_BT[:, -num:, None])[..., 0]
        ratio_BC = torch.exp(logprobs_BC - logprobs_BC.detach())
        advantages_B1 = torch.from_numpy(part.advantages_B)[:, None]
        clipped_BC = ratio_BC.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        per_token_BC = -torch.minimum(ratio_BC * advantages_B1, clipped_BC * advantages_B1)
        loss_sum: torch.Tensor = per_token_BC[torch.from_numpy(part.loss_mask_BC)].sum()
        return loss_sum
