"""`python -m tests.chaos.scripted_learner --config FILE`: a learner that trains on nothing and keeps the real books.

Client, publisher, curriculum, batcher, audit and checkpoints are the real ones; a step is a short sleep, and what a
model would have learned is a hash chained over the ids of its batches. So the chain in the last checkpoint says which
trajectories the surviving history contains, and in which order, independently of the audit.
"""

from __future__ import annotations

import argparse
import json
import logging
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from broker.client import DeadLetter, LearnerClient
from broker.process.config import load_settings
from broker.process.keys import Identity
from broker.process.lifecycle import install_stop, run_main
from broker.process.security import load_security
from broker.process.settings import Settings
from broker.protocol.trajectory import PolicyVersion, Trajectory
from broker.weights import publisher
from broker.weights.publisher import WeightPublisher
from learner.audit import LineFile, audit_lines
from learner.batching import Batch, Batcher
from learner.checkpoint import CheckpointStore
from learner.curriculum import Curriculum, IssueLog
from learner.state import TrainerState
from tests.chaos import script
from tests.chaos.episode import WrongEpisodeError, examine
from tests.chaos.handovers import EPISODES, episode_line
from tests.chaos.orders import HOLD, reach
from tests.chaos.scripted_actor import report_violation

logger = logging.getLogger(__name__)

AUDIT = "trained.jsonl"
CHECKPOINTS = "checkpoints"
CHAIN = "chain.json"
publisher.PART_BYTES = 1  # so that deltas as small as these are sent ahead as well
STEP_S = 0.05
POLL_S = 0.25


def chained(chain: str, ticket_ids: list[str]) -> str:
    """The chain after a batch of these tickets."""
    return xxhash.xxh3_128_hexdigest("\n".join([chain, *ticket_ids]).encode())


