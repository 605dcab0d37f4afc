"""What the learner can be told: the sections `[learner]` (with loss and warm start) and `[eval]`. Starts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from broker.process.loss_settings import LossSection
from broker.process.section import Section
from broker.process.thinking_settings import Budget


class WarmStartSection(Section):
    episodes: int = Field(default=0, ge=0)
    """Demonstrations to imitate before reinforcement learning; 0 for none."""
    passes: int = Field(default=2, ge=1)
    """Passes over them."""
    batch: int = Field(default=8, ge=1)
    """Episodes in one supervised optimiser step."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Learning rate of the supervised steps."""
    learning_rate_warmup_steps: int = Field(default=3, ge=0)
    """First supervised steps over which the learning rate rises linearly."""
    decay: float = Field(default=1 / 3, ge=0, le=1)
    """Share of the supervised steps, the last ones, over which the learning rate falls linearly to zero."""
    min_reward: float | None = None
    """Only demonstrations with at least this reward are imitated; all completed ones where it is not set."""
    files: tuple[Path, ...] = ()
    """Recorded trajectories to imitate too: files, or directories of them (`*.msgpack`), as `learner.record` writes
    them."""
    checkpoint_every: int = Field(default=16, ge=1)
    """Supervised steps between checkpoints."""


class LoraSection(Section):
    rank: int = Field(default=0, ge=0)
    """Rank of low-rank adapters, which are trained instead of the weights (LoRA); 0 to train all weights. What is
    published are the merged weights, so actors need nothing."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers that get adapters (`q_proj`, `down_proj`, ...); `all-linear` for all but the head."""


class AlarmsSection(Section):
    effective_sample_size: float = Field(default=0.3, ge=0, le=1)
    """Alarm `effective_sample_size` where a step's effective sample size, as a share of its tokens, is below this."""
    grad_norm_factor: float = Field(default=5.0, gt=1)
    """Alarm `grad_norm` where the gradient's norm is this many times the median of the last 32 steps, from 8 on."""
    mismatch_kl: float = Field(default=0.1, gt=0)
    """Alarm `mismatch_kl` where the KL of the behaviour to the target policy, nats per token, is above this."""
    entropy_share: float = Field(default=0.1, ge=0, lt=1)
    """Alarm `entropy` where the mean entropy has fallen to this share of the median of the first 8 steps."""
    reward_share: float = Field(default=0.5, ge=0, lt=1)
    """Alarm `reward` where the running mean reward has fallen to this share of its highest value."""
    steps: int = Field(default=2, ge=1)
    """Steps in a row beyond its threshold that raise an alarm, and as many well within it that end it."""
    margin: float = Field(default=0.2, ge=0, lt=1)
    """How far within the threshold, as a share of it, a value must be to count towards the alarm's end."""
    collapse_sample_size: float = Field(default=0.01, ge=0, lt=1)
    """A batch whose effective sample size, as a share of its tokens, is below this is refused: no step is taken, and
    its trajectories go to the run's `quarantine`, as those of a batch whose loss is not finite do."""
    collapse_masked: float = Field(default=0.99, gt=0, le=1)
    """So is a batch of which the loss masks at least this share of the tokens."""


class CurriculumSection(Section):
    band: tuple[float, float] | None = None
    """Solve rates, 0 to 1, of tasks that are given again, the one that waited longest first; where it is not set, every
    task comes in order, once (or again from the first, where its environment's `num_tasks` says how many there are)."""
    explore: float = Field(default=0.25, ge=0, le=1)
    """Share of the groups that go on in order although there are tasks in the band."""
    smoothing: float = Field(default=0.5, gt=0, le=1)
    """Weight of a task's newest group in its running solve rate; 1 forgets all earlier ones."""
    memory: int = Field(default=4096, ge=1)
    """Tasks of each environment whose solve rates are remembered."""


