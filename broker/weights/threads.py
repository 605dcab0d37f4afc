"""The threads that code and hash weights: as many as this process has cores, one set for all. Decides nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Final, TypeVar

from broker.protocol.hashes import Run, Start, at_once

MAX_THREADS: Final = 16  # beyond that the memory is what limits

T = TypeVar("T")
R = TypeVar("R")


def num_threads() -> int:
    """As many as there are; 1: the caller's own."""
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def coding_run() -> Run:
    """What codes and hashes here: these threads, or the caller's own where the process has one core."""
    return _run if num_threads() > 1 else map


def coding_start() -> Start:
    """The same, for pieces that come one after another."""
    return _start if coding_run() is _run else at_once


def _start(work: Callable[[T], R], item: T, /) -> Future[R]:
    return _pool().submit(work, item)


def _run(work: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
    """As the built-in `map`, but all is begun at once. Where one piece fails, the others have ended when it is said."""
    pool = _pool()
    return _results([pool.submit(work, item) for item in items])


def _results(futures: list[Future[R]]) -> Iterator[R]:
    try:
        for future in futures:
            yield future.result()
    finally:
        wait(futures)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads(), thread_name_prefix="weight-coding")
