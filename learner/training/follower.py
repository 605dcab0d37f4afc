"""The life of a rank other than 0: hear a command, do its part, hear the next. Decides nothing, owns no socket of ours.

It ends when rank 0 says so, or when rank 0 is gone or silent for too long; then with an error, so that whoever started
the ranks starts all of them anew. It does not end by itself at SIGTERM: rank 0 got that too, and needs this rank for
its last checkpoint.
"""

from __future__ import annotations

import logging

from learner.engine import TrainingError
from learner.training.ranks import Ranks
from learner.training.worker import Worker

logger = logging.getLogger(__name__)

CLOSE = "close"


def follow(worker: Worker, ranks: Ranks) -> None:
    """Serve rank 0 until it closes. Raises RuntimeError where rank 0 is gone."""
    while True:
        command, *arguments = ranks.listen()
        if command == CLOSE:
            return
        try:
            _obey(worker, ranks, command, arguments)
        except TrainingError as error:  # rank 0 came to the same verdict and says what follows
            logger.debug("step refused error=%s", error)


def _obey(worker: Worker, ranks: Ranks, command: str, arguments: list[object]) -> None:
    match command, arguments:
        case "step", []:
            worker.step(ranks.receive())
        case "logprobs", []:
            ranks.collect(worker.logprobs(ranks.receive()))
        case "gather", [int(bucket)]:
            worker.served.gather(bucket, keep=False)
        case "mark", []:
            worker.served.mark(worker.shards)
        case "changes", [int(bucket)]:
            ranks.collect(worker.served.changes(bucket, worker.shards))
        case "snapshot", [directory, bool(copying)]:
            worker.snapshot(directory, copying)  # type: ignore[arg-type]
        case "load", [directory]:
            worker.load(directory)  # type: ignore[arg-type]
        case "reset", []:
            worker.reset_optimizer()
        case _:
            raise RuntimeError(f"rank 0 asks for {command!r} with {len(arguments)} arguments, which is no command")
