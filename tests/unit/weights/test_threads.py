"""The threads that code weights: results in order, all at work at once, and none left at work after a failure."""

from __future__ import annotations

import os
import threading

import pytest

from broker.protocol.hashes import at_once
from broker.weights import threads


def test_one_core_needs_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert threads.coding_run() is map
    assert threads.coding_start() is at_once
    done = threads.coding_start()(int, "x")
    assert isinstance(done.exception(), ValueError)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    threads._pool.cache_clear()


def test_two_at_a_time_and_in_order(two_cores: None) -> None:
    both = threading.Barrier(2, timeout=30)

    def work(item: int) -> int:
        both.wait()
        return -item

    assert list(threads.coding_run()(work, range(6))) == [0, -1, -2, -3, -4, -5]
    start = threads.coding_start()
    assert [future.result() for future in [start(work, item) for item in range(6)]] == [0, -1, -2, -3, -4, -5]


def test_a_failure_is_said_when_all_others_have_ended(two_cores: None) -> None:
    failed, ended = threading.Event(), list[int]()

    def work(item: int) -> None:
        if item == 0:
            failed.set()
            raise MemoryError
        assert failed.wait(30)
        ended.append(item)

    with pytest.raises(MemoryError):
        list(threads.coding_run()(work, range(5)))
    assert sorted(ended) == [1, 2, 3, 4]