class ScriptedLearner:
    """One learner process, resumed from the newest complete checkpoint."""

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self._settings, self._stop = settings, stop
        learner, broker, links = settings.learner, settings.broker, settings.weights
        security = load_security(settings, Identity.LEARNER)
        self._num_groups = learner.num_steps * learner.groups_per_step
        self._num_tickets = self._num_groups * learner.group_size
        self._store = CheckpointStore(settings.run_dir / CHECKPOINTS, learner.keep_checkpoints)
        self._checkpoint = self._store.newest()
        self._state = TrainerState.from_json(self._checkpoint.state) if self._checkpoint else TrainerState()
        self._chain = ""
        if self._checkpoint and self._checkpoint.engine_directory:
            self._chain = json.loads((self._checkpoint.engine_directory / CHAIN).read_text())["chain"]
        self._audit = LineFile(settings.run_dir / AUDIT)
        self._audit.cut(self._state.audit_bytes)
        self._episodes = LineFile(settings.run_dir / EPISODES)
        self._batcher = Batcher(
            groups_per_step=learner.groups_per_step,
            max_groups_per_step=learner.max_groups_per_step,
            group_size=learner.group_size,
            max_staleness=learner.max_staleness,
            loss=learner.loss,
        )
        log = IssueLog(settings.run_dir / "issued.jsonl")
        self._curriculum = Curriculum(settings, log, self._state.curriculum, max_groups=self._num_groups)
        self._client = LearnerClient(
            f"tcp://{broker.host}:{broker.port}",
            settings.run.name,
            heartbeat_s=broker.heartbeat_s,
            liveness=broker.liveness,
            security=security,
        )
        self._publisher = WeightPublisher(
            f"tcp://{links.host}:{links.port}",
            settings.run.name,
            chunk_bytes=links.chunk_bytes,
            heartbeat_s=links.heartbeat_s,
            liveness=links.liveness,
            security=security,
        )

    def run(self) -> None:
        """Train on everything, acknowledge it, end."""
        state = self._state
        self._client.connect()
        num_returned = self._client.resume(state.unacked)
        state.unacked.clear()
        self._client.issue(self._curriculum.repeated(self._oldest))
        logger.info("resumed step=%d lineage=%d returned=%d", state.step, self._client.lineage, num_returned)
        self._publish()
        while state.num_consumed < self._num_tickets and not self._stop.is_set():
            self._top_up()
            batch = self._batcher.next(state.step)
            if batch is None and state.num_consumed + self._batcher.num_held == self._num_tickets:
                batch = self._batcher.drain()  # the last groups fill no batch
            if batch is None:
                self._receive()
                continue
            if not self._may_train(batch):
                break
            self._train(batch)
            if state.step % self._settings.learner.checkpoint_every == 0:
                self._checkpoint_and_ack()
        self._checkpoint_and_ack()

    def close(self) -> None:
        """End both connections."""
        self._client.close()
        self._publisher.close()
        self._audit.close()
        self._episodes.close()
        self._curriculum.close()

    def _publish(self) -> None:
        """The snapshot in two tensors, between which, and after which, the process can be killed."""
        version = PolicyVersion(self._client.lineage, self._state.step)
        halves = dict(zip(("w0", "w1"), np.split(script.weights(version), 2), strict=True))

        def read(name: str) -> npt.NDArray[np.uint8]:
            if name == "w1":
                reach(self._settings.run_dir, "learner", "publishing")
            return halves[name]

        layout = [(name, "uint8", half.shape) for name, half in halves.items()]
        self._publisher.publish_from(version, layout, read)
        reach(self._settings.run_dir, "learner", "published")

    def _top_up(self) -> None:
        """Issue what admission control allows of the groups that are left."""
        state, learner, curriculum = self._state, self._settings.learner, self._curriculum
        outstanding = curriculum.num_issued - state.num_consumed - self._batcher.num_without_gradient
        tickets = curriculum.top_up(outstanding, learner.num_steps, self._oldest)
        if tickets:
            self._client.issue(tickets)

    @property
    def _oldest(self) -> PolicyVersion:
        return PolicyVersion(self._client.lineage, max(0, self._state.step - self._settings.learner.max_staleness))

    def _receive(self) -> None:
        item = self._client.receive(POLL_S)
        if item is None:
            return
        if isinstance(item, DeadLetter):
            self._batcher.add_dead(item)
        elif self._is_genuine(item) and not self._batcher.add(item):
            report_violation(self._settings.run_dir, f"{item.ticket.ticket_id} was delivered twice to one learner")

    def _is_genuine(self, trajectory: Trajectory) -> bool:
        """Whether it is its ticket's episode; which prefixes of it were handed over is written down."""
        try:
            prefixes = examine(self._settings.run.seed, trajectory)
        except WrongEpisodeError as error:
            report_violation(self._settings.run_dir, f"a trajectory is not its ticket's episode: {error}")
            return False
        self._episodes.append([episode_line(trajectory, prefixes)], durable=False)
        return True

    def _may_train(self, batch: Batch) -> bool:
        """Wait with the last batch until the injector has had its faults; whether to go on."""
        if self._state.num_consumed + len(batch.ids) < self._num_tickets:
            return True
        hold = self._settings.run_dir / HOLD
        while hold.exists() and not self._stop.wait(STEP_S):
            pass
        return not self._stop.is_set()

    def _train(self, batch: Batch) -> None:
        state = self._state
        time.sleep(STEP_S)
        state.step += 1
        state.num_consumed += len(batch.ids)
        state.unacked.extend(batch.ids)
        self._chain = chained(self._chain, [item.trajectory.ticket.ticket_id for item in batch.consumed])
        self._audit.append(audit_lines(batch.consumed, state.step), durable=True)
        self._publish()

    def _checkpoint_and_ack(self) -> None:
        state = self._state
        state.curriculum = self._curriculum.to_state()
        state.audit_bytes = self._audit.num_bytes
        self._checkpoint = self._store.save(state.to_json(), self._save_chain)
        self._client.ack(state.unacked)
        state.unacked.clear()

    def _save_chain(self, directory: Path) -> None:
        (directory / CHAIN).write_text(json.dumps({"chain": self._chain, "step": self._state.step}))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    learner = ScriptedLearner(load_settings(arguments.config, arguments.set), install_stop())
    try:
        learner.run()
    finally:
        learner.close()


if __name__ == "__main__":
    run_main("learner", main)
