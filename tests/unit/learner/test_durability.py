"""A step becomes durable in order, beside the loop: audit, checkpoint, acknowledgement."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from broker.process.learner_settings import LearnerSection
from learner.background import Background
from learner.batching import Batch, Consumed, Reason
from learner.checkpoint import read_checkpoint
from learner.durability import Durability
from learner.engine import TrainEngine
from learner.evaluation import STYLES, Evaluation
from tests.unit.learner.make import make_ticket, make_trajectory

STATS = {"num_trained_tokens": 6.0}


class Engine:
    """Its weights are its version; what it writes waits for `go`."""

    def __init__(self) -> None:
        self.policy_version = 0
        self.go = threading.Event()
        self.go.set()
        self.fails = False

    def snapshot(self, directory: Path) -> Callable[[], None]:
        content = str(self.policy_version)

        def write() -> None:
            assert self.go.wait(10)
            if self.fails:
                raise OSError("the disk is full")
            (directory / "weights").write_text(content)

        return write

    def save(self, directory: Path) -> None:
        (directory / "weights").write_text(str(self.policy_version))

    def load(self, directory: Path) -> None:
        self.policy_version = int((directory / "weights").read_text())


class Desk:
    """A run's folder, its engine, and what the broker was told."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.engine = directory, Engine()
        self.acked: list[tuple[list[str], frozenset[str], list[int]]] = []

    def ack(self, ids: Sequence[str], unused: Collection[str]) -> None:
        self.acked.append((list(ids), frozenset(unused), self.numbers()))

    def numbers(self) -> list[int]:
        names = (path.name for path in (self.directory / "checkpoints").iterdir())
        return sorted(int(name) for name in names if name.isdigit())

    def open(self, **values: object) -> Durability:
        section = LearnerSection.model_validate(values)
        return Durability(self.directory, section, cast(TrainEngine, self.engine), self.ack)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def make_batch(group: int, reason: Reason = Reason.TRAINED) -> Batch:
    consumed = tuple(Consumed(make_trajectory(make_ticket(group, i), float(i)), reason) for i in range(2))
    return Batch((), consumed, (), 1, 0, 0, np.zeros(6, dtype=np.int32))


def evaluate(durability: Durability, phase: str, reward: float, num_tasks: int = 2) -> None:
    evaluation = Evaluation(phase, num_tasks)
    for style in STYLES:
        for number in range(num_tasks):
            evaluation.add(style, number, make_trajectory(reward=reward))
    durability.state.evaluations[phase] = evaluation
    durability.evaluated(evaluation)


def test_the_loop_goes_on_while_the_copy_is_written(desk: Desk) -> None:
    durability = desk.open()
    durability.record(make_batch(0), STATS)
    desk.engine.policy_version = 1
    desk.engine.go.clear()
    durability.checkpoint()
    assert durability.writing
    assert desk.acked == []
    # The next step: neither its weights nor its tickets belong to the checkpoint on its way.
    desk.engine.policy_version = 2
    durability.record(make_batch(1, Reason.NOT_FINITE), None)
    assert desk.numbers() == []
    desk.engine.go.set()
    durability.settle()
    assert desk.acked == [(["run/train/0/0", "run/train/0/1"], frozenset(), [1])]  # visible before it is acknowledged
    durability.checkpoint()
    durability.settle()
    both = ["run/train/1/0", "run/train/1/1"]
    assert desk.acked[1] == (both, frozenset(both), [1, 2])
    durability.close()

    first = read_checkpoint(desk.directory / "checkpoints" / "000001")
    assert first.state["num_consumed"] == 2
    assert (first.directory / "engine" / "weights").read_text() == "1"
    again = desk.open()
    assert desk.engine.policy_version == 2
    assert again.state.num_consumed == 4
    again.close()


def test_a_resumed_learner_acknowledges_what_the_killed_one_could_not(desk: Desk) -> None:
    durability = desk.open()
    durability.record(make_batch(0), STATS)
    desk.engine.policy_version = 1
    acknowledged = threading.Event()

    def refuse(_ids: Sequence[str], _unused: Collection[str]) -> None:
        acknowledged.set()
        raise ConnectionError("the broker is away")

    durability._ack = refuse
    durability.checkpoint()
    assert acknowledged.wait(10)
    with pytest.raises(ConnectionError):
        durability.settle()
    durability.close()
    assert desk.open().state.unacked == ["run/train/0/0", "run/train/0/1"]


