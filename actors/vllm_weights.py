"""The part of weight adoption that runs in vLLM's worker: what the engine asks of it, and the reload in the pause.

vLLM imports this module in every worker (`worker_extension_cls`) and adds the calls that prepare a version beside the
one being served (`vllm_prepack.py`), and the one that reloads the live model, where nothing can be prepared or a switch
has failed. With tensor parallelism each worker reads the same file and its loaders take their shard. Never validates:
what reaches it has been checked against the model in `checkpoint.py`, because a reload that fails half-way leaves
nothing to serve. Also ties the worker's life to its parent's, so that a killed actor leaves no engine behind.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from pathlib import Path
from typing import Any, cast

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from actors.checkpoint import stored_tensors
from actors.vllm_prepack import Preparation, view_of
from actors.vllm_shadow import obstacle
from broker.protocol.hashes import Hasher


class WorkerExtension:
    """Mixed into vLLM's worker class; `AsyncLLM.collective_rpc` calls these by name, between two engine steps."""

    vllm_config: Any  # the worker's own
    model_config: Any
    model_runner: Any
    preparation: Preparation | None = None
    prepared_digest: str | None = None
    served_digest: str | None = None

    def obstacle_to_preparing(self, shapes: dict[str, list[int]]) -> str | None:
        """See vllm_shadow.obstacle."""
        with set_current_vllm_config(self.vllm_config):
            named = {name: tuple(shape) for name, shape in shapes.items()}
            return obstacle(self.model_runner.get_model(), self.vllm_config, named)

    def begin_preparing(self, path: str, budget_s: float) -> str | None:
        """Start on the version in this file, and go on; gives up one that was begun and not switched to."""
        self.give_up_preparing()
        with set_current_vllm_config(self.vllm_config):
            self.preparation = Preparation(self.model_runner.get_model(), Path(path))
        return self.go_on_preparing(budget_s)

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

    def switch_to_prepared(self) -> str:
        """Serve what was prepared; only while sampling is paused. The hash of what is served now."""
        assert self.preparation is not None
        assert self.prepared_digest is not None
        self.preparation.switch()
        self.served_digest = self.prepared_digest
        return self.served_digest

    def release_replaced(self, budget_s: float) -> bool:
        """Free what was served before, for about `budget_s` seconds; whether nothing of it is left."""
        if self.preparation is None or self.preparation.release(budget_s):
            self.give_up_preparing()
        return self.preparation is None

    def reload_whole(self, path: str) -> str:
        """Load the file layer by layer into the model being served, whatever state that is in, and pack it as vLLM
        does; only while sampling is paused. The hash of what is served now. A failure leaves nothing to serve."""
        self.give_up_preparing()
        model, hasher = self.model_runner.get_model(), Hasher()
        with (
            torch.no_grad(),
            set_current_vllm_config(self.vllm_config),
            Path(path).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped,
        ):
            initialize_layerwise_reload(model)
            for stored in stored_tensors(Path(path)):
                with memoryview(mapped) as whole, whole[stored.offset :][: stored.num_bytes] as taken:
                    hasher.update(taken)
            model.load_weights((stored.name, view_of(mapped, stored)) for stored in stored_tensors(Path(path)))
            finalize_layerwise_reload(model, self.model_config)
            self._pack_tied_head(model)
            if not current_platform.is_cpu():
                torch.accelerator.synchronize()  # the next step uses the new weights, and the file is unmapped
        self.served_digest = hasher.digest().hex()
        return self.served_digest

    def checksum_served(self) -> str | None:
        """The hash of the bytes that the weights being served were made from; None before the first adoption."""
        return self.served_digest

    def _pack_tied_head(self, model: torch.nn.Module) -> None:
        """A tied head shares the embedding's tensor, so no tensor of its own was loaded and its copy packed for the CPU
        kernels still holds the previous weights."""
        if current_platform.is_cpu() and getattr(self.model_config.hf_text_config, "tie_word_embeddings", False):
            for module in model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _follow_parent() -> None:
    """End this worker when the process that spawned it dies; leave Ctrl-C to that process, which drains first."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    watched, actor = [parent.sentinel], -1
    if parent.name != "MainProcess":
        # One of several workers: its parent is the engine's process, which imports nothing of ours, so that the workers
        # must tie it to the actor, too.
        actor = os.pidfd_open(_parent_of(cast("int", parent.pid)))
        watched.append(actor)

    def wait() -> None:
        if actor in multiprocessing.connection.wait(watched):
            with contextlib.suppress(ProcessLookupError):
                os.kill(cast("int", parent.pid), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="follow-parent", daemon=True).start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


_follow_parent()
