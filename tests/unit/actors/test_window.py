"""The window: grows while the engine has room, shrinks when it has too little, and stays between its bounds."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine import EngineLoad
from actors.window import DECREASE, PERIOD_S, Window

ROOM = {"num_steps": 100, "num_full_steps": 10, "cache_use_steps": 20.0}
FULL = {"num_steps": 100, "num_full_steps": 95, "cache_use_steps": 60.0}
SHORT = {"num_steps": 100, "num_full_steps": 100, "cache_use_steps": 97.0, "num_preemptions": 1}


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
    return Engine(Window(lowest, highest, first, step, max_queue=0.5))


def test_an_engine_with_room_gets_more_episodes_up_to_the_bound() -> None:
    rig = engine(highest=11)
    assert [rig.look(**ROOM) for _ in range(3)] == [10, 11, 11]


def test_so_does_one_that_is_idle_because_all_tools_are_slow() -> None:
    assert engine().look() == 10


def test_but_not_one_that_is_paused_with_requests_in_flight() -> None:
    assert engine().look(num_unfinished=3) == 8


def test_a_full_batch_or_cache_holds_the_window() -> None:
    rig = engine()
    assert rig.look(**FULL) == 8
    assert rig.look(num_steps=100, num_full_steps=0, cache_use_steps=95.0) == 8


def test_a_window_that_is_not_used_does_not_grow() -> None:
    assert engine().look(num_sampling=7, **ROOM) == 8


def test_preemptions_for_want_of_memory_shrink_it_once_in_a_period() -> None:
    rig = engine(first=80)
    assert rig.look(**SHORT) == 80
    assert rig.look(after_s=PERIOD_S, **FULL) == 72  # whenever in the period they were
    assert rig.look(**SHORT) == 72
    assert rig.look(after_s=PERIOD_S, **FULL) == 64


def test_the_preemptions_of_an_adoption_say_nothing() -> None:
    rig = engine()
    adoption = {"num_steps": 100, "num_full_steps": 100, "cache_use_steps": 30.0, "num_preemptions": 8}
    assert rig.look(after_s=PERIOD_S, **adoption) == 8


def test_a_long_queue_shrinks_it() -> None:
    rig = engine(first=80)
    assert rig.look(after_s=PERIOD_S, queue_s=49.0, sampling_s=100.0, **FULL) == 80
    assert rig.look(after_s=PERIOD_S, queue_s=51.0, sampling_s=100.0, **FULL) == 72


def test_what_was_not_used_is_given_up_first() -> None:
    assert engine(first=80).look(num_sampling=40, after_s=PERIOD_S, queue_s=9.0, sampling_s=1.0) == 36


def test_another_engine_begins_from_zero() -> None:
    rig = engine()
    rig.look(**SHORT)
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
        st.floats(0, 100),  # seconds in the queue
        st.floats(0, 100),  # seconds of sampling
        st.integers(0, 64),  # unfinished
    ),
    max_size=40,
)


@given(st.integers(1, 50), st.integers(0, 100), st.integers(1, 200), st.integers(1, 16), LOOKS)
def test_whatever_is_seen_it_stays_within_bounds_and_moves_by_one_step_or_one_decrease(
    lowest: int, spread: int, first: int, step: int, looks: list[Any]
) -> None:
    window = Window(lowest, lowest + spread, first, step, 0.5)
    rig = Engine(window)
    decreased_at = 0.0
    for sampling, seconds, steps, full, cache, preempted, queue_s, sampling_s, unfinished in looks:
        before = window.size
        size = rig.look(
            sampling,
            seconds,
            num_steps=steps,
            num_full_steps=int(full * steps),
            cache_use_steps=cache * steps,
            num_preemptions=preempted,
            queue_s=queue_s,
            sampling_s=sampling_s,
            num_unfinished=unfinished,
        )
        assert lowest <= size <= lowest + spread
        assert size <= before + step
        if size > before:
            assert sampling >= before  # what was allowed was used
        if size < before:
            assert size >= min(lowest, int(min(before, sampling) * DECREASE))
            assert rig.now - decreased_at >= PERIOD_S - 1e-9
            decreased_at = rig.now


class Shop:
    """A model of an engine with 16 places and of episodes of which a share is in the queue or the batch, the others
    waiting for their tools; the share wanders, as heavy-tailed tools make it."""

    def __init__(self, share: float) -> None:
        self.share, self.rng = share, random.Random(3)

    def half_a_second(self, num_episodes: int) -> dict[str, Any]:
        wanted = num_episodes * self.share + self.rng.gauss(0, 2)
        full = 1.0 if wanted >= 16 else 0.0
        queued = max(0.0, wanted - 16)
        return {
            "num_steps": 5,
            "num_full_steps": round(5 * full),
            "queue_s": queued * 0.5,
            "sampling_s": min(wanted, 16) * 0.5,
            "num_unfinished": 9,
        }


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_with_tools_of_any_length_it_settles_where_the_batch_is_full_and_the_queue_short(share: float) -> None:
    rig, shop = engine(lowest=1, highest=1000, first=16, step=2), Shop(share)
    sizes, full = [], []
    for _ in range(2000):
        seen = shop.half_a_second(rig.window.size)
        full.append(seen["num_full_steps"] / 5)
        sizes.append(rig.look(**seen))
    assert sum(full[800:]) / 1200 > 0.9
    assert max(sizes[800:]) * share < 16 * 1.5 + 4
