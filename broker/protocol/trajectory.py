"""The nouns of the experience channel: ticket, trajectory, and what they are made of.

The wire carries facts (tokens, log-probs, rewards, versions), never opinions (advantages). Token-shaped data is numpy
and travels as raw frames; everything else is a strict, frozen pydantic model, so that a wrong value is refused where it
enters. `codec.py` turns both into messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1, max_length=256)]


class Facts(BaseModel):
    """Base of everything that crosses the wire: immutable, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Mode(StrEnum):
    """What the trajectory is for. `reference` episodes are acted by the environment's reference policy."""

    TRAIN = "train"
    EVAL = "eval"
    REFERENCE = "reference"


class Outcome(StrEnum):
    """How an episode ended. Only `infra_failure` is retried; it never becomes a reward."""

    COMPLETED = "completed"
    TRUNCATED_TOKENS = "truncated_tokens"
    TRUNCATED_TURNS = "truncated_turns"
    TIMEOUT = "timeout"
    ENV_FAILURE = "env_failure"
    INFRA_FAILURE = "infra_failure"
    EXPLOIT = "exploit"


class PolicyVersion(NamedTuple):
    """A policy: `version` counts optimiser steps, `lineage` distinguishes histories after a resume.

    Ordered: a later lineage is newer than any version of an earlier one.
    """

    lineage: int
    version: int


class TaskRef(Facts):
    """One problem instance: which environment, which split, which index (the seed of procedural tasks)."""

    env: Name
    split: Name
    index: int = Field(ge=0)


class Sampling(Facts):
    """How the policy is sampled during an episode. Temperature 0 means greedy. Token counts are of sampled tokens."""

    temperature: float = Field(default=1.0, ge=0.0, le=10.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_turn_tokens: int = Field(default=256, ge=1)
    max_episode_tokens: int = Field(default=2048, ge=1)
    max_turns: int = Field(default=8, ge=1)


class Ticket(Facts):
    """A durable request to run one episode of one task. `ticket_id` is the idempotency key of all that follows.

    `deadline_s`: seconds an episode may take. `min_version`: the oldest policy that may sample it, as
    (lineage, version); an actor that serves an older one waits. `thinking_budget`: tokens, None for unlimited.
    """

    ticket_id: Name
    group_id: Name
    group_size: int = Field(ge=1)
    task: TaskRef
    mode: Mode = Field(strict=False)  # strict=False: the wire carries the enum's text
    sampling: Sampling = Sampling()
    thinking_budget: int | None = Field(default=None, ge=0)
    min_version: PolicyVersion = PolicyVersion(0, 0)
    deadline_s: float = Field(default=600.0, gt=0)
    attempt: int = Field(default=0, ge=0)


class VersionRun(NamedTuple):
    """`num_tokens` consecutive sampled tokens that one policy sampled."""

    lineage: int
    version: int
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One token trace of T tokens, prompt first, exactly as the engine saw and produced it.

    token_ids_T: int32. loss_mask_T: bool, True = sampled by the policy. logprobs_T: float32 natural-log probabilities
    under the behaviour policy, after temperature; 0 where the mask is False. version_runs: which policy sampled the
    masked tokens, in order; their counts add up to the mask's sum.
    """

    token_ids_T: npt.NDArray[np.int32]
    loss_mask_T: npt.NDArray[np.bool_]
    logprobs_T: npt.NDArray[np.float32]
    version_runs: tuple[VersionRun, ...]

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return sum(run.num_tokens for run in self.version_runs)


class Verdict(StrEnum):
    """What the integrity detectors say of a trajectory."""

    CLEAN = "clean"
    SCREENED = "screened"  # kept out of the gradient and counted


class Integrity(Facts):
    """The verdict and the names of the detectors that fired."""

    verdict: Verdict = Field(default=Verdict.CLEAN, strict=False)
    findings: tuple[str, ...] = Field(default=(), strict=False)


class TrajectoryHead(Facts):
    """Everything of a trajectory except its tokens.

    `kind`: the environment's class of the task, for per-kind reports. `timings_s`: seconds by name, at least `total`,
    `model` and `tool`. `reward` is the total of the named `reward_components`' meaning, decided by the environment.
    `num_malformed`: turns whose tool calls could not be parsed.
    """

    ticket: Ticket
    kind: str = Field(default="", max_length=256)
    outcome: Outcome = Field(strict=False)
    reward: float
    reward_components: dict[str, float] = Field(default_factory=dict)
    integrity: Integrity = Integrity()
    num_turns: int = Field(ge=0)
    num_tool_calls: int = Field(default=0, ge=0)
    num_malformed: int = Field(default=0, ge=0)
    timings_s: dict[str, float] = Field(default_factory=dict)
    actor_id: Name
    finished_at: float = Field(ge=0)  # Unix time, seconds


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """The record of one episode: its head and its token segments (one, unless a harness edited its history)."""

    head: TrajectoryHead
    segments: tuple[Segment, ...]

    @property
    def ticket(self) -> Ticket:
        """The ticket that this trajectory answers."""
        return self.head.ticket

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled, over all segments."""
        return sum(segment.num_sampled for segment in self.segments)
