"""Sequences -> micro-batches: pure numpy, no torch. Owns the token layout; knows nothing of models or losses.

Sequences that start with the same prompt (the siblings of a group) share the hidden states of their common prefixes:
they are laid into one prefix tree, whose tokens are computed once. A token attends to its ancestors only, so every
log-prob and every gradient equals that of the sequence alone (tree attention, as in SpecInfer, arXiv 2305.09781; prefix
sharing for training: arXiv 2506.05433). Trees are packed one after another and never see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from learner.engine import TrainSequence

MAX_SHARED_TREE_TOKENS = 512  # the mask of a tree is quadratic; beyond this, separate causal attention is cheaper
_MIN_SAVING = 0.15  # a tree must spare this share of the tokens to be worth its mask


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """n tokens at [start, start + n) of the packed layout. `mask_NN` is None for a plain causal chain."""

    start: int
    num_tokens: int
    mask_NN: npt.NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """P packed tokens, U distinct trained tokens, N trained tokens of all sequences.

    token_ids_P, position_ids_P: the model's input. rows_U: packed position whose hidden state predicts the token;
    targets_U: the token. index_N: which of the U a trained token is (siblings share). The other arrays are per trained
    token, in the order of the sequences.
    """

    token_ids_P: npt.NDArray[np.int64]
    position_ids_P: npt.NDArray[np.int64]
    trees: tuple[Tree, ...]
    rows_U: npt.NDArray[np.int64]
    targets_U: npt.NDArray[np.int64]
    index_N: npt.NDArray[np.int64]
    behaviour_logprobs_N: npt.NDArray[np.float32]
    advantages_N: npt.NDArray[np.float32]
    sequence_ids_N: npt.NDArray[np.int64]


class _PrefixTree:
    """A growing prefix tree of token ids. parents[i] < i; -1 is the root."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.members: list[tuple[TrainSequence, list[int]]] = []
        self.num_unshared = 0
        self._children: dict[tuple[int, int], int] = {}

    def growth(self, token_ids: Sequence[int]) -> int:
        """How many tokens `add` would create."""
        parent = -1
        for depth, token in enumerate(token_ids):
            child = self._children.get((parent, token))
            if child is None:
                return len(token_ids) - depth
            parent = child
        return 0

    def add(self, sequence: TrainSequence, token_ids: Sequence[int]) -> None:
        """Insert a sequence, reusing the prefix that is already there."""
        path: list[int] = []
        parent = -1
        for depth, token in enumerate(token_ids):
            child = self._children.get((parent, token))
            if child is None:
                child = len(self.tokens)
                self._children[(parent, token)] = child
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(depth)
            path.append(child)
            parent = child
        self.members.append((sequence, path))
        self.num_unshared += len(token_ids)

    def mask(self) -> npt.NDArray[np.bool_] | None:
        """Ancestor-or-self mask, or None where the tree is one chain."""
        size = len(self.tokens)
        if all(parent == i - 1 for i, parent in enumerate(self.parents)):
            return None
        mask_NN = np.zeros((size, size), dtype=np.bool_)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                mask_NN[i] = mask_NN[parent]
            mask_NN[i, i] = True
        return mask_NN


