"""What tokens weigh: against naive loops, alone and through packing into several micro-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.process.loss_settings import LossSection
from broker.protocol.trajectory import Segment, Trajectory, VersionRun
from learner.batching import train_sequences
from learner.engine import Aggregation, TokenBatch, TrainSequence
from learner.losses.aggregation import token_weights
from learner.losses.policy import policy_loss
from learner.training.packing import MicroBatch, pack
from tests.unit.learner.make import make_trajectory

CONSTANT = 7


def make_sequence(mask: list[bool], advantage: float, share: float, seed: int) -> TrainSequence:
    rng = np.random.default_rng(seed)
    size = len(mask)
    logprobs_T, proximal_T, reference_T = rng.uniform(-2, -0.1, (3, size)).astype(np.float32)
    return TrainSequence(
        token_ids_T=rng.integers(0, 3, size).astype(np.int32),
        loss_mask_T=np.asarray(mask, dtype=np.bool_),
        logprobs_T=logprobs_T,
        advantage=advantage,
        staleness_T=np.zeros(size, np.int32),
        weight=share,
        proximal_logprobs_T=proximal_T,
        reference_logprobs_T=reference_T,
    )


SEQUENCES = st.lists(
    st.builds(
        make_sequence,
        st.lists(st.booleans(), min_size=0, max_size=9),
        st.floats(-2, 2),
        st.sampled_from([1.0, 0.5, 0.25]),
        st.integers(0, 2**31),
    ),
    max_size=8,
)


def naive(sequences: list[TrainSequence], losses: list[list[float]], aggregation: str) -> float:
    """The loss of a step from each trained token's loss, by the definition in words."""
    trained = [(sequence, values) for sequence, values in zip(sequences, losses, strict=True) if values]
    if not trained:
        return 0.0
    shares = sum(sequence.weight for sequence, _ in trained)
    match aggregation:
        case "token":
            return sum(sum(values) for _, values in trained) / sum(len(values) for _, values in trained)
        case "sequence":
            return sum(sequence.weight * sum(values) / len(values) for sequence, values in trained) / shares
        case _:
            return sum(sum(values) / CONSTANT for _, values in trained) / shares


def as_batch(micro: MicroBatch) -> TokenBatch:
    """A micro-batch as the engine hands it on, on policy."""
    behaviour_N = torch.from_numpy(micro.behaviour_logprobs_N)
    return TokenBatch(
        logprobs_N=behaviour_N.clone().requires_grad_(),
        behaviour_logprobs_N=behaviour_N,
        advantages_N=torch.from_numpy(micro.advantages_N),
        weights_N=torch.from_numpy(micro.weights_N),
        entropy_N=torch.zeros(len(behaviour_N)),
        sequence_ids_N=torch.from_numpy(micro.sequence_ids_N),
    )


@settings(deadline=None, max_examples=150)
@given(sequences=SEQUENCES, max_tokens=st.integers(3, 30), aggregation=st.sampled_from(get_args(Aggregation)))
def test_micro_batches_add_up_to_the_naive_loop(
    sequences: list[TrainSequence], max_tokens: int, aggregation: Aggregation
) -> None:
    objective = policy_loss(LossSection(aggregation=aggregation, constant_tokens=CONSTANT))
    micros = pack(sequences, max_tokens, token_weights(sequences, objective.aggregation))
    total = sum(float(objective(as_batch(micro))[0].detach()) for micro in micros)
    on_policy = [[-sequence.advantage] * int(sequence.loss_mask_T[1:].sum()) for sequence in sequences]
    assert total == pytest.approx(naive(sequences, on_policy, aggregation), rel=1e-5, abs=1e-6)


