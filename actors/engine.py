"""The Engine protocol: token ids in, token ids with log-probs and versions out, and transactional weight adoption.

`vllm_engine.py` is the real one; unit tests bring a scripted one. Nothing here imports torch or vllm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from broker.protocol.trajectory import PolicyVersion, Sampling, VersionRun

FinishReason = Literal["stop", "length", "abort"]


class EngineDeadError(Exception):
    """The engine can serve no more requests; the actor process must be restarted."""


class AdoptionError(Exception):
    """New weights do not fit the model and would be refused again; the engine goes on serving the old ones."""


class AdoptionFailedError(Exception):
    """Something failed before the switch; the engine goes on serving the old weights, and it may be tried again.

    damaged: the file was read and does not hold what it was said to hold, so it must be fetched again.
    """

    def __init__(self, message: str, *, damaged: bool = False) -> None:
        super().__init__(message)
        self.damaged = damaged


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What the engine sampled after a prompt: n token ids, their behaviour log-probs, and who sampled them.

    logprobs_N are natural logs after temperature. version_runs add up to n. `finish` is "stop" where the last token is
    a stop token (it is included in token_ids_N).
    """

    token_ids_N: npt.NDArray[np.int32]
    logprobs_N: npt.NDArray[np.float32]
    version_runs: tuple[VersionRun, ...]
    finish: FinishReason


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine has been. All but `num_unfinished` are totals since it started: what happened between two
    looks is their difference. What runs is a batch; what waits for a place in it, or for memory, is the queue."""

    num_unfinished: int = 0
    """Requests in the batch and in the queue."""
    num_steps: int = 0
    num_full_steps: int = 0
    """Steps with a full batch, or with requests in the queue."""
    cache_use_steps: float = 0.0
    """Share of the KV cache in use, 0 to 1, summed over the steps."""
    num_preemptions: int = 0
    num_turns: int = 0
    """Requests that have ended."""
    queue_s: float = 0.0
    """Seconds that those spent in the queue before their first step,"""
    sampling_s: float = 0.0
    """and from then on."""
    num_sampled: int = 0
    """Tokens."""
    num_prefix_tokens: int = 0
    """Prompt tokens looked up in the prefix cache."""
    num_prefix_hits: int = 0
    """Of those, tokens that were there."""


class Engine(Protocol):
    """An inference engine that can change its weights while requests are in flight."""

    @property
    def policy_version(self) -> PolicyVersion:
        """The version being served."""
        ...

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
        priority: int = 0,
    ) -> Sample:
        """Sample up to `max_tokens` tokens. Cancelling the awaiting task aborts the request in the engine.

        priority: orders the engine's queue, lowest first; where memory runs out, the highest is preempted.

        Raises EngineDeadError, and anything else where this request failed and others can still be served.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """End a request now; its `generate` returns the tokens so far, with finish "abort". Ignores unknown ids."""
        ...

    def check(self) -> None:
        """Raise EngineDeadError if the engine can serve no more requests; cheap, for periodic use."""
        ...

    def load(self) -> EngineLoad:
        """How busy it has been; cheap, for periodic use."""
        ...

    async def adopt(self, version: PolicyVersion, weights: Path, digest: str) -> float:
        """Switch to the verified weights in this safetensors file; returns the pause of sampling in seconds.

        digest: `total_hash` in hexadecimal, of the file's data; what the engine has read must have it. The file may be
        rewritten once this has returned or raised. Raises AdoptionError where names, dtypes or shapes do not fit, and
        AdoptionFailedError for whatever else fails before the switch. What fails after it is mended by loading the
        whole file again before sampling goes on; where that fails, too, EngineDeadError.
        """
        ...

    async def close(self) -> None:
        """Stop the engine and its processes."""
        ...
