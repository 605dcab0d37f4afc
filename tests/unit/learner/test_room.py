"""A learner that may hold no more results makes room for others, or says why it cannot."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import pytest

from broker.client import LearnerClient
from broker.process.lifecycle import ErgonError
from broker.process.settings import RunSection, Settings
from learner.checkpoint import checkpoint_directories, read_checkpoint
from learner.engine import TrainEngine
from learner.room import Room


class FullClient:
    """Nothing arrives before an ack."""

    def __init__(self) -> None:
        self.full = True
        self.acked: list[str] = []

    def receive(self, _timeout_s: float) -> None:
        return None

    def ack(self, ticket_ids: Sequence[str], _dropped: Collection[str]) -> int:
        self.acked += ticket_ids
        self.full = False
        return len(ticket_ids)


class Engine:
    policy_version = 0


@pytest.fixture
def client() -> FullClient:
    return FullClient()


@pytest.fixture
def room(tmp_path: Path, client: FullClient, monkeypatch: pytest.MonkeyPatch) -> Room:
    monkeypatch.setattr("learner.room.LearnerClient", lambda *_args, **_kwargs: cast(LearnerClient, client))
    settings = Settings(run=RunSection(name="run", directory=tmp_path))
    settings.run_dir.mkdir(parents=True)
    return Room(settings, cast(TrainEngine, Engine()), threading.Event())


def test_what_is_done_with_is_acknowledged_before_its_time(room: Room, client: FullClient) -> None:
    room.state.unacked += ["a1", "a2"]
    room.pump()
    assert client.acked == ["a1", "a2"]
    folder = room.settings.run_dir / "checkpoints"
    (directory,) = checkpoint_directories(folder)
    assert read_checkpoint(directory).state["unacked"] == ["a1", "a2"]  # complete before the ack, and names its content
    assert room.state.unacked == []
    room.pump()  # there is room: it only waits
    assert checkpoint_directories(folder) == [directory]


def test_where_nothing_is_done_with_it_says_so(room: Room, client: FullClient) -> None:
    with pytest.raises(ErgonError, match=r"holds 16384 results.* lower learner\.groups_per_step"):
        room.pump()
    assert client.acked == []
