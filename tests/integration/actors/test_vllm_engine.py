"""The real engine against a Hugging Face forward pass of the same weights, before, during and after weight updates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from tests.integration.actors.sessions import BASE, TEMPERATURE, Played, play

LONG = 300
SCENES = (
    "initial_version",
    "before",
    "greedy",
    "in_flight",
    "in_flight_again",
    "after",
    "greedy_after",
    "refused",
    "greedy_after_refusal",
    "version_after_refusal",
    "aborted",
    "cancelled",
    "too_long",
    "keep_cache",
    "prepares",
    "both_ways",
    "children",
    "vllm_metrics",
    "ld_preload",
)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    dtype = request.param
    scenes = [*SCENES, "killed"] if dtype == "bfloat16" else SCENES
    # What travels in a wider format than the engine's is rounded to that.
    wire_dtypes = (dtype, "float32", dtype)
    with play(tmp_path_factory.mktemp(dtype), dtype, scenes, wire_dtypes=wire_dtypes) as session:
        yield session


def test_log_probs_equal_a_forward_pass_of_the_same_weights(played: Played) -> None:
    assert played.seen["initial_version"] == list(BASE)
    played.assert_exact(played.seen["before"], {BASE}, TEMPERATURE)
    played.assert_exact(played.seen["greedy"][0], {BASE}, 1.0)


def test_greedy_sampling_takes_the_likeliest_token_and_repeats_itself(played: Played) -> None:
    first, second = played.seen["greedy"]
    if played.dtype == "float32":
        assert [s["ids"] for s in first] == [s["ids"] for s in second]
    for sample in first:
        assert len(sample["ids"]) == 48 or sample["finish"] == "stop"


def test_tokens_on_both_sides_of_an_update_in_flight_are_exact_under_their_own_version(played: Played) -> None:
    for scene, old, new in (("in_flight", BASE, (7, 1)), ("in_flight_again", (7, 1), (7, 2))):
        samples = played.seen[scene]["samples"]
        assert all(len(sample["ids"]) == LONG and sample["finish"] == "length" for sample in samples)
        played.assert_exact(samples, {old, new}, TEMPERATURE)
        if played.dtype == "float32":
            # The control: under the other version's weights the same tokens are far off.
            for sample in samples:
                wrong, switch = played.score(new, sample, TEMPERATURE), sample["runs"][0][2]
                assert np.abs(wrong[:switch] - np.array(sample["logprobs"])[:switch]).mean() > 0.1
    assert 0 < played.seen["in_flight"]["pause_s"] < 10


def test_after_an_update_old_prefixes_are_not_reused(played: Played) -> None:
    played.assert_exact(played.seen["after"], {(7, 2)}, TEMPERATURE)
    played.assert_exact(played.seen["greedy_after"], {(7, 2)}, 1.0)


def test_where_the_cache_is_kept_only_requests_in_flight_use_it(played: Played) -> None:
    played.assert_exact(played.seen["keep_cache"]["fresh"], {(7, 3)}, TEMPERATURE)
    runs = played.seen["keep_cache"]["in_flight"]["samples"][0]["runs"]
    assert [tuple(run[:2]) for run in runs] == [(7, 2), (7, 3)]


def test_weights_that_do_not_fit_are_refused_and_the_old_version_serves_on(played: Played) -> None:
    reasons = played.seen["refused"]
    assert "has shape [127, 64]; the model's is [128, 64]" in reasons["bad_shape"]
    assert "has dtype I32; allowed: BF16, F16, F32" in reasons["bad_dtype"]
    assert "1 missing ['model.layers.0.mlp.up_proj.weight']" in reasons["bad_missing"]
    assert "1 unknown ['model.extra']" in reasons["bad_extra"]
    assert "not a readable safetensors file" in reasons["bad_cut"]
    assert played.seen["version_after_refusal"] == [7, 2]
    played.assert_exact(played.seen["greedy_after_refusal"], {(7, 2)}, 1.0)


def test_prepared_weights_are_those_of_a_reload_bit_by_bit(played: Played) -> None:
    assert played.seen["prepares"] is True
    seen = played.seen["both_ways"]
    for prepared, reloaded in zip(seen[::2], seen[1::2], strict=True):
        assert (prepared["prepares"], reloaded["prepares"]) == (True, False)
        assert prepared["logprobs"] == reloaded["logprobs"]
        assert prepared["digests"][0] == prepared["digests"][1]
    assert seen[0]["logprobs"] == seen[4]["logprobs"] != seen[2]["logprobs"]


def test_an_abort_keeps_what_was_sampled(played: Played) -> None:
    sample = played.seen["aborted"]
    assert sample["finish"] == "abort"
    assert 0 < len(sample["ids"]) < LONG
    played.assert_exact([sample], {(7, 2)}, TEMPERATURE)


def test_cancelling_frees_the_engine(played: Played) -> None:
    assert played.seen["cancelled"] == 0


def test_a_request_that_cannot_be_served_does_not_end_the_engine(played: Played) -> None:
    assert played.seen["too_long"] not in ("dead", "served")


def test_metrics_of_vllm_are_in_the_process_registry_and_the_environment_is_clean(played: Played) -> None:
    assert "vllm:generation_tokens" in played.seen["vllm_metrics"]
    assert played.seen["ld_preload"] is None


def test_a_dead_engine_process_fails_every_request(played: Played) -> None:
    if played.dtype != "bfloat16":
        pytest.skip("played in the other session")
    assert played.seen["killed"]["requests"] == ["EngineDeadError"] * 8
    assert played.seen["killed"]["check"]


def test_a_killed_actor_leaves_no_engine_behind(played: Played) -> None:
    """Last, because it ends the session."""
    if played.dtype != "float32":
        pytest.skip("the engine of the other session is dead already")
    children = [psutil.Process(pid) for pid in played.seen["children"]]
    assert children
    played.process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
