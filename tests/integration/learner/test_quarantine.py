"""A poisoned batch on the real engine: no step, nothing published, nothing lost, and it can be tried again."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from broker.client import LearnerClient
from broker.process.config import save_settings
from broker.process.settings import Settings
from broker.protocol.trajectory import PolicyVersion, Trajectory
from learner.batching import Batch
from learner.engine import TrainEngine, TrainingError
from learner.losses.policy import policy_loss
from learner.publisher import Publisher
from learner.quarantine import rebuilt
from learner.recording import read_trajectories
from learner.room import Room
from learner.training.deepspeed_engine import DeepSpeedEngine
from tests.environment import environment
from tests.ports import free_ports
from tests.tiny_model import make_tiny_model
from tests.unit.learner.make import make_segment, make_ticket, make_trajectory


class Client:
    """A broker that takes acks, and looks at the quarantine whenever it does."""

    lineage = 1
    full = False

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.acked: dict[str, bool] = {}  # id -> whether it was on disk in the quarantine by then
        self.dropped: set[str] = set()

    def ack(self, ticket_ids: Sequence[str], dropped: Collection[str]) -> int:
        kept = {
            ticket_id
            for path in (self._run_dir / "quarantine").glob("*.json")
            for ticket_id in json.loads(path.read_text())["ticket_ids"]
        }
        self.acked |= {ticket_id: ticket_id in kept for ticket_id in ticket_ids}
        self.dropped |= set(dropped)
        return len(ticket_ids)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DeepSpeedEngine, Settings]]:
    directory = tmp_path_factory.mktemp("run")
    master, port, metrics = free_ports(3)
    threads = torch.get_num_threads()
    settings = Settings.model_validate(
        {
            "run": {"directory": str(directory)},
            "model": {"path": str(make_tiny_model(directory / "model"))},
            "learner": {"groups_per_step": 2, "group_size": 2, "master_port": master, "learning_rate": 1e-3},
            "weights": {"port": port},
            "metrics": {"learner_port": metrics},
        }
    )
    engine = DeepSpeedEngine(settings)
    yield engine, settings
    engine.close()
    torch.set_num_threads(threads)


@pytest.fixture
def room(engine: tuple[DeepSpeedEngine, Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    real, settings = engine
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"directory": tmp_path})})
    settings.run_dir.mkdir()
    client = Client(settings.run_dir)
    monkeypatch.setattr("learner.room.LearnerClient", lambda *_args, **_kwargs: cast(LearnerClient, client))
    room = Room(settings, cast(TrainEngine, real), threading.Event())
    room._publisher = Publisher(settings)
    yield room
    room.durability.close()
    room._publisher.close()


def trajectories(engine: DeepSpeedEngine, first_group: int, *, logprob: float | None = None) -> list[Trajectory]:
    """Two groups of two; behaviour log-probs are the policy's own, or all `logprob`."""
    made = []
    for group in range(first_group, first_group + 2):
        for member in range(2):
            sampled = [40 + group, 50 + member, 60]
            segment = make_segment((5, 6, 7), sampled)
            trajectory = make_trajectory(make_ticket(group, member), float(member), segment=segment)
            batch_logprobs = segment.logprobs_T.copy()
            batch_logprobs[3:] = -6.0 if logprob is None else logprob
            made.append(Trajectory(trajectory.head, (replace(segment, logprobs_T=batch_logprobs),)))
    return made


def make_batch(room: Room, made: list[Trajectory]) -> Batch:
    for trajectory in made:
        assert room.batcher.add(trajectory)
    batch = room.batcher.next(room.engine.policy_version)
    assert batch is not None
    return batch


def copies(room: Room) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in room.engine.weights()}


def replayed(room: Room, path: Path) -> dict[str, Any]:
    """What the documented command says of a refused batch."""
    config = room.settings.run_dir / "config.toml"
    save_settings(room.settings, config)
    command = [sys.executable, "-m", "learner.quarantine", "--config", str(config), "--set"]
    (port,) = free_ports(1)
    done = subprocess.run(
        [*command, f"learner.master_port={port}", str(path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return report


def events(room: Room) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (room.settings.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("poison", ["behaviour", "advantage"])
def test_a_poisoned_batch_changes_nothing_and_is_kept(room: Room, poison: str) -> None:
    engine = cast(DeepSpeedEngine, room.engine)
    client = cast(Client, room.client)
    assert room.train(make_batch(room, trajectories(engine, 0))) is not None
    room.publish()
    published, before = room._publisher._published, copies(room)
    assert published == PolicyVersion(1, engine.policy_version)

    batch = make_batch(room, trajectories(engine, 2, logprob=math.nan if poison == "behaviour" else None))
    if poison == "advantage":
        poisoned = replace(batch.sequences[0], advantage=math.nan)
        batch = replace(batch, sequences=(poisoned, *batch.sequences[1:]))
    assert room.train(batch) is None
    room.publish()
    room.checkpoint()
    room.durability.settle()

    assert room._publisher._published == published  # nothing new
    after = copies(room)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert room.state.step == 1
    ids = {t.ticket.ticket_id for t in trajectories(engine, 2)}
    assert {ticket_id: kept for ticket_id, kept in client.acked.items() if ticket_id in ids} == dict.fromkeys(ids, True)
    assert client.dropped == ids
    assert [e["raised"] for e in events(room) if e.get("kind") == "refused"] == [True]
    (refused,) = [e for e in events(room) if e["event"] == "refused"]
    assert ("masks 1 of" if poison == "behaviour" else "the loss is nan") in refused["error"]

    kept = list(read_trajectories(Path(refused["trajectories"]), checked=False))
    assert {t.ticket.ticket_id for t in kept} == ids
    again = rebuilt(kept, room.settings.learner, engine.policy_version)
    assert len(again.sequences) == 4
    loss = policy_loss(room.settings.learner.loss)
    if poison == "behaviour":
        with pytest.raises(TrainingError, match="masks 1 of"):
            engine.step(again.sequences, loss, 1e-3, room._guard)
        report = replayed(room, Path(refused["trajectories"]))
        assert report["trajectories"] == 4
        assert "masks 1 of" in report["error"]
    # And the next batch is trained on as if nothing had been.
    assert room.train(make_batch(room, trajectories(engine, 4))) is not None
    room.publish()
    assert room._publisher._published == PolicyVersion(1, engine.policy_version) != published
    assert [e["raised"] for e in events(room) if e.get("kind") == "refused"] == [True, False]


def test_three_poisoned_batches_in_a_row_end_the_process(room: Room) -> None:
    engine = cast(DeepSpeedEngine, room.engine)
    before = copies(room)
    for group in (0, 2):
        assert room.train(make_batch(room, trajectories(engine, group, logprob=math.nan))) is None
    with pytest.raises(TrainingError):
        room.train(make_batch(room, trajectories(engine, 4, logprob=math.nan)))
    after = copies(room)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list((room.settings.run_dir / "quarantine").glob("*.msgpack"))) == 3
    assert len(np.unique([e["trajectories"] for e in events(room) if e["event"] == "refused"])) == 3
