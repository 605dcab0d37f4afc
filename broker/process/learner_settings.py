"""What the learner can be told: the sections `[learner]` (with loss and warm start) and `[eval]`. Starts nothing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from broker.process.section import Section


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


class LossSection(Section):
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """The ratio's lower clip, 1 - clip_low."""
    clip_high: float = Field(default=0.28, ge=0)
    """The ratio's upper clip, 1 + clip_high (clip-higher)."""
    importance_cap: float = Field(default=2.0, gt=0)
    """Cap of the token-level truncated importance weight."""
    token_window: tuple[float, float] = (0.5, 5.0)
    """Tokens whose ratio lies outside are masked."""
    sequence_guard: tuple[float, float] = (0.5, 2.0)
    """Sequences whose geometric-mean ratio lies outside are masked."""
    drift_penalty: float = Field(default=1e-3, ge=0)
    """Weight of the squared log-ratio."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """The group's baseline."""


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
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the trained model's weights and activations; the master copy is float32 always."""
    zero_stage: Literal[0, 1, 2] = 1
    """DeepSpeed's ZeRO stage."""
    master_port: int = Field(default=7720, ge=1, le=65535)
    """Port of torch.distributed's rendezvous."""
    checkpoint_every: int = Field(default=4, ge=1)
    """Steps between checkpoints; trajectories are acknowledged with the checkpoint that contains their step."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest complete checkpoints kept."""
    loss: LossSection = LossSection()
    warm_start: WarmStartSection = WarmStartSection()


class EvalSection(Section):
    tasks: int = Field(default=96, ge=0)
    """Held-out tasks of the evaluations before, after the warm start and at the end; 0 for no evaluation."""
    every: int = Field(default=0, ge=0)
    """Steps between evaluations during training, which do not stop it; 0 for none."""
    during_tasks: int = Field(default=32, ge=1)
    """Held-out tasks of each evaluation during training."""
