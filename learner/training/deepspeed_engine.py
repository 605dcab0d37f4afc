"""The training engine on DeepSpeed as the trainer's loop sees it: rank 0's face of all ranks.

Owns the division of work: every method tells the other ranks and does rank 0's part itself. Where there is one rank,
that is all of it. Owns no sockets of ours; the model and the optimiser are the workers'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from broker.process.settings import Settings
from learner.engine import Guard, Objective, TrainingError, TrainSequence, WeightChanges, WeightSpec
from learner.training.balance import balanced
from learner.training.follower import CLOSE, follow
from learner.training.packing import num_trained_tokens
from learner.training.ranks import Ranks
from learner.training.shards import joined
from learner.training.shares import Share, divided
from learner.training.worker import Worker, leave_group


class DeepSpeedEngine:
    """TrainEngine on DeepSpeed. One per process, on every rank; ranks other than 0 only `follow`.

    ranks: the process group, if it was joined already; it is then not left at the end.
    """

    def __init__(self, settings: Settings, ranks: Ranks | None = None) -> None:
        learner = settings.learner
        self._ranks = ranks or Ranks(learner.master_port, learner.rank_timeout_s)
        self._leaves = ranks is None
        self._closed = False
        self._worker = Worker(settings, self._ranks)
        self._minibatches = learner.minibatches
        self._micro_batch_tokens = learner.micro_batch_tokens
        self._gathered: Mapping[str, torch.Tensor] = {}  # the bucket last read
        self._changed: Mapping[str, WeightChanges] = {}  # of the bucket last asked for
        self._changed_bucket: int | None = None
        self._marked = False
        self._bucket_of = {name: i for i, names in enumerate(self._worker.served.buckets) for name in names}

    @property
    def policy_version(self) -> int:
        """Optimiser steps taken so far."""
        return self._worker.policy_version

    @property
    def rank(self) -> int:
        """This process's rank; rank 0 alone talks to the other rooms."""
        return self._ranks.rank

    def follow(self) -> None:
        """On a rank other than 0: do what rank 0 asks for until it closes. Raises RuntimeError where it is gone."""
        follow(self._worker, self._ranks)

    def step(
        self, sequences: Sequence[TrainSequence], objective: Objective, learning_rate: float, guard: Guard | None = None
    ) -> Mapping[str, float]:
        """Optimiser steps over these sequences (`learner.minibatches` of them); returns token means of the objective's
        statistics, `loss`, `grad_norm` and counts.

        Raises TrainingError, with the weights untouched, where there is no trained token, where loss or gradient norm
        is not finite, or where `guard` refuses. With several minibatches, one that is refused later ends the call early
        and is counted in `num_refused_minibatches`.
        """
        self._forget_buckets()
        if num_trained_tokens(sequences) == 0:
            raise TrainingError("a batch without a single trained token has no gradient")
        parts = divided(
            sequences, objective.aggregation, self._minibatches, self._ranks.world_size, self._micro_batch_tokens
        )
        with self._ranks.told("step"):
            share = self._ranks.scatter([Share(part, objective, learning_rate, guard) for part in parts])
            return self._worker.step(share)

    def logprobs(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """float32 log-probs of each sequence's trained tokens, without a gradient."""
        parts = balanced([len(s.token_ids_T) for s in sequences], self._ranks.world_size)
        with self._ranks.told("logprobs"):
            mine = self._ranks.scatter([[sequences[i] for i in part] for part in parts])
            found = self._ranks.collect(self._worker.logprobs(mine))
        order = [i for part in parts for i in part]
        flat = [logprobs_N for of_rank in found for logprobs_N in of_rank]
        return [logprobs_N for _, logprobs_N in sorted(zip(order, flat, strict=True), key=lambda pair: pair[0])]

    def weight_layout(self) -> list[WeightSpec]:
        """What the engine that samples serves: the state dict's tensors under their Hugging Face names, tied ones once,
        adapters merged; in the order in which they are best read."""
        return self._worker.served.layout

    def read_weight(self, name: str) -> torch.Tensor:
        """One of them as it is now; valid until the next one is read, or the next step."""
        served = self._worker.served
        if not served.partitioned:
            return served.local(name)
        if name not in self._gathered:
            self._gathered = {}  # let go of the bucket before
            with self._ranks.told("gather", self._bucket_of[name]):
                self._gathered = served.gather(self._bucket_of[name], keep=True)
        return self._gathered[name]

    def changed_weight(self, name: str) -> WeightChanges | None:
        """ZeRO-3: what changed in it since `mark_published`, which counts as published from now on; only the changes
        travel between ranks. None where the whole must be read: without ZeRO-3, and where adapters are merged."""
        bucket = self._bucket_of.get(name)
        if bucket is None or not self._marked:
            return None
        if bucket != self._changed_bucket:
            with self._ranks.told("changes", bucket):
                parts = self._ranks.collect(self._worker.served.changes(bucket, self._worker.shards))
            self._changed = {changed: joined([part[changed] for part in parts]) for changed in parts[0]}
            self._changed_bucket = bucket
        return self._changed.get(name)

    def mark_published(self) -> None:
        """The weights as they are now are what is published."""
        self._forget_buckets()
        if self._worker.served.partitioned:
            with self._ranks.told("mark"):
                self._worker.served.mark(self._worker.shards)
            self._marked = True

    def _forget_buckets(self) -> None:
        self._gathered, self._changed, self._changed_bucket = {}, {}, None

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them, one after another, as they are now; each is valid until the next one is asked for."""
        self._gathered = {}
        for spec in self.weight_layout():
            yield spec.name, self.read_weight(spec.name)
        self._gathered = {}

    def reset_optimizer(self) -> None:
        """Forget the optimiser's moments (not the weights): another objective begins."""
        with self._ranks.told("reset"):
            self._worker.reset_optimizer()

    def save(self, directory: Path) -> None:
        """Write weights, master copy, moments, counters and random states into an existing directory. Not atomic."""
        self._snapshot(directory, copying=False)()

    def snapshot(self, directory: Path) -> Callable[[], None]:
        """Copy what `save` would write; the returned function writes it, from any thread, while training goes on."""
        return self._snapshot(directory, copying=True)

    def _snapshot(self, directory: Path, *, copying: bool) -> Callable[[], None]:
        with self._ranks.told("snapshot", directory, copying):
            return self._worker.snapshot(directory, copying)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, bit for bit, with the same number of ranks."""
        self._forget_buckets()
        self._marked = False
        with self._ranks.told("load", directory):
            self._worker.load(directory)

    def close(self) -> None:
        """End the other ranks' following and leave the process group. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._ranks.rank == 0:
            with self._ranks.told(CLOSE):
                pass
        self._worker.close()
        if self._leaves:
            self._ranks.close(leave_group)