class LearnerSection(Section):
    num_steps: int = Field(default=16, ge=1)
    """Optimiser steps of reinforcement learning."""
    groups_per_step: int = Field(default=8, ge=1)
    """Groups with a gradient (non-zero variance) that make a batch; groups without one are replaced by further ones."""
    max_groups_per_step: int = Field(default=16, ge=1)
    """Groups consumed at most before a step is taken with what there is."""
    max_skipped_batches: int = Field(default=10, ge=1)
    """Batches in a row without any gradient (no group had variance) after which training ends early."""
    group_size: int = Field(default=8, ge=2)
    """Episodes of one task that are compared with each other."""
    max_staleness: int = Field(default=8, ge=0)
    """Versions a token may be behind; bounds the tickets in flight, and masks what is older."""
    learning_rate: float = Field(default=3e-5, gt=0)
    """Learning rate of reinforcement learning."""
    learning_rate_warmup_steps: int = Field(default=2, ge=0)
    """First steps of reinforcement learning over which the learning rate rises linearly."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up, towards the last of num_steps."""
    learning_rate_final: float = Field(default=0.0, ge=0, le=1)
    """Share of learning_rate that `linear` and `cosine` end at."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    clip_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient's norm is clipped to this."""
    threads: int = Field(default=1, ge=1)
    """Threads of the trainer on a CPU."""
    micro_batch_tokens: int = Field(default=2048, ge=64)
    """Tokens packed into one micro-batch."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps that a batch is divided into, each a policy version, which max_staleness counts; what is
    published is the last one."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the trained model's weights and activations; the master copy is float32 always."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed's ZeRO stage: what the ranks share out among them, 1 the optimiser's state, 2 the gradients too, 3 the
    weights too."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO keeps the optimiser's state instead of on the GPU."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO-3 keeps the weights that no layer needs just now, instead of on the GPU."""
    offload_path: str = "/tmp"
    """Directory of a fast local disk, for what is kept on `nvme`."""
    activation_checkpointing: bool = False
    """Keep only the layers' inputs during the forward pass and compute the rest again: less memory, more time."""
    deepspeed_config: str = ""
    """A DeepSpeed JSON file whose further keys are passed on; what contradicts these settings is refused."""
    ranks: int = Field(default=1, ge=1)
    """Processes that train together, which `python -m learner` starts on this machine; under a launcher (torchrun,
    Kubernetes) the launcher's number counts instead."""
    rank_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds that a rank waits for the others before it gives up; longer than the slowest micro-batch and
    checkpoint."""
    master_port: int = Field(default=7720, ge=1, le=65535)
    """Port of torch.distributed's rendezvous."""
    checkpoint_every: int = Field(default=4, ge=1)
    """Steps between checkpoints; trajectories are acknowledged with the checkpoint that contains their step."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest complete checkpoints kept."""
    keep_best: bool = True
    """Keep the checkpoint of the best held-out evaluation too, and those whose evaluation is under way, 4 at most."""
    checkpoint_in_background: bool = True
    """Copy weights and optimiser state to host memory (14 bytes for each weight of a bfloat16 model, kept from one
    checkpoint to the next) and write them while training goes on; or else write first and go on then."""
    record: Literal["none", "passed", "all"] = "none"
    """Training episodes that are also written to `recorded` in the run's folder, for later warm starts: those with at
    least `eval.pass_reward`, or all that count."""
    keep_trajectories_mb: int = Field(default=64, ge=0)
    """MiB of trajectories kept in `trajectories` of the run's folder, for `ergon report` and `ergon view`: of training,
    evaluations and demonstrations. Beyond it whole groups are left out, at random and evenly over the run; the newest
    quarter is complete. One larger than a sixteenth of it is not kept. 0: none."""
    lora: LoraSection = LoraSection()
    loss: LossSection = LossSection()
    warm_start: WarmStartSection = WarmStartSection()
    alarms: AlarmsSection = AlarmsSection()


class EvalSection(Section):
    tasks: int = Field(default=96, ge=0)
    """Held-out tasks of the evaluations before, after the warm start and at the end; 0 for no evaluation."""
    every: int = Field(default=0, ge=0)
    """Steps between evaluations during training, which do not stop it; 0 for none."""
    during_tasks: int = Field(default=32, ge=1)
    """Held-out tasks of each evaluation during training."""
    budgets: tuple[Annotated[int, Field(ge=0)] | Literal["unlimited"], ...] = ()
    """Thinking budgets that every evaluation goes through, each with all tasks, as [0, 16, 64, "unlimited"]: held-out
    reward against budget, in `budgets.json` and `budgets.svg` of the run's folder. None given: no budget."""
    pass_reward: float = 1.0
    """Reward from which an episode counts as passed, in the pass rates; training does not use it."""

    @property
    def token_budgets(self) -> tuple[Budget, ...]:
        """`budgets` as tickets have them, in order; the one budget that is none where none is given."""
        return tuple(None if isinstance(budget, str) else budget for budget in self.budgets) or (None,)

    @field_validator("budgets")
    @classmethod
    def _check_budgets(cls, budgets: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if len(set(budgets)) < len(budgets):
            raise ValueError(f"budgets = {list(budgets)}; name each budget once")
        return tuple(sorted(budgets, key=lambda budget: float("inf") if isinstance(budget, str) else budget))
