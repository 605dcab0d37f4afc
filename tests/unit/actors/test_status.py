"""Readiness: only while what the actor samples would be used."""

from __future__ import annotations

from typing import Any

import pytest

from actors.process import Status
from broker.protocol.trajectory import PolicyVersion


class Engine:
    dead: str | None = None


class Weights:
    def __init__(self, adopted: PolicyVersion | None, newest: PolicyVersion | None) -> None:
        self.adopted, self.newest = adopted, newest


def status(adopted: tuple[int, int] | None, newest: tuple[int, int] | None, dead: str | None = None) -> Any:
    status: Any = Status(max_staleness=2)
    status.engine, status.weights = Engine(), Weights(*(v and PolicyVersion(*v) for v in (adopted, newest)))
    status.engine.dead = dead
    return status.health()


@pytest.mark.parametrize(
    ("adopted", "newest", "ready"),
    [
        (None, None, False),
        (None, (1, 5), False),
        ((1, 5), (1, 5), True),
        ((1, 5), (1, 7), True),
        ((1, 5), (1, 8), False),
        ((1, 5), (2, 0), False),
        ((1, 5), None, True),
    ],
)
def test_ready_means_a_version_within_the_staleness_bound(adopted: Any, newest: Any, ready: bool) -> None:
    health = status(adopted, newest)
    assert health.ok is ready
    assert health.detail == {"engine_alive": True, "policy_version": adopted, "newest_version": newest}


def test_a_dead_engine_and_one_that_is_not_there_yet_are_not_ready() -> None:
    assert not status((1, 5), (1, 5), dead="killed").ok
    assert Status(max_staleness=2).health() == (
        False,
        {"engine_alive": False, "policy_version": None, "newest_version": None},
    )
