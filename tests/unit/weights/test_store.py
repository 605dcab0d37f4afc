"""Which versions are kept, and that memory is counted until nothing refers to it."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.protocol.trajectory import PolicyVersion
from broker.weights.store import OutOfBudgetError, Snapshot, WeightStore
from tests.unit.weights.samples import snapshot

SIZE = 5000


def put(store: WeightStore, version: PolicyVersion) -> bool:
    manifest, data = snapshot(SIZE, version)
    memory = store.allocate(SIZE)
    memory[:] = data
    return store.put(Snapshot(manifest, memory))


def version(number: int) -> PolicyVersion:
    return PolicyVersion(1, number)


def test_only_the_newest_is_kept_without_users() -> None:
    store = WeightStore(10 * SIZE)
    assert store.newest is None
    assert put(store, version(1))
    assert put(store, version(2))
    assert store.versions == (version(2),)
    assert store.get(version(1)) is None
    assert store.live_bytes == SIZE


def test_an_older_version_stays_while_it_is_fetched() -> None:
    store = WeightStore(10 * SIZE)
    put(store, version(1))
    store.mark_in_use(version(1))
    put(store, version(2))
    put(store, version(3))
    assert store.versions == (version(1), version(3))
    store.keep_only({version(3)})
    assert store.versions == (version(3),)


def test_nothing_older_replaces_the_newest() -> None:
    store = WeightStore(10 * SIZE)
    put(store, PolicyVersion(2, 0))
    assert not put(store, PolicyVersion(1, 9))
    assert not put(store, PolicyVersion(2, 0))
    assert store.versions == (PolicyVersion(2, 0),)
    assert store.live_bytes == SIZE


def test_older_versions_make_room_and_the_newest_does_not() -> None:
    store = WeightStore(3 * SIZE)
    for number in (1, 2, 3):
        put(store, version(number))
        store.mark_in_use(version(number))
    arriving = store.allocate(SIZE)
    assert store.versions == (version(2), version(3))
    second = store.allocate(SIZE)
    assert store.versions == (version(3),)
    with pytest.raises(OutOfBudgetError, match=r"weights\.max_mb"):
        store.allocate(SIZE)
    assert store.versions == (version(3),)
    del arriving, second
    assert store.live_bytes == SIZE


def test_a_budget_that_cannot_hold_two_is_refused_at_once() -> None:
    with pytest.raises(OutOfBudgetError, match=r"raise weights\.max_mb to 3 or more"):
        WeightStore(1 << 20).allocate(1 << 20)


def test_a_view_on_its_way_keeps_the_memory_counted_and_is_waited_for() -> None:
    store = WeightStore(2 * SIZE)
    put(store, version(1))
    held = store.get(version(1))
    assert held is not None
    views = [memoryview(held.chunk(0))]
    del held
    put(store, version(2))
    assert store.versions == (version(2),)
    assert store.live_bytes == 2 * SIZE
    with pytest.raises(OutOfBudgetError):
        store.allocate(SIZE, timeout_s=0.01)
    timer = threading.Timer(0.05, views.clear)
    timer.start()
    assert store.allocate(SIZE, timeout_s=10).size == SIZE
    timer.join()


@given(st.lists(st.tuples(st.sampled_from(["put", "use", "keep"]), st.integers(0, 6)), max_size=40))
@settings(max_examples=100, deadline=None)
def test_the_newest_is_always_there_and_the_budget_always_holds(steps: list[tuple[str, int]]) -> None:
    store = WeightStore(4 * SIZE)
    newest: PolicyVersion | None = None
    for action, number in steps:
        if action == "put":
            assert put(store, version(number)) is (newest is None or version(number) > newest)
            newest = max(newest or version(number), version(number))
        elif action == "use":
            store.mark_in_use(version(number))
        else:
            store.keep_only({version(number)})
        assert store.live_bytes <= 4 * SIZE
        assert store.live_bytes == SIZE * len(store.versions)
        if newest is not None:
            assert store.versions[-1] == newest
