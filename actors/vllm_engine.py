"""The real Engine: vLLM's asynchronous engine, token ids in and out, weights changed while requests are in flight.

With `vllm_adoption.py`, and the files that vLLM imports in its workers (`vllm_weights.py`, `vllm_prepack.py`,
`vllm_shadow.py`), the only file that imports vllm, and only when an engine is started, because vLLM reads its
environment at import. What vLLM reports of each step is counted by `vllm_load.py`. Knows nothing of text, tickets or
the weight channel. CPU and GPU share this code; options that only make sense on a CPU are set only there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from actors.checkpoint import Shapes, checkpoint_shapes
from actors.engine import EngineDeadError, EngineLoad, FinishReason, Sample
from actors.turns import Turns
from actors.vllm_adoption import VllmAdoption, label, version_of
from actors.vllm_environment import environment, is_cpu_build, preloaded
from actors.vllm_load import LoadMeter
from broker.process.lifecycle import ErgonError
from broker.process.settings import ActorSection
from broker.protocol.trajectory import PolicyVersion, Sampling, VersionRun

logger = logging.getLogger(__name__)

WORKER_EXTENSION = "actors.vllm_weights.WorkerExtension"


class VllmEngine:
    """Implements actors.engine.Engine. Start it from the main thread, outside of the event loop, with `start`."""

    def __init__(self, llm: Any, meter: LoadMeter, shapes: Shapes, settings: ActorSection) -> None:
        self._llm = llm
        self._meter = meter
        self._turns = Turns()
        self._adoption = VllmAdoption(llm, shapes, settings, self._turns, self._die)
        self._dead: str | None = None

    @classmethod
    def start(cls, model: Path, settings: ActorSection, seed: int) -> VllmEngine:
        """Load the model and start the engine's process; takes 15 to 60 seconds.

        seed: of sampling; give every actor another one. Raises ErgonError for a model or settings that do not fit.
        """
        shapes = checkpoint_shapes(model)
        cpu = is_cpu_build()
        if settings.router_replay:
            raise refusal_of_router_replay(model, shapes, cpu)
        os.environ.update(environment(settings.threads, cpu, settings.tensor_parallel))
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        options: dict[str, Any] = (
            {"enforce_eager": True, "kv_cache_memory_bytes": settings.kv_cache_mb << 20} if cpu else {}
        )
        args = AsyncEngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            generation_config="vllm",  # the model's own sampling defaults would distort the behaviour policy
            dtype=settings.dtype,
            seed=seed,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            scheduling_policy="priority",
            block_size=settings.block_size,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            disable_log_stats=False,
            tensor_parallel_size=settings.tensor_parallel,
            worker_extension_cls=WORKER_EXTENSION,
            **options,
        )
        meter = LoadMeter(settings.max_num_seqs)
        try:
            with preloaded(cpu):
                llm = AsyncLLM.from_engine_args(args, stat_loggers=[meter])
        except ValueError as error:  # pydantic's ValidationError included: what vLLM says of unfit settings
            raise ErgonError(f"vLLM refused model.path = {model} with the settings of [actor]: {error}") from error
        return cls(llm, meter, shapes, settings)

    @property
    def policy_version(self) -> PolicyVersion:
        """The version being served; (0, 0) until one was adopted."""
        return self._adoption.version

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
        priority: int = 0,
    ) -> Sample:
        """See Engine. The request may outlive weight updates; `version_runs` says who sampled which tokens."""
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

        # Neither text nor end-of-sequence handling by the engine: what stops is exactly what the caller names.
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=max_tokens,
            stop_token_ids=list(stop_token_ids),
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with self._turns.turn():
            self.check()  # it may have died while this turn waited
            # The salt keeps prefixes computed by one version from being reused by another where the cache is kept.
            prompt = tokens_input(list(prompt_ids), cache_salt=label(self.policy_version))
            output = None
            try:
                async for request_output in self._llm.generate(prompt, params, request_id, priority=priority):
                    output = request_output.outputs[0]
            except VllmDeadError as error:
                raise self._die(f"its process ended during request {request_id}") from error
        if output is None or output.finish_reason not in ("stop", "length", "abort"):
            raise RuntimeError(f"request {request_id} ended with {getattr(output, 'finish_reason', None)!r}")
        return _sample(output)

    async def abort(self, request_id: str) -> None:
        """See Engine."""
        await self._llm.abort(request_id)

    @property
    def dead(self) -> str | None:
        """Why the engine serves no more, None while it does."""
        if self._dead is None and self._llm.errored:
            self._dead = "its process ended"
        return self._dead

    def check(self) -> None:
        """See Engine."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)

    def load(self) -> EngineLoad:
        """See Engine."""
        return dataclasses.replace(self._meter.load, num_unfinished=self._llm.get_num_unfinished_requests())

    async def adopt(self, version: PolicyVersion, weights: Path, digest: str) -> float:
        """See Engine and `vllm_adoption.py`."""
        self.check()
        return await self._adoption.adopt(version, weights, digest)

    async def checksum(self) -> str | None:
        """The hash, in hexadecimal, of the bytes from which the workers made the weights they serve.

        None before the first adoption.
        """
        return await self._adoption.checksum()

    async def close(self) -> None:
        """See Engine."""
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # else it takes the end of the process for an accident
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """`close` for where no event loop runs. Idempotent."""
        self._dead = self._dead or "it was closed"
        self._llm.shutdown()

    def _die(self, reason: str) -> EngineDeadError:
        self._dead = self._dead or reason
        logger.error("engine died reason=%r", self._dead)
        return EngineDeadError(self._dead)


def refusal_of_router_replay(model: Path, shapes: Shapes, cpu: bool) -> ErgonError:
    """Why the experts that each token was routed to are not recorded for this model on this engine.

    vLLM 0.32 gives them (`CompletionOutput.routed_experts`) from its second model runner only, which needs a GPU.
    """
    if not any(".experts." in name for name in shapes):
        reason = f"model.path = {model} has no experts among which tokens are routed"
    elif cpu:
        reason = "vLLM's CPU build does not tell which experts a token was routed to"
    else:
        reason = "trajectories do not carry the experts that vLLM tells of"
    return ErgonError(f"actor.router_replay = true cannot be had: {reason}; set it to false")


def _sample(output: Any) -> Sample:
    """vLLM's finished completion as a Sample; the label vLLM starts with stands for BASE_VERSION."""
    ids = list(output.token_ids)
    logprobs = [position[token].logprob for token, position in zip(ids, output.logprobs or (), strict=True)]
    runs = tuple(VersionRun(*version_of(span.version), span.end - span.start) for span in output.weight_versions or ())
    return Sample(
        np.asarray(ids, np.int32),
        np.asarray(logprobs, np.float32),
        tuple(run for run in runs if run.num_tokens),
        cast(FinishReason, output.finish_reason),
    )
