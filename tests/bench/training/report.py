"""What was measured and what is told of it: medians, ratios, Markdown, the summary. Pure; runs nothing.

Ratios are taken within a round, where all trainers had the same batch one after the other, and their median is told.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from learner.engine import Aggregation, TrainSequence
from learner.losses.aggregation import token_weights
from learner.training.packing import pack
from learner.training.shares import divided
from tests.bench.training.recipe import Order
from tests.bench.training.workload import facts, train_sequences

LABELS = {
    "ours": "Ergon's DeepSpeed engine, packed",
    "packed": "plain PyTorch AdamW, the same packed batch",
    "padded": "plain PyTorch AdamW, padded",
    "trl": "TRL's GRPOTrainer",
}
NUM_BATCHES, NUM_GROUPS, GROUP_SIZE = 20, 8, 8  # of which the packing is looked at: the learner's default batches
RANKS = 2
AGGREGATION: Aggregation = "token"  # of the weights, which have no influence on the layout


class Step(NamedTuple):
    """One timed step of one trainer."""

    seconds: float
    cpu_s: float
    num_trained: int
    num_processed: int

    def rate(self, cpu: bool = False) -> float:
        """Trained tokens per second, of the clock or of CPU time."""
        return self.num_trained / (self.cpu_s if cpu else self.seconds)


class Results(NamedTuple):
    """Of the whole benchmark. rounds: each one's step by trainer."""

    rounds: Sequence[Mapping[str, Step]]
    peak_mb: Mapping[str, float]
    disagreement: Mapping[str, float]  # of each trainer's gradient with ours
    losses: Mapping[str, float]


class Packing(NamedTuple):
    """How full the learner's micro-batches are, over some batches of the benchmark's kind."""

    padding: float  # share of positions that carry no token of the batch
    imbalance: float  # share of the ranks' time in which some wait for the fullest one, counted in positions
    unfilled: float  # share of the micro-batches' capacity that is not used (and not computed)
    shared: float  # share of the episodes' tokens that need not be computed, a sibling's being the same

    @property
    def waste(self) -> float:
        """Share of what the ranks could have computed that was padding or waiting."""
        return 1 - (1 - self.padding) * (1 - self.imbalance)


def speedup(results: Results, one: str, other: str, cpu: bool = False) -> float | None:
    """How many times as many trained tokens a second as another trainer; None where either was not run."""
    ratios = [r[one].rate(cpu) / r[other].rate(cpu) for r in results.rounds if one in r and other in r]
    return statistics.median(ratios) if ratios else None


def look_at_packing(max_tokens: int) -> Packing:
    """Pack some batches as the learner does on one rank, divide them over several ranks as it does, and count."""
    positions = tokens = capacity = carried = 0
    waited: list[float] = []
    for seed in range(NUM_BATCHES):
        samples = Order(seed, NUM_GROUPS, GROUP_SIZE).samples()
        sequences = train_sequences(samples)
        micros = pack(sequences, max_tokens, token_weights(sequences, AGGREGATION))
        sizes = [len(micro.token_ids_P) for micro in micros]
        positions += sum(sizes)
        carried += sum(tree.num_tokens for micro in micros for tree in micro.trees)
        capacity += sum(max(size, max_tokens) for size in sizes)
        tokens += facts(samples)["tokens"]
        waited.append(idle(per_rank(sequences, max_tokens)))
    return Packing(1 - carried / positions, float(np.mean(waited)), 1 - positions / capacity, 1 - positions / tokens)


def per_rank(sequences: Sequence[TrainSequence], max_tokens: int) -> list[int]:
    """The positions that each rank computes of a batch."""
    return [
        sum(len(micro.token_ids_P) for part in share for micro in pack(part.sequences, max_tokens, part.weights))
        for share in divided(sequences, AGGREGATION, 1, RANKS, max_tokens)
    ]


def idle(work: Sequence[int]) -> float:
    """Share of the ranks' time in which some wait for the one that has most to do."""
    return 1 - sum(work) / (len(work) * max(work))


def summary(results: Results, packing: Packing) -> dict[str, Any]:
    """The last line's JSON."""
    peaks = results.peak_mb
    memory = peaks["ours"] / peaks["trl"] if "trl" in peaks else None
    ratios = {
        "vs_trl_tokens": speedup(results, "ours", "trl"),
        "vs_trl_tokens_cpu": speedup(results, "ours", "trl", cpu=True),
        "vs_trl_memory": memory,
        "vs_plain_torch": speedup(results, "ours", "packed"),
        "vs_plain_torch_cpu": speedup(results, "ours", "packed", cpu=True),
        "vs_padded_torch": speedup(results, "ours", "padded"),
        "packing_waste": packing.waste,
    }
    return {key: None if value is None else round(value, 4) for key, value in ratios.items()}


def markdown(results: Results, packing: Packing, conditions: str) -> str:
    """The report for people."""
    lines = ["## Learner", "", conditions, ""]
    lines += [_batches(results), ""]
    lines += [
        "| | trained tokens/s | per CPU-second | positions/s | positions a step | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_row(results, name) for name in LABELS if name in results.peak_mb),
        "",
        "Trained tokens are those with a loss, the same number for all; positions are what the model computes for "
        "them, padding included, shared prompts once. Seconds: from a batch of token ids to the updated weights.",
        "",
    ]
    for name, difference in results.disagreement.items():
        lines.append(
            f"- the first gradient in float32, {LABELS[name]}: {difference:.1e} from Ergon's (largest relative "
            f"difference over the watched weights), loss {results.losses[name]:.6f}, {results.losses['ours']:.6f}"
        )
    lines.append(
        f"- packing, {NUM_BATCHES} batches of {NUM_GROUPS} groups: padding {packing.padding:.1%} of the positions; "
        f"{RANKS} ranks would wait for each other {packing.imbalance:.1%} of the time; {packing.unfilled:.1%} of the "
        f"micro-batches' capacity is not used, and not computed either; {packing.shared:.1%} of the episodes' tokens "
        f"need not be computed because a sibling has the same"
    )
    return "\n".join(lines)


def _batches(results: Results) -> str:
    trained = [next(iter(r.values())).num_trained for r in results.rounds]
    return f"{len(results.rounds)} batches with {', '.join(str(number) for number in trained)} trained tokens."


def _row(results: Results, name: str) -> str:
    steps = [r[name] for r in results.rounds if name in r]
    rate = statistics.median(step.rate() for step in steps)
    cpu = statistics.median(step.rate(cpu=True) for step in steps)
    positions = statistics.median(step.num_processed / step.seconds for step in steps)
    size = statistics.median(step.num_processed for step in steps)
    peak_gb = results.peak_mb[name] / 1e3
    return f"| {LABELS[name]} | {rate:.1f} | {cpu:.1f} | {positions:.0f} | {size:.0f} | {peak_gb:.2f} GB |"
