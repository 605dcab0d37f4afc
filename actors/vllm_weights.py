"""The part of weight adoption that runs in vLLM's worker: what the engine asks of it, and the reload in the pause.

vLLM imports this module in the worker (`worker_extension_cls`). There it adds the calls that prepare a version beside
the one being served (`vllm_prepack.py`), and it registers a weight-transfer backend whose "transfer" is mapping a local
file, which reloads the live model where nothing can be prepared. It never validates: what reaches it has been checked
against the model in `checkpoint.py`, because a reload that fails half-way leaves nothing to serve. Also ties the
worker's life to its parent's, so that a killed actor leaves no engine behind.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from actors.vllm_prepack import Preparation, obstacle

BACKEND = "ergon_file"


@dataclass
class FileInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on beforehand."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """path: a safetensors file with all of the model's tensors, named as in its Hugging Face state dict."""

    path: str


class FileWeightTransferEngine(WeightTransferEngine):  # type: ignore[misc]
    """Loads a whole snapshot layer by layer into the tensors being served, repacking what kernels keep packed."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        """Put every layer into the state in which it accepts checkpoint tensors."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Load the tensors of the file; each layer is processed as soon as it is complete."""
        self.model.load_weights(_tensors(update_info.path))

    def finish_weight_update(self) -> None:
        """Process what is left (attention, tied head)."""
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu() and getattr(self.model_config.hf_text_config, "tie_word_embeddings", False):
            # A tied head shares the embedding's tensor, so no tensor of its own was loaded and its copy packed for
            # the CPU kernels still holds the previous weights.
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class WorkerExtension:
    """Mixed into vLLM's worker class; `AsyncLLM.collective_rpc` calls these by name, between two engine steps."""

    vllm_config: Any  # the worker's own
    model_runner: Any
    preparation: Preparation | None = None
    prepared_digest: str | None = None
    served_digest: str | None = None

    def obstacle_to_preparing(self, shapes: dict[str, list[int]]) -> str | None:
        """See vllm_prepack.obstacle."""
        with set_current_vllm_config(self.vllm_config):
            named = {name: tuple(shape) for name, shape in shapes.items()}
            return obstacle(self.model_runner.get_model(), self.vllm_config, named)

    def begin_preparing(self, path: str) -> None:
        """Start on the version in this file; gives up one that was begun and not switched to."""
        self.give_up_preparing()
        with set_current_vllm_config(self.vllm_config):
            self.preparation = Preparation(self.model_runner.get_model(), Path(path))

    def go_on_preparing(self, budget_s: float) -> str | None:
        """Work for about `budget_s` seconds; None while there is more to do, then the hash of what was taken."""
        assert self.preparation is not None
        with set_current_vllm_config(self.vllm_config):
            self.prepared_digest = self.preparation.work(budget_s)
        return self.prepared_digest

    def give_up_preparing(self) -> None:
        """Forget what was prepared. Idempotent."""
        if self.preparation is not None:
            self.preparation.close()
        self.preparation = self.prepared_digest = None

    def switch_to_prepared(self) -> None:
        """Serve what was prepared; only while sampling is paused."""
        assert self.preparation is not None
        assert self.prepared_digest is not None
        self.preparation.switch()
        self.served_digest = self.prepared_digest

    def release_replaced(self, budget_s: float) -> bool:
        """Free what was served before, for about `budget_s` seconds; whether nothing of it is left."""
        if self.preparation is None or self.preparation.release(budget_s):
            self.give_up_preparing()
        return self.preparation is None

    def checksum_served(self) -> str | None:
        """The hash of the bytes that the weights being served were made from; None before the first switch."""
        return self.served_digest


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118  the handle is no mapping
            yield name, file.get_tensor(name)


def _follow_parent() -> None:
    """End this worker when the process that spawned it dies; leave Ctrl-C to that process, which drains first."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="follow-parent", daemon=True).start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransferEngine)
_follow_parent()
