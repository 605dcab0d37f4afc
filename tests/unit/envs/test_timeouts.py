"""A limit holds whatever is behind it: hanging, ignoring its cancellation, wanting to end the process."""

from __future__ import annotations

import asyncio
import sys

import pytest

from envs import timeouts
from envs.timeouts import OutOfTimeError, num_abandoned, within


class Stubborn:
    """Ignores its cancellation until it is released."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.num_cancelled = 0

    async def __call__(self) -> str:
        while not self.released.is_set():
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                self.num_cancelled += 1
        raise KeyError("too late to matter")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "CANCEL_GRACE_S", 0.01)


async def answer(text: str) -> str:
    await asyncio.sleep(0)
    if text == "raise":
        raise KeyError(text)
    if text == "exit":
        sys.exit(3)
    if text == "cancel":
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        await asyncio.sleep(1)
    return text


async def test_what_ends_in_time_is_itself() -> None:
    assert await within(answer("well"), 60) == "well"
    assert await within(answer("well"), None) == "well"
    with pytest.raises(KeyError):
        await within(answer("raise"), 60)


async def test_what_hangs_is_cancelled_and_said_to_be_out_of_time() -> None:
    cleaned = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    with pytest.raises(OutOfTimeError, match=r"longer than 0\.01 s") as error:
        await within(hang(), 0.01)
    assert error.value.limit_s == 0.01
    assert cleaned.is_set()


async def test_what_ignores_its_cancellation_is_left_to_itself_and_forgotten_when_it_ends() -> None:
    stubborn, before = Stubborn(), num_abandoned()
    with pytest.raises(OutOfTimeError):
        await within(stubborn(), 0.01)
    assert (num_abandoned(), stubborn.num_cancelled) == (before + 1, 1)
    stubborn.released.set()
    while num_abandoned() > before:
        await asyncio.sleep(0)


async def test_neither_the_process_nor_the_caller_ends_with_it() -> None:
    with pytest.raises(RuntimeError, match="end of the process"):
        await within(answer("exit"), 60)
    with pytest.raises(RuntimeError, match="cancelled itself"):
        await within(answer("cancel"), 60)


async def test_it_ends_with_its_caller() -> None:
    stubborn, before = Stubborn(), num_abandoned()
    caller = asyncio.create_task(within(stubborn(), None))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert (num_abandoned(), stubborn.num_cancelled) == (before + 1, 1)
    stubborn.released.set()
    while num_abandoned() > before:
        await asyncio.sleep(0)


@pytest.mark.filterwarnings("error")
async def test_time_that_was_up_before_it_began_is_no_warning() -> None:
    with pytest.raises(OutOfTimeError):
        await within(answer("never"), 0)


def test_the_process_can_end_although_something_ignores_its_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "_abandoned", set())  # it never ends, and is not to be counted by other tests

    async def main() -> None:
        with pytest.raises(OutOfTimeError):
            await within(Stubborn()(), 0.01)

    asyncio.run(main())  # would wait for ever
