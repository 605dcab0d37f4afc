"""Packing: every trained token once per sequence, prefixes shared, the mask is the ancestors."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.engine import TrainSequence
from learner.losses.aggregation import token_weights
from learner.training.packing import MicroBatch, num_trained_tokens, pack


def make_sequence(prompt: list[int], sampled: list[int], tail: int = 0, advantage: float = 1.0) -> TrainSequence:
    token_ids_T = np.asarray(prompt + sampled + [9] * tail, dtype=np.int32)
    loss_mask_T = np.asarray([False] * len(prompt) + [True] * len(sampled) + [False] * tail)
    logprobs_T = np.where(loss_mask_T, -np.arange(1.0, len(token_ids_T) + 1), 0).astype(np.float32)
    return TrainSequence(token_ids_T, loss_mask_T, logprobs_T, advantage, np.zeros(len(token_ids_T), dtype=np.int32))


def contexts(micro: MicroBatch) -> list[tuple[tuple[int, ...], int, float, float]]:
    """For every trained token: what the model sees before it, the token, its behaviour log-prob and advantage."""
    result = []
    for u, behaviour, advantage in zip(micro.index_N, micro.behaviour_logprobs_N, micro.advantages_N, strict=True):
        row = int(micro.rows_U[u])
        tree = next(t for t in micro.trees if t.start <= row < t.start + t.num_tokens)
        local = row - tree.start
        seen = np.arange(local + 1) if tree.mask_NN is None else np.flatnonzero(tree.mask_NN[local])
        tokens = micro.token_ids_P[seen + tree.start]
        positions = micro.position_ids_P[seen + tree.start]
        assert positions.tolist() == list(range(len(seen)))
        result.append((tuple(tokens.tolist()), int(micro.targets_U[u]), float(behaviour), float(advantage)))
    return result


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)
SEQUENCE = st.builds(
    make_sequence,
    st.sampled_from([[7], [7, 8], [8, 8, 7]]),
    TOKENS,
    st.integers(0, 2),
    st.sampled_from([-0.5, 0.25, 1.0]),
)


@settings(deadline=None)
@given(
    sequences=st.lists(SEQUENCE, min_size=1, max_size=12),
    max_tokens=st.integers(4, 40),
    max_tree_tokens=st.integers(1, 40),
)
def test_every_token_is_predicted_from_its_own_context(
    sequences: list[TrainSequence], max_tokens: int, max_tree_tokens: int
) -> None:
    micros = pack(sequences, max_tokens, token_weights(sequences, "token"), max_tree_tokens)
    actual = sorted(c for micro in micros for c in contexts(micro))
    expected = sorted(
        (tuple(s.token_ids_T[:t].tolist()), int(s.token_ids_T[t]), float(s.logprobs_T[t]), float(s.advantage))
        for s in sequences
        for t in range(1, len(s.token_ids_T))
        if s.loss_mask_T[t]
    )
    assert actual == expected
    assert len(actual) == num_trained_tokens(sequences)
    for micro in micros:
        assert len(micro.token_ids_P) <= max_tokens or len(micro.trees) == 1
        ids, counts = np.unique(micro.sequence_ids_N, return_counts=True)
        assert ids.tolist() == list(range(len(ids)))
        assert counts.min() >= 1


def test_siblings_share_their_prefix() -> None:
    prompt = list(range(10, 30))
    siblings = [make_sequence(prompt, [1, 2, 3, i]) for i in range(8)]
    (micro,) = pack(siblings, 2048, token_weights(siblings, "token"))
    assert len(micro.token_ids_P) == 20 + 3 + 8
    assert len(micro.index_N) == 32
    assert len(micro.rows_U) == 3 + 8


def test_strangers_are_plain_causal_chains() -> None:
    strangers = [make_sequence([1], [2, 3]), make_sequence([4], [5])]
    micros = pack(strangers, 2048, token_weights(strangers, "token"))
    assert [tree.mask_NN for micro in micros for tree in micro.trees] == [None, None]


def test_sequences_without_a_trained_token_are_left_out() -> None:
    without = [make_sequence([1, 2], [])]
    assert pack(without, 64, token_weights(without, "token")) == []


def test_a_branch_has_what_it_shares_as_context_only() -> None:
    def traced(tokens: list[int], sampled: str) -> TrainSequence:
        mask_T = np.asarray([letter == "x" for letter in sampled])
        logprobs_T = np.where(mask_T, -1.0, 0.0).astype(np.float32)
        return TrainSequence(np.asarray(tokens, np.int32), mask_T, logprobs_T, 1.0, np.zeros(len(tokens), np.int32))

    # Two continuations of one conversation, as an agent program leaves them.
    segments = [traced([1, 2, 3, 4, 5, 6], "..xx.x"), traced([1, 2, 3, 4, 5, 7], ".....x")]
    micros = pack(segments, 64, token_weights(segments, "token"))
    assert sorted(context[:2] for micro in micros for context in contexts(micro)) == [
        ((1, 2), 3),
        ((1, 2, 3), 4),
        ((1, 2, 3, 4, 5), 6),
        ((1, 2, 3, 4, 5), 7),
    ]
