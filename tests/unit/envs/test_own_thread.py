"""The thread of an episode: calls in their order in one thread, and no end that waits for a call that hangs."""

from __future__ import annotations

import asyncio
import threading

import pytest

from envs.adapters.thread import OwnThread


def stop() -> None:
    raise StopIteration("no more")


async def test_calls_run_in_one_thread_that_is_not_ours_until_it_is_closed() -> None:
    own = OwnThread("of-a-test")
    assert await own.run(divmod, 7, 2) == (3, 1)
    threads = {await own.run(threading.current_thread) for _ in range(3)}
    (thread,) = threads
    assert thread is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        await own.run(divmod, 1, 0)
    with pytest.raises(RuntimeError, match="no more"):
        await own.run(stop)
    done: list[threading.Thread] = []
    await own.close(lambda: done.append(threading.current_thread()))
    assert done == [thread]
    await own.close(lambda: done.append(thread))
    await asyncio.to_thread(thread.join, 30)
    assert (thread.is_alive(), len(done)) == (False, 1)


async def test_the_end_does_not_wait_for_a_call_that_hangs_and_comes_behind_it() -> None:
    own, release, done = OwnThread("of-a-test"), threading.Event(), threading.Event()
    hanging = asyncio.create_task(own.run(release.wait, 30))
    await asyncio.sleep(0)
    hanging.cancel()
    await own.close(done.set)
    assert not done.is_set()
    release.set()
    assert await asyncio.to_thread(done.wait, 30)


async def test_without_a_call_there_is_no_thread_to_end() -> None:
    done: list[int] = []
    await OwnThread("of-a-test").close(lambda: done.append(1))
    assert done == []
