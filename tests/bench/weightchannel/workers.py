"""Processes of the benchmark that do what they are told, and what the system says of a process.

Owns starting, calling and ending them; knows nothing of weights. A worker keeps `state` between calls, so that what one
call opens the next one uses.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

State = dict[str, Any]
LIMIT_S = 300.0  # a call that takes longer has hung
SAMPLE_S = 0.005


class Usage(NamedTuple):
    """What some work took. Seconds of the clock, and of the CPU by all threads of the process."""

    seconds: float
    cpu_s: float


class Worker:
    """One process. `call` runs a module's function there as `function(state, *arguments)`."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), name=f"bench-{name}", daemon=True)
        self._process.start()
        theirs.close()
        self.name = name

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Start a call; `answer` is due."""
        self._pipe.send((function, arguments))

    def answer(self) -> Any:
        """What the call returns. Raises RuntimeError with the worker's traceback where it failed."""
        if not self._pipe.poll(LIMIT_S):
            raise RuntimeError(f"{self.name} does not answer")
        worked, answer = self._pipe.recv()
        if not worked:
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Do something there."""
        self.begin(function, *arguments)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _work(pipe: Connection) -> None:
    state: State = {}
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(state, *arguments)))
        except Exception:  # noqa: BLE001  it is the caller's to judge
            pipe.send((False, traceback.format_exc()))


@contextmanager
def workers(*names: str, start: Callable[[str], Worker] = Worker) -> Iterator[list[Worker]]:
    """Some workers, ended afterwards."""
    started: list[Worker] = []
    try:
        for name in names:
            started.append(start(name))
        yield started
    finally:
        for worker in started:
            worker.close()


def timed(work: Callable[[], Any]) -> tuple[Any, Usage]:
    """What it returns, and what it took in this process."""
    started, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, Usage(time.perf_counter() - started, time.process_time() - cpu)


def median_usage(runs: Sequence[Usage]) -> Usage:
    """The median of each figure."""
    return Usage(*(statistics.median(column) for column in zip(*runs, strict=True)))


def private_mb(pid: int) -> float:
    """Memory (10^6 bytes) that a process holds and no file does: anonymous pages, and those of memory-backed files."""
    kib = dict.fromkeys(("Anonymous", "Pss_Shmem"), 0)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in kib:
            kib[key] = int(rest.split()[0])
    return sum(kib.values()) * 1024 / 1e6


class PeakMemory:
    """The most memory that a process holds while the block runs; see `private_mb`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.before_mb = private_mb(pid)
        self.peak_mb = self.before_mb
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def growth_mb(self) -> float:
        """Over what it was at the beginning."""
        return self.peak_mb - self.before_mb

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.peak_mb = max(self.peak_mb, private_mb(self._pid))

    def _watch(self) -> None:
        while not self._end.wait(SAMPLE_S):
            self.peak_mb = max(self.peak_mb, private_mb(self._pid))


def load() -> str:
    """What else the machine is doing, for beside a figure."""
    return f"load {os.getloadavg()[0]:.1f}"
