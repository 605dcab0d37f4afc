"""How hard tasks are, and which one comes next."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.process.learner_settings import CurriculumSection
from learner.difficulty import TaskPool


def make_pool(num_tasks: int | None = None, **values: Any) -> TaskPool:
    return TaskPool(CurriculumSection.model_validate(values), "seed", num_tasks)


def test_without_a_band_every_task_comes_in_order() -> None:
    pool = make_pool()
    assert [pool.choose(g) for g in range(5)] == [0, 1, 2, 3, 4]
    pool.learn(1, 0.5, 1)
    assert pool.choose(5) == 5
    finite = make_pool(num_tasks=3)
    assert [finite.choose(g) for g in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_tasks_in_the_band_come_again_the_longest_waiting_first() -> None:
    pool = make_pool(band=(0.2, 0.8), explore=0.0)
    rates = {0: 0.0, 1: 0.5, 2: 1.0, 3: 0.25}
    assert [pool.choose(g) for g in range(4)] == [0, 1, 2, 3]  # nothing is known yet
    for index, rate in rates.items():
        pool.learn(index, rate, index)
    assert [pool.choose(4), pool.choose(5)] == [1, 3]
    assert pool.choose(6) == 4  # both are on their way: a new one
    pool.learn(3, 0.25, 5)
    assert pool.choose(7) == 3
    pool.learn(1, 1.0, 4)
    assert pool.counts() == {"never": 1, "sometimes": 2, "always": 1}
    pool.learn(3, 1.0, 7)  # 0.25 -> 0.25 -> 0.625
    pool.learn(1, 1.0, 4)  # 0.75 -> 0.875, out of the band
    assert pool.choose(8) == 3


def test_a_share_of_the_groups_explores() -> None:
    pool = make_pool(band=(0.0, 1.0), explore=0.25, memory=100_000)
    pool.choose(0)
    pool.learn(0, 0.5, 0)
    fresh = 0
    for group in range(1, 4001):
        before = pool.to_state()["next"]
        index = pool.choose(group)
        fresh += pool.to_state()["next"] > before
        pool.learn(index, 0.5, group)
    assert fresh / 4000 == pytest.approx(0.25, abs=0.03)


def test_the_running_rate_forgets() -> None:
    pool = make_pool(smoothing=0.5)
    for rate in (0.0, 1.0, 1.0):
        pool.learn(0, rate, 0)
    assert pool.to_state()["tasks"] == [[0, 0.75, 3, 0, 0]]


def test_a_task_whose_group_never_closed_comes_again_in_the_end() -> None:
    pool = make_pool(band=(0.2, 0.8), explore=0.0)
    pool.choose(0)
    pool.learn(0, 0.5, 0)
    assert pool.choose(1) == 0
    assert pool.choose(2) != 0
    assert pool.choose(300) == 0


def test_how_hard_a_task_is_depends_on_the_budget() -> None:
    pool = make_pool(band=(0.2, 0.8), explore=0.0)
    for group, bucket in enumerate(("0", "unlimited", "16-63")):
        assert pool.choose(group, bucket) == group  # every task comes once, whatever its budget
    pool.learn(0, 0.0, 0, "0")
    pool.learn(1, 0.5, 1, "unlimited")
    assert pool.choose(3, "0") == 3  # no task is half solved without thinking
    assert pool.choose(4, "unlimited") == 1
    pool.learn(1, 0.5, 5, "0")  # the same task, another rate
    assert pool.choose(6, "0") == 1
    again = TaskPool(CurriculumSection(band=(0.2, 0.8)), "seed", None, json.loads(json.dumps(pool.to_state())))
    assert again.to_state() == pool.to_state()
    assert pool.to_state()["tasks"] == [[0, 0.0, 1, 0, 0, "0"], [1, 0.5, 1, 4, 1], [1, 0.5, 1, 6, 1, "0"]]


@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from([0.0, 0.5, 1.0])), max_size=200), st.integers(1, 10))
def test_memory_is_bounded_and_keeps_the_band(results: list[tuple[int, float]], memory: int) -> None:
    pool = make_pool(band=(0.4, 0.6), memory=memory)
    for group, (index, rate) in enumerate(results):
        pool.learn(index, rate, group)
        tasks = pool.to_state()["tasks"]
        assert len(tasks) <= memory
    state = json.loads(json.dumps(pool.to_state()))
    again = TaskPool(CurriculumSection(band=(0.4, 0.6), memory=memory), "seed", None, state)
    assert again.to_state() == pool.to_state()
    assert [again.choose(g) for g in range(1000, 1020)] == [pool.choose(g) for g in range(1000, 1020)]


def test_what_is_forgotten_first_lies_outside_the_band() -> None:
    pool = make_pool(band=(0.4, 0.6), memory=2)
    pool.learn(0, 0.5, 0)
    pool.learn(1, 1.0, 1)
    pool.learn(2, 0.5, 2)
    assert [row[0] for row in pool.to_state()["tasks"]] == [0, 2]
