"""A problem whose optimum is known, and an asynchronous run on it. Policy and optimiser are plain torch (gradient
descent); trajectories, batcher, advantages, packing, token weights and objective are the learner's own.

The problem: an answer has n tokens, and the policy sees the task but not what it has written so far. The reward is 1
where each token v stands exactly c_v times in the answer, else 0. The probability of that is multinomial, so the best
policy draws every token with probability c_v / n, and its value is n! / prod(c_v!) * prod((c_v / n)^c_v). The optimum
lies inside: who goes too far in any direction loses. A gradient that is several versions old goes too far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from broker.process.loss_settings import LossSection
from broker.protocol.trajectory import Segment, Trajectory, VersionRun
from learner.batching import Batch, Batcher
from learner.engine import Objective, TokenBatch
from learner.losses.aggregation import token_weights
from learner.losses.policy import policy_loss
from learner.training.packing import MicroBatch, pack
from tests.unit.learner.make import make_ticket, make_trajectory

_GROUPS_PER_STEP, _GROUP_SIZE = 6, 8
_ENGINE_NOISE = 0.04  # nats: how far a bf16 engine's log-probs are from the trainer's
_MICRO_BATCH_TOKENS = 64


@dataclass(frozen=True)
class Problem:
    """counts_KV: for each of K tasks, how often each of V tokens stands in an answer; every row has the same sum n."""

    counts_KV: npt.NDArray[np.int64]

    @property
    def length(self) -> int:
        """n."""
        return int(self.counts_KV[0].sum())

    @property
    def best_KV(self) -> npt.NDArray[np.float64]:
        """The best policy's probabilities."""
        return self.counts_KV / self.length

    def values_K(self, policy_KV: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The exact expected reward of each task."""
        ways_K = [
            math.factorial(self.length) / math.prod(math.factorial(int(c)) for c in row) for row in self.counts_KV
        ]
        return np.asarray(ways_K) * (policy_KV**self.counts_KV).prod(axis=1)


class Policy(torch.nn.Module):
    """One row of logits for each task. A prompt is one token: V + the task's number."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.logits_KV = torch.nn.Parameter(torch.zeros(problem.counts_KV.shape))

    def forward(self, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of a micro-batch's trained tokens, as the real model gives them."""
        starts = np.asarray([tree.start for tree in micro.trees])
        roots_U = starts[np.searchsorted(starts, micro.rows_U, side="right") - 1]
        tasks_U = torch.from_numpy(micro.token_ids_P[roots_U] - self.logits_KV.shape[1])
        all_UV = torch.log_softmax(self.logits_KV[tasks_U], dim=-1)
        logprobs_U = all_UV.gather(1, torch.from_numpy(micro.targets_U)[:, None])[:, 0]
        entropy_U = -(all_UV.exp() * all_UV).sum(-1).detach()
        index_N = torch.from_numpy(micro.index_N)
        return logprobs_U[index_N], entropy_U[index_N]

    def probabilities(self) -> npt.NDArray[np.float64]:
        """K x V."""
        result: npt.NDArray[np.float64] = torch.softmax(self.logits_KV.detach().double(), dim=-1).numpy()
        return result


class Engine:
    """The engine that samples: old weights, numbers unlike the trainer's, its own log-probs of what it did."""

    def __init__(self, problem: Problem, staleness: int, seed: int) -> None:
        self._problem = problem
        self._staleness = staleness
        self._rng = np.random.default_rng(seed)
        self._versions: list[npt.NDArray[np.float64]] = []

    def adopt(self, policy: Policy) -> None:
        """Learn of a version."""
        self._versions.append(policy.logits_KV.detach().double().numpy().copy())

    def group(self, number: int) -> list[Trajectory]:
        """Episodes of one task. Token t is `staleness - t` versions old: weights change in the middle of a request."""
        problem = self._problem
        task = number % len(problem.counts_KV)
        num_tokens, num_kinds = problem.length + 1, problem.counts_KV.shape[1]
        tokens_GT = np.full((_GROUP_SIZE, num_tokens), num_kinds + task, np.int32)
        logprobs_GT = np.zeros((_GROUP_SIZE, num_tokens), np.float32)
        runs = []
        for t in range(problem.length):
            version = max(0, len(self._versions) - 1 - max(self._staleness - t, 0))
            logits_GV = self._versions[version][task] + self._rng.normal(0, _ENGINE_NOISE, (_GROUP_SIZE, num_kinds))
            all_GV = logits_GV - np.logaddexp.reduce(logits_GV, axis=1, keepdims=True)
            tokens_G = (all_GV + self._rng.gumbel(size=all_GV.shape)).argmax(axis=1)
            tokens_GT[:, t + 1] = tokens_G
            logprobs_GT[:, t + 1] = all_GV[np.arange(_GROUP_SIZE), tokens_G]
            runs.append(VersionRun(1, version, 1))
        return [
            make_trajectory(
                make_ticket(number, member, _GROUP_SIZE),
                float((np.bincount(tokens_T[1:], minlength=num_kinds) == problem.counts_KV[task]).all()),
                segment=Segment(tokens_T, np.arange(num_tokens) > 0, logprobs_T, tuple(runs)),
            )
            for member, (tokens_T, logprobs_T) in enumerate(zip(tokens_GT, logprobs_GT, strict=True))
        ]


def train(
    problem: Problem, loss: LossSection, *, staleness: int, seed: int, num_steps: int, learning_rate: float
) -> npt.NDArray[np.float64]:
    """An asynchronous run: every step trains on episodes that began `staleness` versions ago. Returns the policy's
    probabilities after every step, num_steps x K x V."""
    policy = Policy(problem)
    engine = Engine(problem, staleness, seed)
    objective = policy_loss(loss)
    batcher = Batcher(
        groups_per_step=_GROUPS_PER_STEP,
        max_groups_per_step=4 * _GROUPS_PER_STEP,
        group_size=_GROUP_SIZE,
        max_staleness=staleness,
        loss=loss,
    )
    history = []
    number = 0
    engine.adopt(policy)
    for version in range(num_steps):
        while (batch := batcher.next(version)) is None:
            for trajectory in engine.group(number):
                batcher.add(trajectory)
            number += 1
        assert batch.num_stale_tokens == 0
        if batch.sequences:
            descend(policy, batch, objective, learning_rate)
        engine.adopt(policy)
        history.append(policy.probabilities())
    return np.stack(history)


def descend(policy: Policy, batch: Batch, objective: Objective, learning_rate: float) -> None:
    """One step of gradient descent, over several micro-batches."""
    policy.logits_KV.grad = None
    for micro in pack(batch.sequences, _MICRO_BATCH_TOKENS, token_weights(batch.sequences, objective.aggregation)):
        loss, _ = objective(token_batch(policy, micro))
        loss.backward()  # type: ignore[no-untyped-call]
    assert policy.logits_KV.grad is not None
    policy.logits_KV.data -= learning_rate * policy.logits_KV.grad


def token_batch(policy: Policy, micro: MicroBatch) -> TokenBatch:
    """A micro-batch as the engine hands it to the objective before a batch's first step."""
    logprobs_N, entropy_N = policy(micro)
    return TokenBatch(
        logprobs_N=logprobs_N,
        behaviour_logprobs_N=torch.from_numpy(micro.behaviour_logprobs_N),
        advantages_N=torch.from_numpy(micro.advantages_N),
        weights_N=torch.from_numpy(micro.weights_N),
        entropy_N=entropy_N,
        sequence_ids_N=torch.from_numpy(micro.sequence_ids_N),
        proximal_logprobs_N=logprobs_N.detach(),
    )
