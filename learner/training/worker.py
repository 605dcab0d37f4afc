"""What every rank does: its part of a step, of a pass, of a checkpoint. The only user of DeepSpeed's engine.

Owns the model, the optimiser and the random state of one rank. Every method is collective unless it says otherwise: all
ranks call it in the same order, and all of them come to the same verdict. Knows nothing of who gives the orders.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import random
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Before deepspeed is imported: without this it probes for GPUs.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from pydantic import ValidationError

from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from learner.engine import TrainingError, TrainSequence
from learner.training.deepspeed_config import deepspeed_config
from learner.training.micro_batches import means_over_ranks, means_over_steps, padding, token_batch
from learner.training.packing import MicroBatch, pack
from learner.training.policy_model import load_policy
from learner.training.ranks import Ranks
from learner.training.reference import Reference
from learner.training.reshape import layout, universal
from learner.training.served import ServedWeights
from learner.training.shards import Shards
from learner.training.shares import Minibatch, Share
from learner.training.snapshot import SnapshotEngine, wait_written

logger = logging.getLogger(__name__)

# A shared-memory kernel that only inference uses; building it takes the better part of a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# Progress reports, and a function that DeepSpeed calls by its old name: noise in a log.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", r".*is deprecated. Please use", FutureWarning, r"torch\.distributed\..*")

_TAG = "engine"
_REFERENCE = "reference-rank{rank}.pt"


class Worker:
    """One rank of a trainer. Raises ErgonError for a model or a configuration that cannot be used."""

    def __init__(self, settings: Settings, ranks: Ranks) -> None:
        learner = settings.learner
        torch.set_num_threads(learner.threads)
        torch.manual_seed(settings.run.seed)
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False)  # the group is there
        self._ranks = ranks
        self._micro_batch_tokens = learner.micro_batch_tokens
        self.policy_version = 0
        config = deepspeed_config(learner)
        try:
            policy = load_policy(settings, config)
            with _quiet():
                engine, *_ = deepspeed.initialize(
                    model=policy,
                    model_parameters=[p for p in policy.parameters() if p.requires_grad],
                    config=config,
                    dist_init_required=False,
                )
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ErgonError(f"learner.deepspeed_config {learner.deepspeed_config!r}: {key}: {first['msg']}") from error
        self._engine: Any = engine
        self._snapshots = engine.checkpoint_engine = SnapshotEngine()
        self._device = torch.device(engine.device)
        self._reference = Reference(engine)
        self.served = ServedWeights(engine.module.causal_lm)
        self.shards = Shards(ranks.rank, ranks.world_size)
        engine.train()

    # --- steps

    def step(self, share: Share) -> dict[str, float]:
        """One optimiser step for each minibatch; the means of the loss's statistics over all ranks' tokens, and counts.

        Raises TrainingError where the first minibatch is refused, with the weights untouched. Where a later one is, the
        steps before it stay, and `num_refused_minibatches` tells how many were not taken.
        """
        batches = self._packed(share)
        self._fill_logprobs(batches, share)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = share.learning_rate
        results: list[dict[str, float]] = []
        for micros, minibatch in zip(batches, share.minibatches, strict=True):
            try:
                results.append(self._optimise(micros, minibatch, share))
            except TrainingError as error:
                if not results:
                    raise
                logger.error("minibatch refused number=%d error=%s", len(results), error)
                break
        return {**means_over_steps(results), "num_refused_minibatches": len(batches) - len(results)}

    def logprobs(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """float32 log-probs of the trained tokens of each of this rank's sequences, without a gradient."""
        found = [np.zeros(0, dtype=np.float32) for _ in sequences]
        micros = pack(sequences, self._micro_batch_tokens, [np.ones(len(s.token_ids_T), np.float32) for s in sequences])
        (padded,) = self._padded([micros])
        for micro, logprobs_N in zip(padded, self._pass(padded), strict=True):
            if micro is not None:
                for number, member in enumerate(micro.members):
                    found[member] = logprobs_N[micro.sequence_ids_N == number]
        return found

    def _packed(self, share: Share) -> list[list[MicroBatch | None]]:
        return self._padded([pack(m.sequences, self._micro_batch_tokens, m.weights) for m in share.minibatches])

    def _padded(self, batches: Sequence[Sequence[MicroBatch]]) -> list[list[MicroBatch | None]]:
        """As many micro-batches on every rank, because each is collective: None where a rank has nothing left."""
        counts = np.asarray(self._ranks.gather([len(micros) for micros in batches])).max(axis=0)
        return [[*micros, *[None] * (int(n) - len(micros))] for micros, n in zip(batches, counts, strict=True)]

    def _fill_logprobs(self, batches: list[list[MicroBatch | None]], share: Share) -> None:
        """What the objective compares the policy with, for every micro-batch that does not bring it along."""
        if share.objective.needs_reference:
            if not self._reference.taken:
                self._reference.take()
            with self._reference.swapped_in():
                self._fill(batches, "reference_logprobs_N")
        if share.objective.needs_proximal:  # of the first minibatch it is the policy itself: see token_batch
            self._fill(batches[1:], "proximal_logprobs_N")

    def _fill(self, batches: list[list[MicroBatch | None]], name: str) -> None:
        for micros in batches:
            given = all(micro is None or getattr(micro, name) is not None for micro in micros)
            if all(self._ranks.gather(given)):
                continue
            for i, logprobs_N in enumerate(self._pass(micros)):
                micro = micros[i]
                if micro is not None and getattr(micro, name) is None:
                    given_too: dict[str, Any] = {name: logprobs_N}
                    micros[i] = replace(micro, **given_too)

    def _pass(self, micros: Sequence[MicroBatch | None]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """The trained tokens' log-probs of every micro-batch, in the packed order, without a gradient."""
        self._engine.eval()
        try:
            with torch.no_grad():
                return [self._engine(micro or padding(), self._device)[0].cpu().numpy() for micro in micros]
        finally:
            self._engine.train()

    def _optimise(self, micros: Sequence[MicroBatch | None], minibatch: Minibatch, share: Share) -> dict[str, float]:
        """One optimiser step, exactly as if all ranks' sequences had been one forward pass."""
        sums: Counter[str] = Counter()
        problem: str | None = None
        means: dict[str, float] = {}
        for i, micro in enumerate(micros):
            last = i == len(micros) - 1
            loss, logprobs_N = self._loss(micro, share, sums)
            if last:
                means = self._means(sums, micros, minibatch)
                problem = self._problem(means, share)
            self._engine.set_gradient_accumulation_boundary(last)
            # DeepSpeed averages gradients over the ranks; the tokens' weights are shares of the sum over all of them.
            # A step that must not happen is given a gradient that is not a number: DeepSpeed then leaves everything be.
            # Not through the loss, which may mask every token: a masked one passes nothing on, not even that.
            self._engine.backward(logprobs_N.sum() * math.nan if problem else loss * self._ranks.world_size)
            self._engine.step()
        grad_norm = self._grad_norm()
        if problem is None and not math.isfinite(grad_norm):
            problem = f"the gradient norm is {grad_norm} at version {self.policy_version}"
        if problem is not None:
            raise TrainingError(problem)
        self.policy_version += 1
        return {**means, "grad_norm": grad_norm}

    def _loss(self, micro: MicroBatch | None, share: Share, sums: Counter[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """A micro-batch's loss and log-probs; its statistics are added to `sums`. Where there is no micro-batch, a zero
        with a graph: its forward and backward pass are the other ranks' collective calls."""
        logprobs_N, entropy_N = self._engine(micro or padding(), self._device)
        if micro is None:
            return logprobs_N.sum() * 0.0, logprobs_N
        loss, stats = share.objective(token_batch(micro, logprobs_N, entropy_N, self._device))
        sums.update({"loss": float(loss.detach()), **stats})
        return loss, logprobs_N

    def _means(
        self, sums: Mapping[str, float], micros: Sequence[MicroBatch | None], minibatch: Minibatch
    ) -> dict[str, float]:
        """Of all ranks: the loss, token means of the statistics, and counts. The same on every rank."""
        num_packed = sum(len(micro.token_ids_P) for micro in micros if micro is not None)
        of_ranks, packed = zip(*self._ranks.gather((dict(sums), num_packed)), strict=True)
        return means_over_ranks(of_ranks, packed, minibatch.num_tokens, len(micros))

    def _problem(self, means: Mapping[str, float], share: Share) -> str | None:
        """Why this step must not happen, or None. All ranks have the same means, so all come to the same verdict."""
        if not math.isfinite(means["loss"]):
            return f"the loss is {means['loss']} at version {self.policy_version}"
        return share.guard(means) if share.guard is not None else None

    def _grad_norm(self) -> float:
        norm = self._engine.get_global_grad_norm()
        if norm is None or norm < 0:  # DeepSpeed's mark of a norm that is not finite
            return math.inf
        return float(norm)

    # --- state

    def reset_optimizer(self) -> None:
        """Forget the optimiser's moments (not the weights)."""
        for state in self._engine.basic_optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    def snapshot(self, directory: Path, copying: bool) -> Callable[[], None]:
        """Copy what a checkpoint holds, or, where not `copying`, write it at once.

        Rank 0's returned function writes the copy and waits for the other ranks' files, from any thread; the others
        write theirs in a thread of their own.
        """
        client_state = {
            "ergon_policy_version": self.policy_version,
            "ergon_rng": {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()},
        }
        self._snapshots.copying = copying
        self._engine.save_checkpoint(str(directory), tag=_TAG, client_state=client_state, save_latest=False)
        if self._reference.taken:
            self._snapshots.save(self._reference.state(), str(self._reference_path(directory)))
        # Also the end of what was written at once: every rank is here.
        others = [path for paths in self._ranks.gather(self._snapshots.paths)[1:] for path in paths]
        if self._ranks.rank:
            threading.Thread(target=self._snapshots.write, name="checkpoint-write", daemon=True).start()

        def write() -> None:
            self._snapshots.write()
            wait_written(others)

        return write

    def load(self, directory: Path) -> None:
        """Restore what `snapshot` wrote, bit for bit, also where another number of ranks wrote it."""
        num_ranks, divided = layout(directory / _TAG)
        same = num_ranks == self._ranks.world_size
        if num_ranks and divided is not (self._engine.zero_optimization_stage() == 3):
            raise ErgonError(
                f"the checkpoint {directory} was written with ZeRO-{'3' if divided else '2 or less'}; set "
                "learner.zero_stage accordingly to resume from it"
            )
        with contextlib.ExitStack() as stack:
            if not same and num_ranks:
                source = stack.enter_context(universal(self._engine, self._ranks, directory, _TAG))
            else:
                source = directory
            with _quiet():
                path, client_state = self._engine.load_checkpoint(str(source), tag=_TAG)
        if path is None:
            raise ErgonError(f"the checkpoint {directory} holds no engine state; remove it to resume from an older one")
        self._load_reference(directory, same)
        self.policy_version = int(client_state["ergon_policy_version"])
        rng = client_state["ergon_rng"]
        torch.set_rng_state(rng["torch"])
        random.setstate(rng["python"])
        np.random.set_state(rng["numpy"])

    def close(self) -> None:
        """Give the engine's memory back."""
        self._engine.destroy()

    def _load_reference(self, directory: Path, same: bool) -> None:
        """The reference policy that the checkpoint may have. Whole weights are the same on every rank."""
        path = self._reference_path(directory)
        if not same and (first := path.with_name(_REFERENCE.format(rank=0))).exists():
            if self._engine.zero_optimization_stage() == 3:
                raise ErgonError(
                    f"the reference policy in {directory} is divided among other ranks than these; resume with the "
                    "number of ranks that it was saved with"
                )
            path = first
        self._reference.load(path)

    def _reference_path(self, directory: Path) -> Path:
        return directory / _REFERENCE.format(rank=self._ranks.rank)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's printed memory reports out of the terminal; what it logs or raises still shows."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def leave_group() -> None:
    """Leave the process group, DeepSpeed's own groups included: a later engine of this process makes new ones."""
    deepspeed.comm.destroy_process_group()
