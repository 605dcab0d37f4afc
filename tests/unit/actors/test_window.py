"""The window: grows while the engine has room, shrinks when it has too little, and stays between its bounds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine import EngineLoad
from actors.window import COOLDOWN_S, DECREASE, Window

IDLE_STEPS = {"num_steps": 100, "num_full_steps": 10, "cache_use_steps": 20.0}
FULL_STEPS = {"num_steps": 100, "num_full_steps": 95, "cache_use_steps": 60.0}


class Engine:
    """Adds up what happened between looks."""

    def __init__(self, window: Window) -> None:
        self.window, self.load, self.now = window, EngineLoad(), 0.0
        window.observe(self.load, 0, 0.0)

    def look(self, num_sampling: int | None = None, after_s: float = 0.5, **happened: Any) -> int:
        sums = {name: getattr(self.load, name) + value for name, value in happened.items() if name != "num_unfinished"}
        self.load = dataclasses.replace(self.load, **sums, num_unfinished=happened.get("num_unfinished", 0))
        self.now += after_s
        return self.window.observe(self.load, self.window.size if num_sampling is None else num_sampling, self.now)


def engine(lowest: int = 2, highest: int = 100, first: int = 8, step: int = 2) -> Engine:
    return Engine(Window(lowest, highest, first, step, max_queue_s=5.0))


def test_an_engine_with_room_gets_more_episodes_up_to_the_bound() -> None:
    rig = engine(highest=11)
    assert [rig.look(**IDLE_STEPS) for _ in range(3)] == [10, 11, 11]


def test_so_does_one_that_is_idle_because_all_tools_are_slow() -> None:
    assert engine().look() == 10


def test_but_not_one_that_is_paused_with_requests_in_flight() -> None:
    assert engine().look(num_unfinished=3) == 8


def test_a_full_batch_or_cache_holds_the_window() -> None:
    rig = engine()
    assert rig.look(**FULL_STEPS) == 8
    assert rig.look(num_steps=100, num_full_steps=0, cache_use_steps=95.0) == 8


def test_a_window_that_is_not_used_does_not_grow() -> None:
    assert engine().look(num_sampling=7, **IDLE_STEPS) == 8


def test_preemptions_for_want_of_memory_shrink_it_once_in_a_while() -> None:
    rig = engine(first=80)
    short = {"num_steps": 100, "num_full_steps": 100, "cache_use_steps": 97.0, "num_preemptions": 1}
    assert rig.look(**short) == 60
    assert rig.look(**short) == 60
    assert rig.look(after_s=COOLDOWN_S, **short) == 45


def test_the_preemptions_of_an_adoption_say_nothing() -> None:
    assert engine().look(num_steps=100, num_full_steps=100, cache_use_steps=30.0, num_preemptions=8) == 8


def test_a_long_queue_shrinks_it() -> None:
    rig = engine(first=80)
    assert rig.look(num_turns=10, queue_s=49.0, **FULL_STEPS) == 80
    assert rig.look(num_turns=10, queue_s=51.0, **FULL_STEPS) == 60


def test_what_was_not_used_is_given_up_first() -> None:
    assert engine(first=80).look(num_sampling=40, num_turns=1, queue_s=9.0) == 30


def test_another_engine_begins_from_zero() -> None:
    rig = engine()
    rig.look(num_preemptions=7, **FULL_STEPS)
    rig.load = EngineLoad(num_steps=3, num_preemptions=0)
    assert rig.look() == 8


@pytest.mark.parametrize("bounds", [(0, 4, 1), (5, 4, 1), (1, 4, 0)])
def test_bounds_that_make_no_sense_are_refused(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="makes no sense"):
        Window(bounds[0], bounds[1], 1, bounds[2], 1.0)


LOOKS = st.lists(
    st.tuples(
        st.integers(0, 200),  # sampling
        st.floats(0.0, 10.0),  # seconds
        st.integers(0, 50),  # steps
        st.floats(0, 1),  # of them full
        st.floats(0, 1),  # cache
        st.integers(0, 3),  # preemptions
        st.integers(0, 9),  # turns
        st.floats(0, 100),  # seconds in the queue
        st.integers(0, 64),  # unfinished
    ),
    max_size=40,
)


@given(st.integers(1, 50), st.integers(0, 100), st.integers(1, 200), st.integers(1, 16), LOOKS)
def test_whatever_is_seen_it_stays_within_bounds_and_moves_by_one_step_or_one_decrease(
    lowest: int, spread: int, first: int, step: int, looks: list[Any]
) -> None:
    window = Window(lowest, lowest + spread, first, step, 5.0)
    rig = Engine(window)
    decreased_at = float("-inf")
    for sampling, seconds, steps, full, cache, preempted, turns, queue_s, unfinished in looks:
        before = window.size
        size = rig.look(
            sampling,
            seconds,
            num_steps=steps,
            num_full_steps=int(full * steps),
            cache_use_steps=cache * steps,
            num_preemptions=preempted,
            num_turns=turns,
            queue_s=queue_s,
            num_unfinished=unfinished,
        )
        assert lowest <= size <= lowest + spread
        assert size <= before + step
        if size > before:
            assert sampling >= before  # what was allowed was used
        if size < before:
            assert size >= min(lowest, int(min(before, sampling) * DECREASE))
            assert rig.now - decreased_at >= COOLDOWN_S
            decreased_at = rig.now


def test_with_slow_tools_it_settles_where_the_batch_is_full_and_no_further() -> None:
    """A model of an engine: a share of the running episodes want it at any time, and its batch has 16 places."""
    rig = engine(lowest=1, highest=1000, first=16, step=2)
    sizes = []
    for _ in range(400):
        wanted = 0.1 * rig.window.size
        full = 1.0 if wanted > 18 else max(0.0, (wanted - 14) / 4)
        queue_s = max(0.0, wanted - 16) * 0.5
        sizes.append(
            rig.look(
                num_steps=50, num_full_steps=round(50 * full), num_turns=10, queue_s=10 * queue_s, num_unfinished=9
            )
        )
    assert 170 <= min(sizes[200:]) <= max(sizes[200:]) <= 190
