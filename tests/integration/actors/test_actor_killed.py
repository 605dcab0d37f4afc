"""An actor with a real engine that dies in each phase of an adoption, under the real supervisor, episodes in flight.

Each successor begins with the newest version, every ticket becomes one trajectory, and no token names a version that
was not published. Where only the engine dies, its successor lives in the same process. An engine starts for each death,
which takes most of the time: `make chaos` has all of them (ERGON_ALL_PHASES in the environment), `make test` the one in
the middle of the switch and the engine's own.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from broker.client import LearnerClient
from broker.process.config import save_settings
from broker.process.settings import BrokerSection, Settings, SupervisorSection
from broker.protocol.trajectory import Mode, PolicyVersion, Sampling, Ticket, Trajectory
from broker.weights.publisher import WeightPublisher
from deploy.local import Child, Supervisor
from tests.chaos.orders import DIRECTORY, ITSELF, Order
from tests.integration.actors.doomed_actor import PLACE
from tests.integration.actors.test_actor_process import get, settings_for, ticket
from tests.tiny_model import make_tiny_model

ALL_PHASES = "ERGON_ALL_PHASES"
EVERY = ("fetching", "preparing", "paused", "switched", "broken", "engine")
PHASES = EVERY if os.environ.get(ALL_PHASES) else ("switched", "engine")
SURVIVED = ("broken", "engine")  # where the engine dies, the actor does not
NUM_TICKETS = 6  # of each batch
LONG = Sampling(max_turn_tokens=120, max_episode_tokens=200, max_turns=2)


def run_settings(directory: Path, model: Path) -> Settings:
    settings = settings_for(directory, model)
    heartbeat = {"heartbeat_s": 0.25, "liveness": 8}
    broker = BrokerSection(port=settings.broker.port, lease_s=3.0, **heartbeat)
    weights = settings.weights.model_copy(update=heartbeat)
    # The default of the staging directory is shared memory; here it is below the run's folder, where the orders are.
    actor = settings.actor.model_copy(update={"staging": settings.run_dir / "staging"})
    metrics = settings.metrics
    supervisor = SupervisorSection(restart_backoff_s=0.1, grace_s=20)
    sections = {"broker": broker, "weights": weights, "actor": actor, "metrics": metrics, "supervisor": supervisor}
    return settings.model_copy(update=sections)


class Publisher:
    """Publishes versions of the tiny model that differ in some elements, so that they travel as deltas."""

    def __init__(self, settings: Settings, model: Path) -> None:
        from safetensors.torch import load_file

        endpoint = f"tcp://127.0.0.1:{settings.weights.relay_port}"
        self.client = WeightPublisher(endpoint, settings.run.name, heartbeat_s=0.25, liveness=8)
        self._state = load_file(model / "model.safetensors")

    def publish(self, version: PolicyVersion) -> None:
        import torch

        for number, tensor in enumerate(self._state.values()):
            flat = tensor.view(-1)
            flat[version.version + number :: 97] *= 1.05
        layout = [(name, "bfloat16", tuple(tensor.shape)) for name, tensor in self._state.items()]
        self.client.publish_from(
            version, layout, lambda name: self._state[name].contiguous().view(torch.uint8).numpy().reshape(-1)
        )


def batch(name: str, version: PolicyVersion) -> list[Ticket]:
    """Tickets that this version or a later one is to sample, each for long enough to be in flight."""
    tickets = [ticket(f"{name}-{i}", Mode.TRAIN, min_version=version) for i in range(NUM_TICKETS)]
    return [msgspec.structs.replace(each, sampling=LONG) for each in tickets]


def metrics_of(settings: Settings) -> str:
    return get(settings.metrics.actor_port, "/metrics")[1]


def kill_engine(actor: Child, settings: Settings) -> None:
    """Kill the engine's processes while it samples."""
    assert actor.process is not None
    while f"ergon_actor_running_episodes {NUM_TICKETS}.0" not in metrics_of(settings):
        time.sleep(0.01)
    children = psutil.Process(actor.process.pid).children(recursive=True)
    engine = [each for each in children if "resource_tracker" not in " ".join(each.cmdline())]
    assert engine
    for process in engine:
        process.kill()


@pytest.mark.timeout(400)
def test_an_actor_that_dies_in_any_phase_of_an_adoption_loses_and_doubles_nothing(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    settings = run_settings(tmp_path, model)
    config, run_dir = tmp_path / "run.toml", settings.run_dir
    for directory in (settings.actor.staging, run_dir / DIRECTORY):
        directory.mkdir(parents=True)
    save_settings(settings, config)
    python, with_config = (sys.executable, "-m"), ("--config", str(config))
    broker = Child("broker", (*python, "broker", "serve", *with_config), tmp_path / "broker.log")
    actor_command = (*python, "tests.integration.actors.doomed_actor", *with_config, "--index", "0")
    actor = Child(PLACE, actor_command, tmp_path / "actor.log")
    supervisor, ended = Supervisor(settings.supervisor, [broker, actor]), threading.Event()
    supervising = threading.Thread(target=supervisor.run, args=(ended.is_set, lambda: None))
    publisher = Publisher(settings, model)
    learner = LearnerClient(f"tcp://127.0.0.1:{settings.broker.port}", settings.run.name, heartbeat_s=0.25, liveness=8)
    supervising.start()
    received: list[Trajectory] = []

    def receive(num: int) -> None:
        for _ in range(num):
            item = learner.receive(120)
            assert isinstance(item, Trajectory), f"{item}\n{actor.tail(60)}"
            received.append(item)

    try:
        learner.connect(60)
        learner.resume()
        old = PolicyVersion(learner.lineage, 0)
        publisher.publish(old)
        learner.issue(batch("warm", old))
        receive(NUM_TICKETS)
        for number, phase in enumerate(PHASES, start=1):
            order, new = Order(run_dir, PLACE, phase), PolicyVersion(learner.lineage, number)
            learner.issue(batch(f"{phase}-before", old))
            if phase == "engine":
                kill_engine(actor, settings)
            else:
                order.place(ITSELF)
            publisher.publish(new)
            learner.issue(batch(f"{phase}-after", new))
            receive(2 * NUM_TICKETS)
            assert not order.outstanding, f"the actor was never {phase}"
            assert actor.num_restarts == len(set(PHASES[:number]) - set(SURVIVED)), actor.tail(60)
            for trajectory in received[-2 * NUM_TICKETS :]:
                versions = {run[:2] for run in trajectory.segments[0].version_runs}
                assert versions <= {tuple(old), tuple(new)}
                assert "after" not in trajectory.ticket.ticket_id or versions == {tuple(new)}
            old = new
        ids = [trajectory.ticket.ticket_id for trajectory in received]
        assert len(set(ids)) == len(ids) == NUM_TICKETS * (1 + 2 * len(PHASES))
        assert "was cancelled" not in actor.log.read_text()
        assert ("injected into reload_whole" in actor.log.read_text()) is ("broken" in PHASES)
        restarts = len(set(PHASES) & set(SURVIVED))
        assert f'ergon_actor_engine_restarts_total{{result="restarted"}} {restarts}.0' in metrics_of(settings)
    finally:
        ended.set()
        supervising.join()
        learner.close()
        publisher.client.close()
    assert list(settings.actor.staging.iterdir()) == []
