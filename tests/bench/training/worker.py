"""The process of one trainer: reads orders as lines of JSON, answers each with what the step took and told.

`python -m tests.bench.training.worker TRAINER SETUP ORDER`. A line is an order (a list of its numbers), or a path, to
which the first step's gradient is written. Peak memory is the process's own high-water mark (VmHWM), imports and the
model's loading included. Everything else that is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

import numpy as np

from tests.bench.training.recipe import Gradient, Order, Setup, Told, Trainer

TRL = "trl"


def peak_mb() -> float:
    """The most memory that this process has ever held, in 10^6 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no VmHWM")


class EndOfOrders(Exception):  # noqa: N818  no error
    """There are no more."""


class Desk:
    """Where orders come in and answers go out."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._begun = self._ended = (0.0, 0.0)

    def ask(self, gradient: Any) -> Order:
        """The next step to take; what else is asked meanwhile is answered. Raises EndOfOrders."""
        for line in sys.stdin:
            request = json.loads(line)
            if isinstance(request, list):
                order = Order(*request)
                self._begun = self._now()
                return order
            save(Path(request), gradient())
            self._say({"saved": request})
        raise EndOfOrders

    def stop_clock(self) -> None:
        """The step is done."""
        self._ended = self._now()

    def tell(self, told: Told) -> None:
        """Answer the order."""
        seconds, cpu_s = (after - before for before, after in zip(self._begun, self._ended, strict=True))
        self._say({**told._asdict(), "seconds": seconds, "cpu_s": cpu_s, "peak_mb": peak_mb()})

    def ready(self) -> None:
        """The trainer is made."""
        self._say({"ready": True, "peak_mb": peak_mb()})

    def _say(self, what: dict[str, Any]) -> None:
        self._answers.write(json.dumps(what) + "\n")
        self._answers.flush()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def save(path: Path, gradient: Gradient) -> None:
    """Write a gradient."""
    np.savez(path, **gradient)  # type: ignore[arg-type]  # names are no keywords of savez


def made(name: str, setup: Setup) -> Trainer:
    """A trainer of ours, or of plain PyTorch."""
    if name == "ours":
        from tests.bench.training.ours import Ours

        return Ours(setup)
    from tests.bench.training.plain import PlainPacked, PlainPadded

    return {"packed": PlainPacked, "padded": PlainPadded}[name](setup)


def work(name: str, setup: Setup, first: Order, desk: Desk) -> None:
    """Until there are no more orders."""
    if name == TRL:
        from tests.bench.training.trl_trainer import TrlTraining

        training = TrlTraining(setup, first, lambda: desk.ask(training.gradient), desk.tell, desk.stop_clock)
        desk.ready()
        training.train()
        return
    trainer = made(name, setup)
    desk.ready()
    while True:
        order = desk.ask(trainer.gradient)
        told = trainer.step(order.samples())
        desk.stop_clock()
        desk.tell(told)


def main() -> None:
    """Keep standard output for the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, setup, first = sys.argv[1], Setup(*json.loads(sys.argv[2])), Order(*json.loads(sys.argv[3]))
    try:
        work(name, setup, first, Desk(answers))
    except EndOfOrders:
        answers.close()
    os._exit(0)  # libraries' threads and process groups have nothing to say any more


if __name__ == "__main__":
    main()
