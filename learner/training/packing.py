"""Sequences -> micro-batches: pure numpy, no torch. Owns the token layout; knows nothing of models or losses.

Sequences that start with the same prompt (the siblings of a group) share the hidden states of their common prefixes:
they are laid into one prefix tree, whose tokens are computed once. A token attends to its ancestors only, so every
log-prob and every gradient equals that of the sequence alone (tree attention, as in SpecInfer, arXiv 2305.09781; prefix
sharing for training: arXiv 2506.05433). Trees are packed one after another and never see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    targets_U: the token. index_N: which of the U a trained token is (siblings share). members: which of the sequences
    that were packed are here, in the order of their tokens; sequence_ids_N counts in it. The other arrays are per
    trained token; those of a policy are there where every sequence brings its log-probs along.
    """

    token_ids_P: npt.NDArray[np.int64]
    position_ids_P: npt.NDArray[np.int64]
    trees: tuple[Tree, ...]
    rows_U: npt.NDArray[np.int64]
    targets_U: npt.NDArray[np.int64]
    index_N: npt.NDArray[np.int64]
    behaviour_logprobs_N: npt.NDArray[np.float32]
    advantages_N: npt.NDArray[np.float32]
    weights_N: npt.NDArray[np.float32]
    sequence_ids_N: npt.NDArray[np.int64]
    members: tuple[int, ...]
    proximal_logprobs_N: npt.NDArray[np.float32] | None = None
    reference_logprobs_N: npt.NDArray[np.float32] | None = None


class _Member(NamedTuple):
    """A sequence in a tree: its number among those packed, and the node of each token up to the last trained one."""

    number: int
    path: list[int]


class _PrefixTree:
    """A growing prefix tree of token ids. parents[i] < i; -1 is the root."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.members: list[_Member] = []
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

    def add(self, number: int, token_ids: Sequence[int]) -> None:
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
        self.members.append(_Member(number, path))
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
    sequences: Sequence[TrainSequence],
    max_tokens: int,
    weights: Sequence[npt.NDArray[np.float32]],
    max_tree_tokens: int = MAX_SHARED_TREE_TOKENS,
) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens` packed tokens (a longer single sequence has one of its own).

    weights: T of each sequence, of its tokens in the loss of the whole step. Sequences without a trained token are left
    out. First-fit decreasing, so micro-batches are few and full.
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
    return [_lay_out(members, sequences, weights) for members in bins]


def sharing_units(
    sequences: Sequence[TrainSequence], max_tokens: int, max_tree_tokens: int = MAX_SHARED_TREE_TOKENS
) -> list[tuple[tuple[int, ...], int]]:
    """What `pack` computes together: for each tree the sequences in it, by number, and its packed tokens.

    Whoever divides sequences among ranks keeps these together, or common prefixes are computed on each.
    """
    trees = _grow(sequences, min(max_tokens, max_tree_tokens))
    return [(tuple(member.number for member in tree.members), len(tree.tokens)) for tree in trees]


def num_trained_tokens(sequences: Sequence[TrainSequence]) -> int:
    """Tokens with a gradient: masked True and not the first of their sequence (nothing predicts that one)."""
    return int(sum(np.count_nonzero(sequence.loss_mask_T[1:]) for sequence in sequences))


def _grow(sequences: Sequence[TrainSequence], max_tree_tokens: int) -> list[_PrefixTree]:
    by_prompt: dict[bytes, list[tuple[int, list[int]]]] = {}
    for number, sequence in enumerate(sequences):
        mask_T = sequence.loss_mask_T
        if not mask_T[1:].any():
            continue
        last = int(np.flatnonzero(mask_T)[-1])  # tokens after the last trained one influence nothing
        prompt = sequence.token_ids_T[: int(np.argmax(mask_T))].tobytes()
        by_prompt.setdefault(prompt, []).append((number, sequence.token_ids_T[: last + 1].tolist()))
    trees: list[_PrefixTree] = []
    for prompt, members in by_prompt.items():
        members.sort(key=lambda member: member[1])  # neighbours share most
        shared = [_PrefixTree()]
        for number, tokens in members:
            tree = shared[-1]
            if tree.members and (not prompt or len(tree.tokens) + tree.growth(tokens) > max_tree_tokens):
                tree = _PrefixTree()
                shared.append(tree)
            tree.add(number, tokens)
        for tree in shared:
            trees.extend([tree] if len(tree.tokens) <= (1 - _MIN_SAVING) * tree.num_unshared else _chains(tree))
    return trees


def _chains(tree: _PrefixTree) -> list[_PrefixTree]:
    """One tree for each member."""
    chains = []
    for number, path in tree.members:
        chain = _PrefixTree()
        chain.add(number, [tree.tokens[i] for i in path])
        chains.append(chain)
    return chains


def _lay_out(
    grown: Sequence[_PrefixTree], sequences: Sequence[TrainSequence], weights: Sequence[npt.NDArray[np.float32]]
) -> MicroBatch:
    trees: list[Tree] = []
    nodes: list[npt.NDArray[np.int64]] = []  # packed position of every trained token
    trained: list[npt.NDArray[np.int64]] = []  # where each member's trained tokens are in its sequence
    parents: list[npt.NDArray[np.int64]] = []
    start = 0
    for tree in grown:
        trees.append(Tree(start, len(tree.tokens), tree.mask()))
        parents.append(np.asarray(tree.parents, dtype=np.int64) + start)  # a root's parent is never asked for
        for number, path in tree.members:
            at = np.flatnonzero(sequences[number].loss_mask_T[1 : len(path)]) + 1
            trained.append(at)
            nodes.append(np.asarray(path, dtype=np.int64)[at] + start)
        start += len(tree.tokens)
    numbers = [member.number for tree in grown for member in tree.members]
    here = [sequences[number] for number in numbers]
    token_ids_P = np.asarray([token for tree in grown for token in tree.tokens], dtype=np.int64)
    unique_U, index_N = np.unique(np.concatenate(nodes), return_inverse=True)
    counts = [len(at) for at in trained]
    return MicroBatch(
        token_ids_P=token_ids_P,
        position_ids_P=np.asarray([depth for tree in grown for depth in tree.depths], dtype=np.int64),
        trees=tuple(trees),
        rows_U=np.concatenate(parents)[unique_U],
        targets_U=token_ids_P[unique_U],
        index_N=index_N.astype(np.int64),
        behaviour_logprobs_N=_picked([sequence.logprobs_T for sequence in here], trained),
        advantages_N=np.repeat(np.asarray([sequence.advantage for sequence in here], dtype=np.float32), counts),
        weights_N=_picked([weights[number] for number in numbers], trained),
        sequence_ids_N=np.repeat(np.arange(len(here), dtype=np.int64), counts),
        members=tuple(numbers),
        proximal_logprobs_N=_where_all([sequence.proximal_logprobs_T for sequence in here], trained),
        reference_logprobs_N=_where_all([sequence.reference_logprobs_T for sequence in here], trained),
    )


def _picked(
    arrays: Sequence[npt.NDArray[np.float32]], places: Sequence[npt.NDArray[np.int64]]
) -> npt.NDArray[np.float32]:
    return np.concatenate([array_T[at] for array_T, at in zip(arrays, places, strict=True)]).astype(np.float32)


def _where_all(
    arrays: Sequence[npt.NDArray[np.float32] | None], places: Sequence[npt.NDArray[np.int64]]
) -> npt.NDArray[np.float32] | None:
    known = [array_T for array_T in arrays if array_T is not None]
    return _picked(known, places) if len(known) == len(arrays) else None
