"""Learner processes that start in no time, so that a test can afford to kill many of them.

A server process imports torch and DeepSpeed once and forks for every life; what is run then is the real learner.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.environment import LAUNCHER


def live(config: str) -> None:
    """One life; the process's main function."""
    from broker.process.config import load_settings
    from broker.process.lifecycle import run_main
    from learner.trainer import run_learner

    for name in LAUNCHER:  # of an engine in the process that the server comes from
        os.environ.pop(name, None)
    run_main("learner", lambda: run_learner(load_settings(Path(config), environ={})))


class Lives:
    """Starts one learner after the other."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["learner.trainer", "learner.training.deepspeed_engine"])
        self._processes: list[ForkServerProcess] = []

    def start(self) -> ForkServerProcess:
        """The next life."""
        process = self._context.Process(target=live, args=(str(self._config),))
        process.start()
        self._processes.append(process)
        return process

    def end(self) -> None:
        """Leave nothing behind."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(10)
