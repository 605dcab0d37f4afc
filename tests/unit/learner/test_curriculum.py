"""Which tickets are issued: the same ones every time, never too many."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.process.settings import EnvironmentSection, Settings
from broker.protocol.trajectory import Mode, PolicyVersion
from learner.curriculum import (
    REFERENCE_FIRST_INDEX,
    Curriculum,
    EnvironmentSchedule,
    eval_tickets,
    reference_tickets,
)

NEWEST = PolicyVersion(3, 7)


def make_settings(**learner: int) -> Settings:
    values = {"groups_per_step": 2, "group_size": 4, "max_staleness": 1, "max_groups_per_step": 4} | learner
    return Settings.model_validate({"run": {"name": "r1"}, "learner": values, "eval": {"tasks": 5}})


def test_ids_are_the_same_after_a_resume() -> None:
    settings = make_settings()
    first = Curriculum(settings).top_up(0, 100, NEWEST)
    resumed = Curriculum(settings, next_group=2).top_up(8, 100, PolicyVersion(4, 9))
    assert [t.ticket_id for t in first[8:]] == [t.ticket_id for t in resumed]
    assert [t.task for t in first[8:]] == [t.task for t in resumed]
    assert first[0].ticket_id == "r1/train/0/0"
    assert first[0].min_version == NEWEST
    assert {t.task.index for t in first[:4]} == {0}


@given(outstanding=st.integers(0, 40), remaining=st.integers(0, 10))
def test_admission_never_exceeds_staleness_or_need(outstanding: int, remaining: int) -> None:
    tickets = Curriculum(make_settings()).top_up(outstanding, remaining, NEWEST)
    assert len(tickets) % 4 == 0
    if tickets:
        assert outstanding + len(tickets) <= min(2 * 8, remaining * 8 + 2)
    elif remaining:
        assert outstanding + 4 > min(2 * 8, remaining * 8 + 2)


def test_a_result_of_a_group_issued_after_the_checkpoint_moves_the_counter() -> None:
    curriculum = Curriculum(make_settings(), next_group=2)
    curriculum.note("r1/train/6")
    curriculum.note("r1/train/3")
    assert curriculum.next_group == 7
    assert curriculum.num_issued == 28


@given(weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=4))
def test_environments_get_their_share_and_consecutive_tasks(weights: list[float]) -> None:
    environments = [EnvironmentSection(name=f"e{i}", weight=w) for i, w in enumerate(weights)]
    schedule = EnvironmentSchedule(environments)
    drawn = [schedule.task(g) for g in range(200)]
    counts = Counter(name for name, _ in drawn)
    for environment in environments:
        share = 200 * environment.weight / sum(weights)
        assert abs(counts[environment.name] - share) <= len(weights)
        indices = [index for name, index in drawn if name == environment.name]
        assert indices == list(range(len(indices)))


def test_evaluation_tickets_are_paired_over_phases() -> None:
    settings = make_settings()
    before = eval_tickets(settings, "before", "sampled", 5, NEWEST)
    after = eval_tickets(settings, "after", "greedy", 5, NEWEST)
    assert [t.task for t in before] == [t.task for t in after]
    assert before[0].ticket_id == "r1/eval/before/sampled/0"
    assert {t.task.split for t in before} == {"heldout"}
    assert {t.sampling.temperature for t in after} == {0.0}
    assert {t.group_size for t in before} == {1}
    assert {t.mode for t in before} == {Mode.EVAL}
    assert before[0].min_version == NEWEST


def test_reference_tasks_are_never_training_tasks() -> None:
    settings = Settings.model_validate({"learner": {"warm_start": {"episodes": 6}}})
    tickets = reference_tickets(settings)
    assert [t.task.index for t in tickets] == [REFERENCE_FIRST_INDEX + i for i in range(6)]
    assert tickets[0].ticket_id == "run/reference/0"
    assert {t.mode for t in tickets} == {Mode.REFERENCE}


@pytest.mark.parametrize("episodes", [0, 3])
def test_reference_count(episodes: int) -> None:
    settings = Settings.model_validate({"learner": {"warm_start": {"episodes": episodes}}})
    assert len(reference_tickets(settings)) == episodes
