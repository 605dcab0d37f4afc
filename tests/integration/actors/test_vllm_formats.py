"""Adoption where the engine is not alike to what travels: another number format, and a model shared by two workers.

One engine is all of that at once, because it takes longer to start than all its scenes take. That a bfloat16 engine
takes float32 is in `test_vllm_engine.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from tests.integration.actors.sessions import BASE, TEMPERATURE, Played, play

WIRE_DTYPES = ("bfloat16", "float32", "bfloat16")  # of versions 1 to 3
SCENES = ("before", "in_flight", "in_flight_again", "after", "keep_cache", "prepares")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    scenes = [*SCENES, "fault_one_worker", "both_ways", "children"]
    directory = tmp_path_factory.mktemp("sharded")
    with play(directory, "float16", scenes, wire_dtypes=WIRE_DTYPES, num_workers=2) as session:
        yield session


def test_two_workers_adopt_their_shards_and_round_what_travels_to_their_own_format(sharded: Played) -> None:
    assert sharded.seen["prepares"] is True
    sharded.assert_exact(sharded.seen["before"], {BASE}, TEMPERATURE)
    for scene, old, new in (("in_flight", BASE, (7, 1)), ("in_flight_again", (7, 1), (7, 2))):
        samples = sharded.seen[scene]["samples"]
        assert all(len(sample["ids"]) == 300 for sample in samples)
        sharded.assert_exact(samples, {old, new}, TEMPERATURE)
    sharded.assert_exact(sharded.seen["after"], {(7, 2)}, TEMPERATURE)
    sharded.assert_exact(sharded.seen["keep_cache"]["fresh"], {(7, 3)}, TEMPERATURE)
    for prepared, reloaded in zip(sharded.seen["both_ways"][::2], sharded.seen["both_ways"][1::2], strict=True):
        assert prepared["logprobs"] == reloaded["logprobs"]
        assert len({*prepared["digests"], *reloaded["digests"]}) == 1


def test_one_of_two_workers_that_fails_to_switch_leaves_no_mixture(sharded: Played) -> None:
    scene = sharded.seen["fault_one_worker"]
    before, tried = tuple(scene["before"]), (scene["before"][0], 2)
    assert (scene["error"], tuple(scene["version"]), scene["checksum_fits"]) == (None, tried, True)
    sharded.assert_exact(scene["in_flight"], {before, tried}, TEMPERATURE)
    sharded.assert_exact(scene["fresh"], {tried}, TEMPERATURE)


def test_a_killed_actor_leaves_no_worker_behind(sharded: Played) -> None:
    """Last, because it ends the session."""
    children = [psutil.Process(pid) for pid in sharded.seen["children"]]
    assert len(children) >= 3  # the engine and its workers
    sharded.process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