def pack(
    sequences: Sequence[TrainSequence], max_tokens: int, max_tree_tokens: int = MAX_SHARED_TREE_TOKENS
) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens` packed tokens (a longer single sequence has one of its own).

    Sequences without a trained token are left out. First-fit decreasing, so micro-batches are few and full.
    """
    trees = _grow(sequences, min(max_tokens, max_tree_tokens))
    trees.sort(key=lambda tree: -len(tree.tokens))
    bins: list[list[_PrefixTree]] = []
    room: list[int] = []
    for tree in trees:
        size = len(tree.tokens)
        slot = next((i for i, free in enumerate(room) if free >= size), None)
        if slot is None:
            bins.append([tree])
            room.append(max_tokens - size)
        else:
            bins[slot].append(tree)
            room[slot] -= size
    return [_lay_out(members) for members in bins]


def num_trained_tokens(sequences: Sequence[TrainSequence]) -> int:
    """Tokens with a gradient: masked True and not the first of their sequence (nothing predicts that one)."""
    return int(sum(np.count_nonzero(sequence.loss_mask_T[1:]) for sequence in sequences))


def _grow(sequences: Sequence[TrainSequence], max_tree_tokens: int) -> list[_PrefixTree]:
    by_prompt: dict[bytes, list[tuple[TrainSequence, list[int]]]] = {}
    for sequence in sequences:
        mask_T = sequence.loss_mask_T
        if not mask_T[1:].any():
            continue
        last = int(np.flatnonzero(mask_T)[-1])  # tokens after the last trained one influence nothing
        prompt = sequence.token_ids_T[: int(np.argmax(mask_T))].tobytes()
        by_prompt.setdefault(prompt, []).append((sequence, sequence.token_ids_T[: last + 1].tolist()))
    trees: list[_PrefixTree] = []
    for prompt, members in by_prompt.items():
        members.sort(key=lambda member: member[1])  # neighbours share most
        shared = [_PrefixTree()]
        for sequence, tokens in members:
            tree = shared[-1]
            if tree.members and (not prompt or len(tree.tokens) + tree.growth(tokens) > max_tree_tokens):
                tree = _PrefixTree()
                shared.append(tree)
            tree.add(sequence, tokens)
        for tree in shared:
            trees.extend([tree] if len(tree.tokens) <= (1 - _MIN_SAVING) * tree.num_unshared else _chains(tree))
    return trees


def _chains(tree: _PrefixTree) -> list[_PrefixTree]:
    """One tree for each member."""
    chains = []
    for sequence, path in tree.members:
        chain = _PrefixTree()
        chain.add(sequence, [tree.tokens[i] for i in path])
        chains.append(chain)
    return chains


def _lay_out(members: Sequence[_PrefixTree]) -> MicroBatch:
    trees: list[Tree] = []
    nodes: list[npt.NDArray[np.int64]] = []  # packed position of every trained token
    behaviour: list[npt.NDArray[np.float32]] = []
    advantages: list[npt.NDArray[np.float32]] = []
    sequence_ids: list[npt.NDArray[np.int64]] = []
    parents: list[npt.NDArray[np.int64]] = []
    start = num_sequences = 0
    for tree in members:
        trees.append(Tree(start, len(tree.tokens), tree.mask()))
        parents.append(np.asarray(tree.parents, dtype=np.int64) + start)  # a root's parent is never asked for
        for sequence, path in tree.members:
            trained = np.flatnonzero(sequence.loss_mask_T[1 : len(path)]) + 1
            nodes.append(np.asarray(path, dtype=np.int64)[trained] + start)
            behaviour.append(sequence.logprobs_T[trained].astype(np.float32))
            advantages.append(np.full(len(trained), sequence.advantage, dtype=np.float32))
            sequence_ids.append(np.full(len(trained), num_sequences, dtype=np.int64))
            num_sequences += 1
        start += len(tree.tokens)
    token_ids_P = np.asarray([token for tree in members for token in tree.tokens], dtype=np.int64)
    unique_U, index_N = np.unique(np.concatenate(nodes), return_inverse=True)
    return MicroBatch(
        token_ids_P=token_ids_P,
        position_ids_P=np.asarray([depth for tree in members for depth in tree.depths], dtype=np.int64),
        trees=tuple(trees),
        rows_U=np.concatenate(parents)[unique_U],
        targets_U=token_ids_P[unique_U],
        index_N=index_N.astype(np.int64),
        behaviour_logprobs_N=np.concatenate(behaviour),
        advantages_N=np.concatenate(advantages),
        sequence_ids_N=np.concatenate(sequence_ids),
    )
