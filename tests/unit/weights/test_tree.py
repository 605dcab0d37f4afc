"""Whatever is published, lost, repeated, reordered, damaged, restarted or forgotten: a completed fetch has the bytes of
the version it names."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.weights.tree import Tree

PUBLISH = (*["sparse"] * 16, "equal", "dense", "layout", "lineage")
DELIVER = ("deliver", "deliver", "deliver", "deliver", "lose", "repeat", "flip", "cut")
ACTIONS = (
    ["publish"] * 4
    + ["poll"] * 6
    + ["serve"] * 10
    + ["deliver"] * 10
    + ["burst"] * 16
    + ["let go"] * 3
    + ["push"] * 12
    + ["join", "reconnect", "restart", "move", "fail", "forge"]
)
Step = tuple[str, int, int]


def happen(tree: Tree, action: str, which: int, how: int) -> None:
    """One step of a history; the two numbers choose to whom, and what exactly."""
    receiver, store = tree.receivers[which % len(tree.receivers)], tree.stores[which % len(tree.stores)]
    if action == "burst":
        tree.poll(receiver)
        for _ in range(how % 60):
            tree.serve(receiver, 0)
            tree.deliver(receiver, 0)
    elif action == "join" and len(tree.actors) < 5:
        tree.join(store)
    elif action == "move" and tree.actors:
        actor = tree.actors[which % len(tree.actors)]
        actor.upstream = tree.stores[how % len(tree.stores)]
        tree.reconnect(actor)
    else:
        {
            "publish": lambda: tree.publish(PUBLISH[which % len(PUBLISH)], how),
            "poll": lambda: tree.poll(receiver),
            "serve": lambda: tree.serve(receiver, how),
            "push": lambda: tree.push(receiver, how),
            "deliver": lambda: tree.deliver(receiver, how // 8, DELIVER[how % 8]),
            "let go": lambda: tree.let_go(store),
            "reconnect": lambda: tree.reconnect(receiver),
            "restart": lambda: tree.restart(tree.relays[which % 2]),
            "fail": lambda: tree.fail_publish(how % 3),
            "forge": lambda: tree.forge(store, how),
        }.get(action, lambda: None)()


def run(tree: Tree, steps: list[Step]) -> None:
    """A history, and then everybody must get to the newest version."""
    for step in steps:
        happen(tree, *step)
    tree.publish("sparse", 0)
    tree.settle()


@pytest.mark.parametrize("seed", range(12))
def test_long_histories(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    tree = Tree(tmp_path)
    for store in tree.stores:
        tree.join(store)
    run(tree, [(rng.choice(ACTIONS), rng.randrange(60), rng.randrange(1000)) for _ in range(4000)])
    assert tree.num_fetched > 50
    assert tree.num_deltas > 10
    assert tree.num_pushed > 4
    assert tree.num_anchors > 10


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 59), st.integers(0, 999)), max_size=120))
@settings(max_examples=150, deadline=None)
def test_a_completed_fetch_has_the_bytes_of_the_version_it_names(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    tree = Tree(tmp_path_factory.mktemp("tree"))
    for store in (tree.root, tree.stores[1], tree.stores[2]):
        tree.join(store)
    run(tree, steps)


def test_the_tree_uses_deltas_folds_and_anchors(tmp_path: Path) -> None:
    """That the property above is one of deltas, too."""
    tree = Tree(tmp_path)
    for store in tree.stores:
        tree.join(store)
    tree.publish("dense", 1)
    tree.settle()
    assert (tree.num_anchors, tree.num_deltas) == (5, 0)
    for seed in range(3):
        tree.publish("few", seed)
    tree.settle()  # the publisher's receivers get a fold, the others what the relays got
    assert (tree.num_anchors, tree.num_deltas) == (5, 5)
    for seed in range(3):
        tree.publish("few", 10 + seed)
        tree.settle()
    assert (tree.num_anchors, tree.num_deltas) == (5, 20)
    tree.publish("few", 20)
    tree.forge(tree.root, 5)
    tree.settle()
    assert tree.num_refused == 2  # the near relay and the actor at the root; who is behind the relay never sees it