@settings(deadline=None)
@given(sequences=SEQUENCES, aggregation=st.sampled_from(get_args(Aggregation)))
def test_weights_belong_to_trained_tokens(sequences: list[TrainSequence], aggregation: Aggregation) -> None:
    weights = token_weights(sequences, aggregation)
    for sequence, weights_T in zip(sequences, weights, strict=True):
        trained_T = sequence.loss_mask_T.copy()
        trained_T[:1] = False
        assert weights_T.dtype == np.float32
        assert ((weights_T > 0) == trained_T).all()
    if aggregation != "constant" and any(weights_T.any() for weights_T in weights):
        assert sum(float(weights_T.sum()) for weights_T in weights) == pytest.approx(1.0, rel=1e-5)


def test_an_episode_of_many_segments_counts_as_one() -> None:
    """Four segments of one episode against one of another, all of two tokens."""
    whole = make_sequence([False, True, True], 1.0, 1.0, 0)
    cut = [make_sequence([False, True, True], 1.0, 0.25, i) for i in range(4)]
    by_sequence = [float(w.sum()) for w in token_weights([whole, *cut], "sequence")]
    assert by_sequence == pytest.approx([0.5] + [0.125] * 4)
    by_token = [float(w.sum()) for w in token_weights([whole, *cut], "token")]
    assert by_token == pytest.approx([0.2] * 5)
    # The sum over an episode's tokens is the larger, the more tokens it has: a matter of its length, not of its cuts.
    by_constant = [float(w.sum()) for w in token_weights([whole, *cut], "constant")]
    assert by_constant == pytest.approx([1.0] * 5)


EPISODES = st.lists(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=4), max_size=5)


@settings(deadline=None)
@given(episodes=EPISODES, aggregation=st.sampled_from(get_args(Aggregation)))
def test_a_token_weighs_the_same_however_its_episode_is_cut(
    episodes: list[list[list[bool]]], aggregation: Aggregation
) -> None:
    """Each episode as the segments into which its masks cut it, and as a single one of the same tokens."""

    def weights(of: list[list[list[bool]]]) -> list[float]:
        made = [s for masks in of for s in train_sequences(trajectory(masks), 1.0, 0, 8)[0]]
        found = [float(w) for each in token_weights(made, aggregation) for w in each if w]
        assert sum(s.weight for s in made) == pytest.approx(sum(any(map(any, masks)) for masks in of))
        return found

    whole = [[[trained for mask in masks for trained in mask]] for masks in episodes]
    assert weights(episodes) == pytest.approx(weights(whole), rel=1e-5)


def trajectory(masks: list[list[bool]]) -> Trajectory:
    """Segments of a prompt token and these."""
    segments = tuple(
        Segment(
            np.zeros(1 + len(mask), np.int32),
            np.asarray([False, *mask]),
            np.zeros(1 + len(mask), np.float32),
            (VersionRun(1, 0, sum(mask)),) if any(mask) else (),
        )
        for mask in masks
    )
    return replace(make_trajectory(), segments=segments)


@settings(deadline=None)
@given(sequences=SEQUENCES, max_tokens=st.integers(3, 30))
def test_other_policies_logprobs_stay_with_their_tokens(sequences: list[TrainSequence], max_tokens: int) -> None:
    for micro in pack(sequences, max_tokens, token_weights(sequences, "token")):
        for name in ("proximal_logprobs", "reference_logprobs"):
            packed_N = getattr(micro, f"{name}_N")
            for number, member in enumerate(micro.members):
                sequence = sequences[member]
                expected = getattr(sequence, f"{name}_T")[1:][sequence.loss_mask_T[1:]]
                assert packed_N[micro.sequence_ids_N == number].tolist() == expected.tolist()


def test_logprobs_that_one_sequence_lacks_are_left_to_the_engine() -> None:
    whole = make_sequence([False, True], 1.0, 1.0, 0)
    sequences = [whole, replace(make_sequence([False, True, True], 1.0, 1.0, 1), reference_logprobs_T=None)]
    (micro,) = pack(sequences, 64, token_weights(sequences, "token"))
    assert micro.reference_logprobs_N is None
    assert micro.proximal_logprobs_N is not None
