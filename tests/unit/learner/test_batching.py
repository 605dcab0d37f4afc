"""The batcher: groups close, flat ones are replaced, nothing tainted reaches the gradient, everything leaves once."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.process.loss_settings import LossSection
from broker.protocol.trajectory import Outcome, Verdict
from learner.batching import Batch, Batcher, Reason, judge, train_sequence
from tests.unit.learner.make import make_segment, make_ticket, make_trajectory


class Dead(NamedTuple):
    ticket_id: str
    group_id: str


def make_batcher(**changes: object) -> Batcher:
    values = {
        "groups_per_step": 2,
        "max_groups_per_step": 4,
        "group_size": 2,
        "max_staleness": 2,
        "loss": LossSection(),
    }
    return Batcher(**(values | changes))  # type: ignore[arg-type]


def add_group(batcher: Batcher, group: int, rewards: tuple[float, ...]) -> None:
    for member, reward in enumerate(rewards):
        assert batcher.add(make_trajectory(make_ticket(group, member, len(rewards)), reward))


def reasons(batch: Batch) -> dict[str, str]:
    return {item.trajectory.ticket.ticket_id: item.reason.value for item in batch.consumed}


def test_a_batch_needs_groups_with_variance() -> None:
    batcher = make_batcher()
    add_group(batcher, 0, (1.0, 0.0))
    add_group(batcher, 1, (1.0, 1.0))
    assert batcher.next(0) is None
    assert batcher.num_without_gradient == 2
    add_group(batcher, 2, (0.0, 1.0))
    batch = batcher.next(0)
    assert batch is not None
    assert (batch.num_groups, batch.num_zero_variance_groups, len(batch.sequences)) == (3, 1, 4)
    assert reasons(batch)["run/train/1/0"] == "zero_variance"
    assert [s.advantage for s in batch.sequences] == [0.5, -0.5, -0.5, 0.5]
    assert batcher.num_held == 0


def test_too_many_flat_groups_end_the_gathering() -> None:
    batcher = make_batcher()
    for group in range(4):
        add_group(batcher, group, (0.0, 0.0))
    batch = batcher.next(0)
    assert batch is not None
    assert batch.sequences == ()
    assert len(batch.consumed) == 8
    assert batcher.next(0) is None


def test_groups_beyond_the_batch_stay_for_the_next_one() -> None:
    batcher = make_batcher()
    for group in range(3):
        add_group(batcher, group, (0.0, 1.0))
    first = batcher.next(0)
    assert first is not None
    assert first.num_groups == 2
    assert batcher.num_ready_groups == 1
    assert batcher.num_held == 2


def test_a_dead_letter_closes_its_group() -> None:
    batcher = make_batcher(groups_per_step=1, group_size=3)
    for member, reward in enumerate((1.0, 0.0)):
        batcher.add(make_trajectory(make_ticket(0, member, 3), reward))
    assert batcher.next(0) is None
    batcher.add_dead(Dead("run/train/0/2", "run/train/0"))
    batch = batcher.next(0)
    assert batch is not None
    assert batch.dead_ids == ("run/train/0/2",)
    assert set(batch.ids) == {f"run/train/0/{i}" for i in range(3)}


def test_screened_and_failed_episodes_enter_neither_gradient_nor_baseline() -> None:
    batcher = make_batcher(groups_per_step=1, group_size=5)
    episodes = [
        make_trajectory(make_ticket(0, 0, 5), 1.0),
        make_trajectory(make_ticket(0, 1, 5), 0.0),
        make_trajectory(make_ticket(0, 2, 5), 9.0, verdict=Verdict.SCREENED),
        make_trajectory(make_ticket(0, 3, 5), 9.0, outcome=Outcome.EXPLOIT),
        make_trajectory(make_ticket(0, 4, 5), 9.0, outcome=Outcome.ENV_FAILURE),
    ]
    for episode in episodes:
        batcher.add(episode)
    batch = batcher.next(0)
    assert batch is not None
    assert [s.advantage for s in batch.sequences] == [0.5, -0.5]
    assert list(reasons(batch).values()) == ["trained", "trained", "screened", "screened", "env_failure"]


def test_timeouts_and_truncations_count_with_their_grade() -> None:
    episodes = [
        make_trajectory(make_ticket(0, i, 3), 0.5, outcome=outcome)
        for i, outcome in enumerate((Outcome.TIMEOUT, Outcome.TRUNCATED_TOKENS, Outcome.TRUNCATED_TURNS))
    ]
    assert judge(episodes, LossSection())[1].all()


def test_tokens_beyond_the_bound_are_masked_and_counted() -> None:
    segment = make_segment(sampled=(3, 4, 5), versions=(1, 6, 9))
    sequence = train_sequence(segment, 1.0, version=9, max_staleness=3)
    assert sequence.staleness_T.tolist() == [0, 0, 8, 3, 0]
    assert sequence.loss_mask_T.tolist() == [False, False, False, True, True]


def test_a_newer_version_of_a_lost_history_counts_as_fresh() -> None:
    sequence = train_sequence(make_segment(versions=(9, 9, 9)), 1.0, version=4, max_staleness=0)
    assert sequence.staleness_T.max() == 0


def test_a_wholly_stale_trajectory_is_masked() -> None:
    batcher = make_batcher(groups_per_step=1)
    old = make_segment(versions=(0, 0, 0))
    batcher.add(make_trajectory(make_ticket(0, 0), 1.0, segment=old))
    batcher.add(make_trajectory(make_ticket(0, 1), 0.0, segment=make_segment(versions=(7, 7, 7))))
    batch = batcher.next(8)
    assert batch is not None
    assert list(reasons(batch).values()) == ["stale", "trained"]
    assert batch.num_stale_tokens == 3
    assert batch.staleness_N.tolist() == [1, 1, 1]


def test_a_second_trajectory_of_a_ticket_is_refused() -> None:
    batcher = make_batcher()
    assert batcher.add(make_trajectory())
    assert not batcher.add(make_trajectory())
    assert batcher.num_refused == 1


@settings(deadline=None)
@given(
    rewards=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=20),
    order=st.randoms(use_true_random=False),
    groups_per_step=st.integers(1, 3),
)
def test_everything_that_goes_in_comes_out_once(
    rewards: list[tuple[int, int]], order: object, groups_per_step: int
) -> None:
    batcher = make_batcher(groups_per_step=groups_per_step)
    arrivals = [(g, m, r) for g, pair in enumerate(rewards) for m, r in enumerate(pair)]
    order.shuffle(arrivals)  # type: ignore[attr-defined]
    out: list[str] = []
    for group, member, reward in arrivals:
        batcher.add(make_trajectory(make_ticket(group, member), float(reward)))
        while (batch := batcher.next(0)) is not None:
            out += batch.ids
            assert batch.num_groups - batch.num_zero_variance_groups <= groups_per_step
            trained = sum(item.reason is Reason.TRAINED for item in batch.consumed)
            assert trained == len(batch.sequences)
            assert sum(s.advantage for s in batch.sequences) == pytest.approx(0)
    out += batcher.drain().ids
    assert sorted(out) == sorted(f"run/train/{g}/{m}" for g, m, _ in arrivals)
    assert batcher.num_held == 0
    assert np.asarray(batcher.num_ready_groups) == 0


def test_overlong_episodes_are_kept_masked_or_punished() -> None:
    def batch_of(**loss: object) -> Batch:
        batcher = make_batcher(groups_per_step=1, group_size=4, loss=LossSection.model_validate(loss))
        lengths = (2, 4, 6, 6)
        outcomes = (Outcome.COMPLETED, Outcome.TIMEOUT, Outcome.COMPLETED, Outcome.TRUNCATED_TOKENS)
        for member, (length, outcome) in enumerate(zip(lengths, outcomes, strict=True)):
            segment = make_segment(sampled=range(3, 3 + length))
            reward = 1.0 if member < 2 else 0.0
            batcher.add(make_trajectory(make_ticket(0, member, 4), reward, outcome=outcome, segment=segment))
        batch = batcher.next(0)
        assert batch is not None
        return batch

    kept = batch_of(overlong="keep")
    assert [s.advantage for s in kept.sequences] == [0.5, 0.5, -0.5, -0.5]

    masked = batch_of(overlong="mask")
    assert list(reasons(masked).values()) == ["trained", "trained", "trained", "overlong"]
    assert [s.advantage for s in masked.sequences] == pytest.approx([1 / 3, 1 / 3, -2 / 3])  # of three, not of four

    soft = batch_of(overlong="soft", overlong_tokens=6, overlong_buffer=4)
    punished = np.asarray([1.0, 1.0 - 0.5, 0.0 - 1.0, 0.0 - 1.0])
    assert [s.advantage for s in soft.sequences] == pytest.approx(list(punished - punished.mean()))
    assert [item.trajectory.head.reward for item in soft.consumed] == [1.0, 1.0, 0.0, 0.0]  # what is reported stays


def test_soft_punishment_can_make_a_gradient_of_a_group_without_one() -> None:
    batcher = make_batcher(groups_per_step=1, loss=LossSection(overlong="soft", overlong_tokens=4, overlong_buffer=2))
    for member, length in enumerate((2, 4)):
        batcher.add(make_trajectory(make_ticket(0, member), 0.0, segment=make_segment(sampled=range(3, 3 + length))))
    batch = batcher.next(0)
    assert batch is not None
    assert [s.advantage for s in batch.sequences] == [0.5, -0.5]


def test_segments_of_an_episode_share_its_weight_by_their_trained_tokens() -> None:
    batcher = make_batcher(groups_per_step=1)
    stale = make_segment(versions=(0, 0, 0))
    fresh = [make_segment(versions=(7, 7, 7)), make_segment(sampled=(5, 6), versions=(7, 7))]
    several = replace(make_trajectory(make_ticket(0, 0), 1.0), segments=(*fresh, stale))
    batcher.add(several)
    batcher.add(make_trajectory(make_ticket(0, 1), 0.0, segment=fresh[0]))
    batch = batcher.next(8)
    assert batch is not None
    assert [s.weight for s in batch.sequences] == pytest.approx([3 / 5, 2 / 5, 1.0])


def test_the_baseline_and_its_scale_are_chosen_in_the_settings() -> None:
    batcher = make_batcher(groups_per_step=1, loss=LossSection(baseline="leave_one_out", divide_by_std=True))
    add_group(batcher, 0, (1.0, 0.0))
    batch = batcher.next(0)
    assert batch is not None
    assert [s.advantage for s in batch.sequences] == pytest.approx([2**0.5, -(2**0.5)], rel=1e-5)
