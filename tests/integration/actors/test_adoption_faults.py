"""A real engine in which one adoption after the other fails, each at another point, while requests are in flight.

Before the switch: the old version serves on, and may be replaced later. From the switch on: the whole file is loaded
again before sampling goes on, or the engine is dead. Whatever happens, requests in flight finish, every token is one
that a Hugging Face forward pass of the version it names would sample so, and the next adoption is like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.actors.sessions import TEMPERATURE, Played, play

BEFORE = ("fault_begin", "fault_prepare", "fault_read", "fault_vanished", "fault_pause", "fault_paused")
AFTER = ("fault_switch", "fault_half_way", "fault_switched", "fault_checksum", "fault_release")
FATAL = ("fatal_reload", "fatal_label", "fatal_resume")
REASONS = {
    "fault_begin": "the engine could not prepare 2.safetensors: ",
    "fault_prepare": "the engine could not prepare 2.safetensors: ",
    "fault_read": "it is fetched again",
    "fault_vanished": "the engine could not prepare 2.safetensors: ",
    "fault_pause": "sampling could not be paused for ",
    "fault_paused": "sampling could not be paused for ",
    "fatal_reload": "failed: ",
    "fatal_label": "failed: RuntimeError: injected into update_weight_version",
    "fatal_resume": "failed: RuntimeError: injected into resume_generation",
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    scenes = [*BEFORE, *AFTER, "drain", "drain_too_long", *FATAL]
    with play(tmp_path_factory.mktemp("faults"), "float32", scenes) as session:
        yield session


def versions(scene: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(Serving before the scene, tried in it)."""
    lineage, number = scene["before"]
    return (lineage, number), (lineage, 2)


def runs(samples: list[dict[str, Any]]) -> set[tuple[tuple[int, int], ...]]:
    return {tuple((run[0], run[1]) for run in sample["runs"]) for sample in samples}


def assert_adopted_next(played: Played, scene: dict[str, Any], serving: tuple[int, int]) -> None:
    seen, version = scene["next"], (scene["before"][0] + 1, 3)
    assert (seen["error"], tuple(seen["version"]), seen["checksum_fits"]) == (None, version, True)
    played.assert_exact(seen["in_flight"], {serving, version}, TEMPERATURE)
    played.assert_exact(seen["fresh"], {version}, TEMPERATURE)


@pytest.mark.parametrize("name", BEFORE)
def test_a_failure_before_the_switch_leaves_the_old_version_serving(played: Played, name: str) -> None:
    scene = played.seen[name]
    before, _ = versions(scene)
    assert scene["error"] == "AdoptionFailedError"
    assert REASONS[name] in scene["reason"]
    assert scene["damaged"] is (name == "fault_read")
    assert (tuple(scene["version"]), scene["checksum_fits"]) == (before, True)
    played.assert_exact(scene["in_flight"], {before}, TEMPERATURE)
    assert all(len(sample["ids"]) == 150 for sample in scene["in_flight"])
    played.assert_exact(scene["fresh"], {before}, TEMPERATURE)
    assert_adopted_next(played, scene, before)


@pytest.mark.parametrize("name", AFTER)
def test_a_failure_from_the_switch_on_is_mended_before_sampling_goes_on(played: Played, name: str) -> None:
    scene = played.seen[name]
    before, tried = versions(scene)
    assert (scene["error"], tuple(scene["version"]), scene["checksum_fits"]) == (None, tried, True)
    played.assert_exact(scene["in_flight"], {before, tried}, TEMPERATURE)
    assert all(len(sample["ids"]) == 150 for sample in scene["in_flight"])
    assert runs(scene["in_flight"]) == {(before, tried)}
    played.assert_exact(scene["fresh"], {tried}, TEMPERATURE)
    assert_adopted_next(played, scene, tried)


@pytest.mark.parametrize("name", FATAL)
def test_what_cannot_be_mended_ends_the_engine(played: Played, name: str) -> None:
    """It never samples again: the process ends, and its successor begins with the newest version."""
    scene = played.seen[name]
    assert scene["error"] == "EngineDeadError"
    assert REASONS[name] in scene["reason"]
    assert scene["dead"] == scene["reason"]
    assert scene["refuses"] is True


def test_a_drain_lets_every_turn_end_under_the_version_it_began_with(played: Played) -> None:
    scene = played.seen["drain"]
    before, new = versions(scene)
    assert scene["still_in_flight"] == 8
    assert runs(scene["early"]) == {(before,)}
    assert runs(scene["late"]) == {(new,)}
    played.assert_exact(scene["early"], {before}, TEMPERATURE)
    played.assert_exact(scene["late"], {new}, TEMPERATURE)


def test_a_drain_that_takes_too_long_leaves_the_old_version_serving(played: Played) -> None:
    scene = played.seen["drain_too_long"]
    before, _ = versions(scene)
    assert scene["error"] == "AdoptionFailedError"
    assert "actor.adopt_drain_s = 0.01 s" in scene["reason"]
    assert tuple(scene["version"]) == before
    played.assert_exact(scene["in_flight"], {before}, TEMPERATURE)
    seen, version = scene["next"], (scene["before"][0] + 1, 3)
    assert (seen["error"], tuple(seen["version"])) == (None, version)
    played.assert_exact(seen["in_flight"], {before}, TEMPERATURE)
    played.assert_exact(seen["fresh"], {version}, TEMPERATURE)
