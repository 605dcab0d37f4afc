"""The real Engine: vLLM's asynchronous engine, token ids in and out, weights changed while requests are in flight.

With `vllm_weights.py` and `vllm_prepack.py`, which vLLM imports in its worker, the only file that imports vllm, and
only when an engine is started, because vLLM reads its environment at import. Knows nothing of text, tickets or the
weight channel. CPU and GPU share this code; options that only make sense on a CPU are set only there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from actors.checkpoint import Shapes, check_fit, checkpoint_shapes
from actors.engine import AdoptionError, EngineDeadError, FinishReason, Sample
from actors.vllm_environment import environment, is_cpu_build, preloaded
from broker.process.lifecycle import ErgonError
from broker.process.settings import ActorSection
from broker.protocol.trajectory import PolicyVersion, Sampling, VersionRun

logger = logging.getLogger(__name__)

WORKER_EXTENSION = "actors.vllm_weights.WorkerExtension"
BACKEND = "ergon_file"  # as registered there
BASE_VERSION = PolicyVersion(0, 0)
UNIT_S = 0.025  # for how long, about, sampling waits for each of the many units of preparing and freeing weights


class VllmEngine:
    """Implements actors.engine.Engine. Start it from the main thread, outside of the event loop, with `start`."""

    def __init__(self, llm: Any, shapes: Shapes, adopt_mode: str) -> None:
        self._llm = llm
        self._shapes = shapes
        self._recompute = adopt_mode == "recompute"
        self._version = BASE_VERSION
        self._dead: str | None = None
        self._prepares: bool | None = None  # decided before the first adoption

    @classmethod
    def start(cls, model: Path, settings: ActorSection, seed: int) -> VllmEngine:
        """Load the model and start the engine's process; takes 15 to 60 seconds.

        seed: of sampling; give every actor another one. Raises ErgonError for a model or settings that do not fit.
        """
        shapes = checkpoint_shapes(model)
        cpu = is_cpu_build()
        os.environ.update(environment(settings.threads, cpu))
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
            max_num_seqs=settings.concurrency,
            block_size=settings.block_size,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            disable_log_stats=False,
            worker_extension_cls=WORKER_EXTENSION,
            weight_transfer_config={"backend": BACKEND},
            **options,
        )
        try:
            with preloaded(cpu):
                llm = AsyncLLM.from_engine_args(args)
        except ValueError as error:  # pydantic's ValidationError included: what vLLM says of unfit settings
            raise ErgonError(f"vLLM refused model.path = {model} with the settings of [actor]: {error}") from error
        return cls(llm, shapes, settings.adopt_mode)

    @property
    def policy_version(self) -> PolicyVersion:
        """The version being served; (0, 0) until one was adopted."""
        return self._version

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
    ) -> Sample:
        """See Engine. The request may outlive weight updates; `version_runs` says who sampled which tokens."""
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

        self.check()
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
        # The salt keeps prefixes computed by one version from being reused by another where adoption keeps the cache.
        prompt = tokens_input(list(prompt_ids), cache_salt=_label(self._version))
        output = None
        try:
            async for request_output in self._llm.generate(prompt, params, request_id):
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

    async def adopt(self, version: PolicyVersion, weights: Path) -> float:
        """See Engine. The pause lasts from the stop of sampling until it may go on.

        On a CPU everything but a change of pointers is done before, between the steps of the engine. Where that cannot
        be (on a GPU, where neither way was run, and for some models) the worker reloads the file in the pause. The file
        is not looked at after the return and may be rewritten then.
        """
        self.check()
        digest = await asyncio.to_thread(check_fit, self._shapes, weights)
        prepares = await self._can_prepare()
        if prepares:
            await self._prepare(weights, digest)
        started = time.perf_counter()
        try:
            await self._llm.pause_generation(mode="keep", clear_cache=self._recompute)
            await (self._ask("switch_to_prepared") if prepares else self._reload(weights))
            await self._llm.update_weight_version(_label(version))
            self._version = version
            await self._llm.resume_generation()
        # From the pause on there is no way back: the model may hold a mixture of two versions.
        except asyncio.CancelledError:
            self._die(f"adopting {_label(version)} was cancelled half-way")
            raise
        except Exception as error:
            raise self._die(f"adopting {_label(version)} failed: {type(error).__name__}: {error}") from error
        pause_s = time.perf_counter() - started
        if prepares:
            await self._release()
        return pause_s

    async def checksum(self) -> str | None:
        """XXH3-128, in hexadecimal, of the bytes from which the worker made the weights it serves.

        None before the first adoption and where nothing is prepared ahead of the pause.
        """
        return cast("str | None", (await self._ask("checksum_served"))[0])

    async def _can_prepare(self) -> bool:
        if self._prepares is None:
            shapes = {name: list(shape) for name, shape in self._shapes.items()}
            reasons = [reason for reason in await self._ask("obstacle_to_preparing", shapes) if reason is not None]
            self._prepares = not reasons
            if reasons:
                logger.warning("every adoption reloads the whole model while sampling pauses, because %s", reasons[0])
        return self._prepares

    async def _prepare(self, weights: Path, digest: str) -> None:
        """Make the workers ready to switch. Raises AdoptionError, and then nothing has changed, or EngineDeadError."""
        try:
            await self._ask("begin_preparing", str(weights))
            taken: list[str | None] = [None]
            while None in taken:
                taken = await self._ask("go_on_preparing", UNIT_S)
            if any(worker_digest != digest for worker_digest in taken):
                raise AdoptionError(
                    f"{weights.name} has the hash {digest}, but the engine read {taken}; fetch it again"
                )
        except BaseException as error:
            if isinstance(error, EngineDeadError):
                raise
            await asyncio.shield(self._ask("give_up_preparing"))
            if isinstance(error, AdoptionError) or not isinstance(error, Exception):
                raise
            raise AdoptionError(f"the engine could not prepare {weights.name}: {error}") from error

    async def _release(self) -> None:
        """Let the workers free what was served before, a little between any two steps."""
        while not all(await self._ask("release_replaced", UNIT_S)):
            pass

    async def _reload(self, weights: Path) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"path": str(weights)}))
        await self._llm.finish_weight_update()

    async def _ask(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of vllm_weights.WorkerExtension in every worker, between two steps; their answers."""
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

        try:
            return cast("list[Any]", await self._llm.collective_rpc(method, args=arguments))
        except VllmDeadError as error:
            raise self._die(f"its process ended before it had answered {method}") from error

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


def _sample(output: Any) -> Sample:
    """vLLM's finished completion as a Sample; the label vLLM starts with stands for BASE_VERSION."""
    ids = list(output.token_ids)
    logprobs = [position[token].logprob for token, position in zip(ids, output.logprobs or (), strict=True)]
    runs = tuple(VersionRun(*_version(span.version), span.end - span.start) for span in output.weight_versions or ())
    return Sample(
        np.asarray(ids, np.int32),
        np.asarray(logprobs, np.float32),
        tuple(run for run in runs if run.num_tokens),
        cast(FinishReason, output.finish_reason),
    )


def _label(version: PolicyVersion) -> str:
    return f"{version.lineage}.{version.version}"


def _version(label: str) -> PolicyVersion:
    if label == "default":
        return BASE_VERSION
    lineage, _, version = label.partition(".")
    return PolicyVersion(int(lineage), int(version))
