"""TRL's GRPOTrainer as a trainer of the benchmark. Runs in TRL's own environment (`environment.py`).

Nothing of it is reached into: `GRPOTrainer.train` runs as for any user, its rollout function hands over the batch
instead of generating one, and a callback takes the time from the beginning of a step to its end, which is padding,
shuffling, micro-batches, clipping and the optimiser's step. Settings are those of a careful user: float32 weights under
bf16 autocast (TRL's default, and the same arithmetic as a master copy), no gradient checkpointing, fused AdamW.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.bench.training.recipe import (
    BETAS,
    CLIP_HIGH,
    CLIP_LOW,
    LEARNING_RATE,
    MAX_NORM,
    Gradient,
    Order,
    Setup,
    Told,
    first_gradient,
    watched,
)
from tests.bench.training.workload import Sample, pad

NEVER = 10**6  # steps; the orders end the training


def config(setup: Setup, order: Order, output: str) -> GRPOConfig:
    """TRL's settings for steps on such a batch."""
    batch = order.num_groups * order.group_size
    return GRPOConfig(
        output_dir=output,
        per_device_train_batch_size=setup.rows,
        gradient_accumulation_steps=batch // setup.rows,
        num_generations=order.group_size,
        max_steps=NEVER,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=0.0,
        max_grad_norm=MAX_NORM,
        optim="adamw_torch_fused",
        loss_type="dapo",
        epsilon=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        beta=0.0,
        scale_rewards="none",
        bf16=setup.dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=True,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )


class _Steps(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for us
    """Asks for an order where a step begins, and tells what it was where it has been logged."""

    def __init__(self, ask: Callable[[], Order], tell: Callable[[Told], None]) -> None:
        self._ask, self._tell = ask, tell
        self.samples: list[Sample] = []
        self.stop_clock: Callable[[], None] = lambda: None
        self._num_micro_batches = 0

    def on_step_begin(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        self.samples = self._ask().samples()

    def on_step_end(self, args: Any, _state: Any, _control: Any, **_: Any) -> None:
        self.stop_clock()
        self._num_micro_batches = args.gradient_accumulation_steps

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
        if "grad_norm" in logs:
            size = pad(self.samples, 0).input_ids_BT.size
            self._tell(Told(float(logs["loss"]), float(logs["grad_norm"]), size, self._num_micro_batches))


class TrlTraining:
    """`GRPOTrainer.train`, which asks for orders."""

    def __init__(
        self,
        setup: Setup,
        order: Order,
        ask: Callable[[], Order],
        tell: Callable[[Told], None],
        stop_clock: Callable[[], None],
    ) -> None:
        torch.set_num_threads(setup.threads)
        self._steps = _Steps(ask, tell)
        self._steps.stop_clock = stop_clock
        self._output = tempfile.TemporaryDirectory(prefix="ergon-bench-trl-")
        prompts = [{"prompt": f"{number}"} for number in range(64 * order.num_groups)]
        self._trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(setup.model),
            args=config(setup, order, self._output.name),
            train_dataset=Dataset.from_list(prompts),
            reward_funcs=_given_reward,
            rollout_func=self._rollout,
            callbacks=[self._steps],
        )

    def train(self) -> None:
        """Until `ask` raises."""
        self._trainer.train()

    def gradient(self) -> Gradient:
        """From the trainer's optimiser."""
        model: Any = self._trainer.model
        parameters = dict(model.named_parameters())
        optimizer: Any = self._trainer.optimizer
        state = optimizer.optimizer.state if hasattr(optimizer, "optimizer") else optimizer.state
        names = watched(model.config.num_hidden_layers)
        return {name: first_gradient(state[parameters[name]]["exp_avg"]) for name in names}

    def _rollout(self, prompts: list[str], _trainer: Any) -> dict[str, Any]:
        samples = self._steps.samples
        if len(prompts) != len(samples):
            raise RuntimeError(f"TRL asks for {len(prompts)} completions, the batch has {len(samples)}")
        return {
            "prompt_ids": [sample.prompt_P.tolist() for sample in samples],
            "completion_ids": [sample.completion_C.tolist() for sample in samples],
            "logprobs": None,
            "env_mask": [sample.sampled_C.astype(int).tolist() for sample in samples],
            "given_reward": [sample.reward for sample in samples],
        }


def _given_reward(completions: list[Any], given_reward: list[float], **_: Any) -> list[float]:
    return given_reward
