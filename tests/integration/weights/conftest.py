"""Relays, a learner and actors for one test; they end with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.weights import publisher
from tests.integration.weights.ends import Actor, Learner, RelayProcess


@pytest.fixture
def start_relay(tmp_path: Path) -> Iterator[Callable[..., RelayProcess]]:
    relays: list[RelayProcess] = []

    def start(upstream_port: int, **kwargs: object) -> RelayProcess:
        relays.append(RelayProcess(tmp_path, upstream_port, **kwargs))  # type: ignore[arg-type]
        return relays[-1]

    yield start
    for relay in relays:
        relay.dispose()


@pytest.fixture
def learner() -> Iterator[Learner]:
    learner = Learner()
    yield learner
    learner.publisher.close()


@pytest.fixture
def actor_at(tmp_path: Path) -> Iterator[Callable[..., Actor]]:
    actors: list[Actor] = []

    def actor(endpoint: str, **kwargs: int) -> Actor:
        actors.append(Actor(endpoint, tmp_path / f"actor-{len(actors)}", **kwargs))
        return actors[-1]

    yield actor
    for each in actors:
        each.subscriber.close()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record of a delta is sent as soon as it is made."""
    monkeypatch.setattr(publisher, "PART_BYTES", 1)
