"""Which versions are kept, when their memory is written again, and that it is counted until nothing refers to it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.protocol.trajectory import PolicyVersion
from broker.weights import chain
from broker.weights.chain import FoldJob, Payload
from broker.weights.sinks import describe_as
from broker.weights.store import OutOfBudgetError, WeightStore
from tests.unit.weights.samples import CHUNK, changed, snapshot

SIZE = 5000


def put(store: WeightStore, version: PolicyVersion, size: int = SIZE) -> bool:
    """Publish random bytes as an anchor; they depend on the version."""
    manifest, data = snapshot(size, version, seed=version.version)
    draft = store.begin(size)
    draft.data[:] = data
    return store.commit(draft, manifest, None)


def step(store: WeightStore, version: PolicyVersion, num_changes: int = 20) -> Payload:
    """Publish a delta to the newest version; its payload."""
    base = store.base
    assert base is not None
    delta, payload, data = changed(
        base.manifest, np.array(base.data), version, seed=version.version, num_changes=num_changes
    )
    draft = store.begin(data.size, copy=True)
    draft.data[:] = data
    made = Payload(delta, payload)
    assert store.commit(draft, describe_as(delta, data), made)
    return made


def version(number: int) -> PolicyVersion:
    return PolicyVersion(1, number)


def anchor(store: WeightStore, number: int) -> Payload | None:
    found = store.find(version(number), None)
    assert not isinstance(found, FoldJob)
    return found


def test_only_the_newest_is_kept_without_users() -> None:
    store = WeightStore(10 * SIZE)
    assert store.newest is None
    assert put(store, version(1))
    assert put(store, version(2))
    assert store.versions == (version(2),)
    assert anchor(store, 1) is None
    assert store.live_bytes == SIZE


def test_the_next_version_is_written_over_the_one_nobody_fetches() -> None:
    store = WeightStore(2 * SIZE)
    put(store, version(1))
    first = store.base
    assert first is not None
    draft = store.begin(SIZE)
    assert draft.data is first.data
    assert draft.base is first.manifest
    assert store.newest is first.manifest  # announced still, and not served as an anchor
    assert (store.base, anchor(store, 1), store.lend((version(1), None), 0)) == (None, None, None)


@pytest.mark.parametrize("how", ["in use", "lent", "another size", "beside"])
def test_the_next_version_gets_its_own_memory(how: str) -> None:
    store = WeightStore(4 * SIZE)
    put(store, version(1))
    before = store.base
    assert before is not None
    lent = store.lend((version(1), None), 0)
    store.keep_only([(version(1), None)] if how == "in use" else [])
    if how != "lent":
        lent = None
    draft = store.begin(SIZE + (how == "another size"), beside=how == "beside", copy=True)
    assert not np.shares_memory(draft.data, before.data)
    assert store.base is before
    if how != "another size":
        assert draft.data.tobytes() == before.data.tobytes()
    del lent


def test_a_lent_chunk_stays_bit_exact_and_then_its_memory_is_used_again() -> None:
    store = WeightStore(3 * SIZE)
    put(store, version(1))
    lent = store.lend((version(1), None), 0)
    assert lent is not None
    held = [memoryview(lent.reshape(-1).view(np.uint8))]  # as a message refers to it
    expected = lent.tobytes()
    del lent
    store.keep_only([])
    put(store, version(2))
    step(store, version(3))
    assert bytes(held[0]) == expected
    assert store.lend((version(1), None), 0) is None
    assert store.live_bytes == 2 * SIZE
    held.clear()
    assert store.live_bytes == SIZE
    before = store.base
    assert before is not None
    step(store, version(4))
    after = store.base
    assert after is not None
    assert after.data is before.data


def test_an_older_version_stays_while_it_is_fetched() -> None:
    store = WeightStore(10 * SIZE)
    put(store, version(1))
    assert anchor(store, 1) is not None  # asked for
    put(store, version(2))
    put(store, version(3))
    assert store.versions == (version(1), version(3))
    store.keep_only({(version(3), None)})
    assert store.versions == (version(3),)


def test_nothing_older_replaces_the_newest() -> None:
    store = WeightStore(10 * SIZE)
    put(store, PolicyVersion(2, 0))
    for older in (PolicyVersion(1, 9), PolicyVersion(2, 0)):
        manifest, data = snapshot(SIZE, older, seed=9)
        draft = store.begin(SIZE, beside=True)
        draft.data[:] = data
        assert not store.commit(draft, manifest, None)
        del draft
    assert store.versions == (PolicyVersion(2, 0),)
    assert store.live_bytes == SIZE


def test_older_versions_make_room_and_the_newest_does_not() -> None:
    store = WeightStore(3 * SIZE)
    for number in (1, 2, 3):
        put(store, version(number))
        assert anchor(store, number) is not None
    arriving = store.begin(SIZE)
    assert store.versions == (version(2), version(3))
    second = store.begin(SIZE)
    assert store.versions == (version(3),)
    with pytest.raises(OutOfBudgetError, match=r"weights\.max_mb"):
        store.begin(SIZE)
    assert store.versions == (version(3),)
    del arriving, second
    assert store.live_bytes == SIZE


def test_a_budget_that_cannot_hold_two_is_refused_at_once() -> None:
    with pytest.raises(OutOfBudgetError, match=r"raise weights\.max_mb to 3 or more"):
        WeightStore(1 << 20).begin(1 << 20)


def test_memory_on_its_way_is_counted_and_waited_for() -> None:
    store = WeightStore(2 * SIZE)
    put(store, version(1))
    lent = store.lend((version(1), None), 0)
    assert lent is not None
    views = [memoryview(lent)]
    del lent
    store.keep_only([])
    put(store, version(2))
    assert store.versions == (version(2),)
    assert store.live_bytes == 2 * SIZE
    with pytest.raises(OutOfBudgetError):
        store.begin(SIZE, timeout_s=0.01, beside=True)
    timer = threading.Timer(0.05, views.clear)
    timer.start()
    assert store.begin(SIZE, timeout_s=10, beside=True).data.size == SIZE
    timer.join()


def test_an_abandoned_draft_leaves_the_former_version_or_nothing() -> None:
    store = WeightStore(3 * SIZE)
    put(store, version(1))
    step(store, version(2))
    store.abort(store.begin(SIZE, beside=True))
    assert (store.versions, store.live_bytes) == ((version(2),), SIZE)
    assert store.find(version(2), version(1)) is not None
    store.abort(store.begin(SIZE))  # it was written over the only copy
    assert (store.newest, store.base, store.versions) == (None, None, ())
    assert store.find(version(2), version(1)) is None
    assert store.live_bytes == 0
    put(store, version(3))
    assert store.find(version(3), version(2)) is not None  # an anchor
    assert store.find(version(3), None) is store.base


# --- deltas ---------------------------------------------------------------------------------------------------------


def test_the_cheapest_way_is_found() -> None:
    store = WeightStore(3 * SIZE)
    put(store, version(1))
    deltas = {number: step(store, version(number)) for number in (2, 3, 4)}
    assert store.find(version(4), version(3)) is deltas[4]
    job = store.find(version(4), version(1))
    assert isinstance(job, FoldJob)
    assert job.deltas == tuple(deltas.values())
    assert job.key == (version(4), version(1))
    made = job.run()
    store.add_fold(job, made)
    assert store.find(version(4), version(1)) is made
    for stranger in (None, version(0), version(4), version(9), PolicyVersion(2, 1)):
        assert store.find(version(4), stranger) is store.base
    assert store.find(version(3), version(2)) is deltas[3]  # of a version that is no longer the newest
    assert store.find(version(3), None) is None


def test_a_fold_that_failed_or_does_not_pay_is_answered_with_the_anchor_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chain, "KEPT_SHARE", 1)  # else deltas so large are not kept
    for failed in (True, False):
        store = WeightStore(3 * SIZE)
        put(store, version(1))
        num_changes = 20 if failed else SIZE // 5
        for number in (2, 3):
            step(store, version(number), num_changes)
        job = store.find(version(3), version(1))
        assert isinstance(job, FoldJob)
        made = job.run()
        assert failed or 2 * made.data.size >= SIZE
        store.add_fold(job, None if failed else made)
        assert store.find(version(3), version(1)) is store.base


def test_an_anchor_begins_the_chain_anew_and_a_fold_that_comes_late_is_dropped() -> None:
    store = WeightStore(3 * SIZE)
    put(store, version(1))
    for number in (2, 3):
        step(store, version(number))
    job = store.find(version(3), version(1))
    assert isinstance(job, FoldJob)
    put(store, PolicyVersion(2, 0))
    store.add_fold(job, job.run())
    assert store.find(version(3), version(1)) is None
    assert store.find(PolicyVersion(2, 0), version(3)) is store.base


def test_the_oldest_deltas_are_forgotten_first() -> None:
    store = WeightStore(3 * SIZE, max_delta_bytes=600)
    put(store, version(1))
    sizes = [step(store, version(number)).data.size for number in range(2, 20)]
    kept = [number for number in range(2, 20) if store.lend((version(number), version(number - 1)), 0) is not None]
    assert kept == list(range(kept[0], 20))
    assert 1 < len(kept) < 18
    assert sum(sizes[-len(kept) :]) <= 600 < sum(sizes[-len(kept) - 1 :])
    assert store.find(version(19), version(kept[0] - 2)) is store.base


def test_no_delta_is_kept_without_a_budget() -> None:
    store = WeightStore(3 * SIZE, max_delta_bytes=0)
    put(store, version(1))
    step(store, version(2))
    assert store.find(version(2), version(1)) is store.base


def test_folds_to_older_versions_go_unless_they_are_fetched() -> None:
    store = WeightStore(3 * SIZE)
    put(store, version(1))
    for number in (2, 3, 4):
        step(store, version(number))
    for have in (1, 2):
        job = store.find(version(4), version(have))
        assert isinstance(job, FoldJob)
        store.add_fold(job, job.run())
    store.keep_only([(version(4), version(2))])
    step(store, version(5))
    assert store.lend((version(4), version(2)), 0) is not None
    assert store.lend((version(4), version(1)), 0) is None


def test_a_fold_that_does_not_fit_beside_those_being_fetched_is_not_made_again_and_again() -> None:
    store = WeightStore(3 * SIZE, max_delta_bytes=1500)
    put(store, version(1))
    for number in range(2, 8):
        step(store, version(number))
    made: dict[int, int] = {}
    for have in range(1, 6):
        job = store.find(version(7), version(have))
        assert isinstance(job, FoldJob)
        fold = job.run()
        store.add_fold(job, fold)
        made[have] = fold.data.size
    served = [have for have in made if store.lend((version(7), version(have)), 0) is not None]
    assert 0 < len(served) < len(made)
    assert sum(made[have] for have in served) <= 1500
    assert all(store.find(version(7), version(have)) is store.base for have in made if have not in served)
    store.keep_only([])  # nobody fetches them any more
    step(store, version(8))
    assert isinstance(store.find(version(8), version(5)), FoldJob)


def test_a_chunk_beyond_the_last_is_an_index_error() -> None:
    store = WeightStore(3 * SIZE)
    put(store, version(1))
    with pytest.raises(IndexError, match="chunk 2 of 2"):
        store.lend((version(1), None), -(-SIZE // CHUNK))


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "step", "lend", "return", "use", "keep"]), st.integers(0, 6)), max_size=40
    )
)
@settings(max_examples=150, deadline=None)
def test_the_newest_is_there_the_budget_holds_and_lent_bytes_never_change(steps: list[tuple[str, int]]) -> None:
    store = WeightStore(4 * SIZE)
    contents: dict[PolicyVersion, bytes] = {}
    lent: list[tuple[memoryview, bytes]] = []
    for action, number in steps:
        newest = store.newest.version if store.newest else None
        try:
            if action == "put":
                put(store, version((newest.version if newest else 0) + 1 + number))
            elif action == "step" and newest is not None:
                step(store, version(newest.version + 1 + number))
        except OutOfBudgetError:
            assert store.live_bytes > 3 * SIZE
        base = store.base
        if base is not None:
            contents.setdefault(base.version, base.data.tobytes())
            assert contents[base.version] == base.data.tobytes()
            if action == "use":
                store.find(base.version, None)
            elif action == "lend":
                chunk = store.lend((base.version, None), number % 2)
                assert chunk is not None
                lent.append((memoryview(chunk), chunk.tobytes()))
                del chunk
        if action == "keep":
            store.keep_only([(version(number), None)])
        elif action == "return" and lent:
            lent.pop(number % len(lent))
        assert all(bytes(view) == expected for view, expected in lent)
        assert store.live_bytes <= 4 * SIZE
        if newest is not None:
            assert store.newest is not None
            assert store.newest.version >= newest