def test_the_audit_is_cut_back_to_what_the_checkpoint_contains(desk: Desk) -> None:
    durability = desk.open()
    durability.record(make_batch(0), STATS)
    desk.engine.policy_version = 1
    desk.engine.go.clear()
    durability.checkpoint()
    durability.record(make_batch(1), STATS)
    desk.engine.go.set()
    durability.close()
    desk.open().close()
    lines = (desk.directory / "trained.jsonl").read_text().splitlines()
    assert [json.loads(line)["ticket_id"] for line in lines] == ["run/train/0/0", "run/train/0/1"]


def test_what_stops_a_checkpoint_stops_the_loop_and_the_previous_one_stays(desk: Desk) -> None:
    durability = desk.open()
    desk.engine.policy_version = 1
    durability.checkpoint()
    durability.settle()
    desk.engine.policy_version, desk.engine.fails = 2, True
    durability.record(make_batch(0), STATS)
    durability.checkpoint()
    durability.ended(10)
    with pytest.raises(OSError, match="the disk is full"):
        durability.raise_if_failed()
    assert desk.numbers() == [1]
    assert [ids for ids, _, _ in desk.acked] == [[]]
    durability.close()
    assert desk.open().state.num_consumed == 0
    assert desk.engine.policy_version == 1


def test_one_at_a_time(desk: Desk) -> None:
    durability = desk.open()
    desk.engine.policy_version = 1
    desk.engine.go.clear()
    durability.checkpoint()
    desk.engine.policy_version = 2
    later = threading.Timer(0.2, desk.engine.go.set)
    later.start()
    durability.checkpoint()  # waits for the first
    assert desk.numbers() == [1]
    durability.close()
    assert desk.numbers() == [1, 2]


def test_in_the_foreground_it_is_complete_when_the_call_returns(desk: Desk) -> None:
    durability = desk.open(checkpoint_in_background=False)
    desk.engine.policy_version = 3
    durability.checkpoint()
    assert desk.numbers() == [1]
    assert not durability.writing
    durability.close()


def test_the_best_one_and_those_being_evaluated_are_kept(desk: Desk) -> None:
    durability = desk.open(keep_checkpoints=1)

    def checkpoint(label: str = "") -> None:
        desk.engine.policy_version += 1
        durability.checkpoint(label)
        durability.settle()

    checkpoint("step-1")
    checkpoint("step-2")
    checkpoint()
    assert desk.numbers() == [1, 2, 3]  # two wait for their results
    evaluate(durability, "step-2", 0.5)
    checkpoint()
    assert desk.numbers() == [1, 2, 4]
    evaluate(durability, "step-1", 0.25)
    checkpoint()
    assert desk.numbers() == [2, 5]
    checkpoint("step-6")
    evaluate(durability, "step-6", 0.5)  # as good, and newer
    checkpoint()
    assert desk.numbers() == [6, 7]
    evaluate(durability, "before", 1.0)  # of no checkpoint
    durability.close()
    again = desk.open(keep_checkpoints=1)
    assert again.state.best == "step-6"
    labels = {n: read_checkpoint(desk.directory / "checkpoints" / f"{n:06d}").label for n in desk.numbers()}
    assert labels == {6: "step-6", 7: ""}
    again.close()


def test_without_keep_best_only_the_newest_stay(desk: Desk) -> None:
    durability = desk.open(keep_checkpoints=1, keep_best=False)
    for label in ("step-1", "", ""):
        desk.engine.policy_version += 1
        durability.checkpoint(label)
        durability.settle()
    assert desk.numbers() == [3]
    durability.close()


def test_evaluations_of_different_sizes_are_compared_on_common_tasks(desk: Desk) -> None:
    durability = desk.open()
    durability.state.candidates = ["after-warm-start", "step-4"]
    wide = Evaluation("after-warm-start", 4)
    for style in STYLES:
        for number, reward in enumerate([0.0, 0.0, 1.0, 1.0]):  # the last tasks are easy
            wide.add(style, number, make_trajectory(reward=reward))
    durability.state.evaluations["after-warm-start"] = wide
    durability.evaluated(wide)
    evaluate(durability, "step-4", 0.25, num_tasks=2)
    assert durability.state.best == "step-4"
    durability.close()


def test_a_background_job_that_was_not_waited_for_blocks_the_next() -> None:
    background = Background("job")
    assert background.wait()
    background.start(lambda: None)
    assert background.ended(10)
    assert background.busy
    with pytest.raises(RuntimeError, match="busy"):
        background.start(lambda: None)
    assert background.wait()
    assert not background.busy
