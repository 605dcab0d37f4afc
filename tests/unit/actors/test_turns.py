"""Which turns may start while an engine drains."""

from __future__ import annotations

import asyncio

import pytest

from actors.turns import Turns


class Turn:
    """One that starts when it may and ends when it is told to."""

    def __init__(self, turns: Turns) -> None:
        self.started, self.end = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._run(turns))

    async def _run(self, turns: Turns) -> None:
        async with turns.turn():
            self.started.set()
            await self.end.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_drain_waits_for_turns_in_flight_and_lets_none_start() -> None:
    turns = Turns()
    first, second = Turn(turns), Turn(turns)
    await settle()
    draining = asyncio.create_task(turns.drain(60))
    await settle()
    late = Turn(turns)
    first.end.set()
    await settle()
    assert (draining.done(), late.started.is_set()) == (False, False)
    second.end.set()
    assert await draining
    assert not late.started.is_set()
    turns.admit()
    await asyncio.wait_for(late.started.wait(), 5)
    late.end.set()
    await late.task


async def test_a_drain_that_takes_too_long_says_so_and_the_turn_goes_on() -> None:
    turns = Turns()
    slow = Turn(turns)
    await settle()
    assert not await turns.drain(0.01)
    turns.admit()
    other = Turn(turns)
    await asyncio.wait_for(other.started.wait(), 5)
    assert not slow.task.done()
    slow.end.set()
    other.end.set()
    assert await turns.drain(5)


async def test_nothing_in_flight_is_drained_at_once() -> None:
    assert await Turns().drain(5)


async def test_a_turn_that_fails_or_is_cancelled_has_ended() -> None:
    turns = Turns()
    cancelled = Turn(turns)
    await settle()
    cancelled.task.cancel()

    async def failing() -> None:
        async with turns.turn():
            raise ValueError("the engine refused it")

    with pytest.raises(ValueError, match="refused"):
        await failing()
    assert await turns.drain(5)


async def test_a_turn_cancelled_while_it_waits_was_never_in_flight() -> None:
    turns = Turns()
    assert await turns.drain(5)
    waiting = Turn(turns)
    await settle()
    waiting.task.cancel()
    await asyncio.gather(waiting.task, return_exceptions=True)
    turns.admit()
    assert await turns.drain(5)
