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
    """New weights were refused before the switch; the engine goes on serving the old ones."""


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
    ) -> Sample:
        """Sample up to `max_tokens` tokens. Cancelling the awaiting task aborts the request in the engine.

        Raises EngineDeadError, and anything else where this request failed and others can still be served.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """End a request now; its `generate` returns the tokens so far, with finish "abort". Ignores unknown ids."""
        ...

    def check(self) -> None:
        """Raise EngineDeadError if the engine can serve no more requests; cheap, for periodic use."""
        ...

    async def adopt(self, version: PolicyVersion, weights: Path) -> float:
        """Switch to the verified weights in this safetensors file; returns the pause of sampling in seconds.

        The file may be rewritten once this has returned. Raises AdoptionError for whatever fails before the switch:
        names, dtypes or shapes that do not fit, bytes that changed meanwhile; after it EngineDeadError.
        """
        ...

    async def close(self) -> None:
        """Stop the engine and its processes."""
        ...
