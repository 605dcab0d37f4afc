"""Sequences -> optimiser steps -> ranks."""

from __future__ import annotations

import numpy as np
import pytest

from learner.engine import Aggregation, TrainSequence
from learner.losses.aggregation import token_weights
from learner.training.balance import imbalance
from learner.training.packing import num_trained_tokens, sharing_units
from learner.training.shares import Minibatch, divided


def make_sequences(count: int, seed: int = 0, group_size: int = 1) -> list[TrainSequence]:
    """Heavy-tailed lengths; siblings of a group share a long prompt."""
    rng = np.random.default_rng(seed)
    sequences = []
    for i in range(count):
        prompt = np.full(40, 1000 + i // group_size)
        answer = rng.integers(3, 400, min(400, int(rng.pareto(1.2) * 20) + 2))
        tokens = np.concatenate([prompt, answer]).astype(np.int32)
        mask = np.arange(len(tokens)) >= len(prompt)
        zeros = np.zeros(len(tokens), dtype=np.float32)
        weight = 1.0 / float(rng.integers(1, 4))
        sequences.append(TrainSequence(tokens, mask, zeros, float(rng.normal()), zeros.astype(np.int32), weight=weight))
    return sequences


def of_steps(shares: list[tuple[Minibatch, ...]]) -> list[list[Minibatch]]:
    return [list(parts) for parts in zip(*shares, strict=True)]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize(("num_minibatches", "num_ranks"), [(1, 1), (1, 4), (3, 1), (3, 2)])
def test_every_sequence_once_with_its_weight_in_the_whole_step(
    aggregation: Aggregation, num_minibatches: int, num_ranks: int
) -> None:
    sequences = make_sequences(24)
    steps = of_steps(divided(sequences, aggregation, num_minibatches, num_ranks, 256))
    assert len(steps) == num_minibatches
    seen: list[int] = []
    for parts in steps:
        members = [sequence for part in parts for sequence in part.sequences]
        seen.extend(id(sequence) for sequence in members)
        given = {id(s): w for part in parts for s, w in zip(part.sequences, part.weights, strict=True)}
        for sequence, expected in zip(members, token_weights(members, aggregation), strict=True):
            np.testing.assert_allclose(given[id(sequence)], expected, rtol=1e-6)
        assert {part.num_tokens for part in parts} == {num_trained_tokens(members)}
    assert sorted(seen) == sorted(id(sequence) for sequence in sequences)


def test_ranks_get_equal_work() -> None:
    sequences = make_sequences(64)
    ((*parts,),) = of_steps(divided(sequences, "token", 1, 4, 512))
    costs = [sum(tokens for _, tokens in sharing_units(part.sequences, 512)) for part in parts]
    assert imbalance(costs, [[i] for i in range(4)]) < 1.05


def test_what_shares_a_prefix_stays_together() -> None:
    sequences = make_sequences(32, group_size=4)
    together = sum(tokens for _, tokens in sharing_units(sequences, 512))
    ((*parts,),) = of_steps(divided(sequences, "token", 1, 4, 512))
    assert sum(tokens for part in parts for _, tokens in sharing_units(part.sequences, 512)) == together


def test_what_has_no_trained_token_goes_nowhere() -> None:
    (sequence,) = make_sequences(1)
    untrained = TrainSequence(
        sequence.token_ids_T, np.zeros_like(sequence.loss_mask_T), sequence.logprobs_T, 1.0, sequence.staleness_T
    )
    shares = divided([untrained, sequence], "token", 3, 2, 256)
    ((*parts,),) = of_steps(shares)  # one step, although three were asked for: there is one sequence
    assert sorted(len(part.sequences) for part in parts) == [0, 1]


def test_the_same_batch_is_divided_the_same() -> None:
    sequences = make_sequences(40, group_size=4)
    first, second = (divided(sequences, "token", 2, 3, 256) for _ in range(2))
    assert [[[id(s) for s in m.sequences] for m in share] for share in first] == [
        [[id(s) for s in m.sequences] for m in share] for share in second
    ]
