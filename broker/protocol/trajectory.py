"""The nouns of the experience channel: ticket, trajectory, and what they are made of.

The wire carries facts (tokens, log-probs, rewards, versions), never opinions (advantages). Token-shaped data is numpy
and travels as raw frames; everything else is a frozen struct. A struct is checked where it enters, when it is decoded,
and by who sends it; not where it is constructed. `codec.py` turns both into messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

MAX_SEGMENTS = 1024  # of one trajectory

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Positive = Annotated[int, Meta(ge=1, lt=2**53)]
# Bounds that every finite number keeps: infinities and NaN are refused.
Finite = Annotated[float, Meta(ge=-1.7976931348623157e308, le=1.7976931348623157e308)]
Seconds = Annotated[float, Meta(ge=0.0, le=1.7976931348623157e308)]


class Facts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """Base of everything that crosses the wire: immutable, strictly typed, no unknown keys.

    gc=False: an immutable tree is in no cycle, and the collector need not walk a hundred thousand tickets."""


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

    lineage: Count
    version: Count


class TaskRef(Facts, frozen=True, kw_only=True):
    """One problem instance: which environment, which split, which index (the seed of procedural tasks)."""

    env: Name
    split: Name
    index: Count


class Sampling(Facts, frozen=True, kw_only=True):
    """How the policy is sampled during an episode. Temperature 0 means greedy. Token counts are of sampled tokens."""

    temperature: Annotated[float, Meta(ge=0.0, le=10.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    max_turn_tokens: Positive = 256
    max_episode_tokens: Positive = 2048
    max_turns: Positive = 8


class Ticket(Facts, frozen=True, kw_only=True):
    """A durable request to run one episode of one task. `ticket_id` is the idempotency key of all that follows.

    `deadline_s`: seconds an episode may take. `min_version`: the oldest policy that may sample it, as
    (lineage, version); an actor that serves an older one waits. `thinking_budget`: tokens, None for unlimited.
    """

    ticket_id: Name
    group_id: Name
    group_size: Positive
    task: TaskRef
    mode: Mode
    sampling: Sampling = Sampling()
    thinking_budget: Count | None = None
    min_version: PolicyVersion = PolicyVersion(0, 0)
    deadline_s: Annotated[float, Meta(gt=0.0, le=1.7976931348623157e308)] = 600.0
    attempt: Count = 0


class VersionRun(NamedTuple):
    """`num_tokens` consecutive sampled tokens that one policy sampled."""

    lineage: Count
    version: Count
    num_tokens: Positive


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


class Integrity(Facts, frozen=True, kw_only=True):
    """The verdict and the names of the detectors that fired."""

    verdict: Verdict = Verdict.CLEAN
    findings: tuple[str, ...] = ()


class TrajectoryHead(Facts, frozen=True, kw_only=True):
    """Everything of a trajectory except its tokens.

    `kind`: the environment's class of the task, for per-kind reports. `timings_s`: seconds by name, at least `total`,
    `model` and `tool`. `reward` is the total of the named `reward_components`' meaning, decided by the environment.
    `num_malformed`: turns whose tool calls could not be parsed.
    """

    ticket: Ticket
    kind: Annotated[str, Meta(max_length=256)] = ""
    outcome: Outcome
    reward: Finite
    reward_components: dict[str, Finite] = {}
    integrity: Integrity = Integrity()
    num_turns: Count
    num_tool_calls: Count = 0
    num_malformed: Count = 0
    timings_s: dict[str, Finite] = {}
    actor_id: Name
    finished_at: Seconds  # Unix time


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
