"""`python -m tests.cluster.plane.simulated_learner --config FILE`: a learner's process without a model, for played
nodes.

Client, publisher, curriculum, batcher, audit, checkpoints, keys, metrics and health are the real ones; it trains on
nothing and keeps the real books (`tests/chaos/scripted_learner.py`). How much it asks for, a file in the run's folder
says while it runs: `pace` has the seconds that a step takes, or the word `finish`, after which it issues nothing more
and ends when all that was issued has been trained on.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

from broker.process.config import load_settings
from broker.process.lifecycle import install_stop, run_main
from broker.process.metrics import Health, start_metrics
from broker.process.settings import Settings
from learner import metrics
from learner.batching import Batch
from tests.chaos.scripted_learner import ScriptedLearner

PACE = "pace"
FINISH = "finish"
FINISHED = "finished.json"


class SimulatedLearner(ScriptedLearner):
    """Follows `pace`, and counts its waiting where a real one does."""

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        super().__init__(settings, stop)
        self._pace_file = settings.run_dir / PACE
        metrics.MAX_STALENESS.set(settings.learner.max_staleness)

    @property
    def _pace(self) -> str:
        return self._pace_file.read_text().strip() if self._pace_file.exists() else "0"

    def _top_up(self) -> None:
        if self._pace == FINISH:
            self._num_tickets = self._curriculum.num_issued
        else:
            super()._top_up()

    def _receive(self) -> None:
        begun = time.monotonic()
        super()._receive()
        metrics.WAITING.inc(time.monotonic() - begun)

    def _train(self, batch: Batch) -> None:
        pace = self._pace
        self._stop.wait(0.0 if pace == FINISH else float(pace))
        super()._train(batch)
        metrics.STEP.set(self._state.step)
        metrics.VERSION.set(self._state.step)

    def tell_end(self) -> None:
        """Leave what was issued beside the books, where the run has finished."""
        if self._state.num_consumed >= self._num_tickets:
            told = {"issued": self._curriculum.num_issued, "steps": self._state.step}
            (self._settings.run_dir / FINISHED).write_text(json.dumps(told))


def run_learner(settings: Settings) -> None:
    """Train until all is trained on, or SIGTERM."""
    stop = install_stop()
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    host, port = settings.metrics.host, settings.metrics.learner_port
    server = start_metrics(host, port, lambda: Health(not stop.is_set(), {"simulated": True}))
    try:
        learner = SimulatedLearner(settings, stop)
        try:
            learner.run()
            learner.tell_end()
        finally:
            learner.close()
    finally:
        server.close()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    run_learner(load_settings(parser.parse_args().config))


if __name__ == "__main__":
    run_main("learner", main)
