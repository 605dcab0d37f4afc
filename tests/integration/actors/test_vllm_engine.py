"""The real engine against a Hugging Face forward pass of the same weights, before, during and after weight updates."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[3]
TEMPERATURE = 0.8
LONG = 300
BASE = (0, 0)
LIMITS = {"float32": (1e-4, 1e-4), "bfloat16": (5e-2, 5e-3)}  # mean |difference|, |mean ratio - 1|


@dataclass
class Played:
    """What a session saw, and the models to compare it with."""

    dtype: str
    seen: dict[str, Any]
    process: subprocess.Popen[str]
    models: dict[tuple[int, int], Any]

    def differences(
        self, samples: list[dict[str, Any]], temperature: float = TEMPERATURE
    ) -> dict[tuple[int, int], Any]:
        """Hugging Face's log-prob minus the engine's, by the version that sampled the token according to its run."""
        found: dict[tuple[int, int], list[Any]] = {}
        for sample in samples:
            versions = [(run[0], run[1]) for run in sample["runs"] for _ in range(run[2])]
            assert len(versions) == len(sample["ids"]) == len(sample["logprobs"])
            for version in sorted(set(versions)):
                wanted = np.array([v == version for v in versions])
                expected = self.score(version, sample, temperature)
                found.setdefault(version, []).append((expected - np.array(sample["logprobs"]))[wanted])
        return {version: np.concatenate(parts) for version, parts in found.items()}

    def score(self, version: tuple[int, int], sample: dict[str, Any], temperature: float) -> Any:
        import torch

        ids = torch.tensor([sample["prompt"] + sample["ids"]])
        with torch.no_grad():
            logits = self.models[version](ids).logits[0, len(sample["prompt"]) - 1 : -1].float() / temperature
        return logits.log_softmax(-1).gather(1, ids[0, len(sample["prompt"]) :, None])[:, 0].numpy()

    def assert_exact(self, samples: list[dict[str, Any]], versions: set[tuple[int, int]], temperature: float) -> None:
        differences = self.differences(samples, temperature)
        assert set(differences) == versions
        max_mean, max_ratio_error = LIMITS[self.dtype]
        for version, difference in differences.items():
            print(
                f"{self.dtype} version={version} tokens={difference.size} mean_abs={np.abs(difference).mean():.2e} "
                f"max={np.abs(difference).max():.2e} mean_ratio={np.exp(difference).mean():.5f}"
            )
            assert np.abs(difference).mean() < max_mean
            # The bound is for a mean over many tokens; few ones scatter around it by chance.
            assert abs(np.exp(difference).mean() - 1) < max_ratio_error * max(1.0, (400 / difference.size) ** 0.5)


def make_weights(model: Path, directory: Path, dtype: str) -> dict[tuple[int, int], Any]:
    """Write three updates far from each other and some bad ones; returns the reference models by version."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    directory.mkdir()
    torch_dtype = getattr(torch, dtype)
    base = load_file(model / "model.safetensors")
    models = {BASE: AutoModelForCausalLM.from_pretrained(model, dtype=torch_dtype).eval()}
    for number in (1, 2, 3):
        generator = torch.Generator().manual_seed(number)
        state = {
            name: (tensor.float() * (1.5 + 0.5 * torch.randn(tensor.shape, generator=generator))).to(torch_dtype)
            for name, tensor in base.items()
        }
        save_file(state, directory / f"{number}.safetensors")
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch_dtype).eval()
        reference.load_state_dict(state, strict=False)
        models[7, number] = reference
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**state, name: state[name][:-1].contiguous()}, directory / "bad_shape.safetensors")
    save_file({**state, name: state[name].to(torch.int32)}, directory / "bad_dtype.safetensors")
    save_file({key: value for key, value in state.items() if key != name}, directory / "bad_missing.safetensors")
    save_file({**state, "model.extra": state[name].clone()}, directory / "bad_extra.safetensors")
    shutil.copy(directory / "3.safetensors", directory / "bad_cut.safetensors")
    with (directory / "bad_cut.safetensors").open("r+b") as file:
        file.truncate(5000)
    return models


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    dtype = request.param
    directory = tmp_path_factory.mktemp(dtype)
    model, out = make_tiny_model(directory / "model"), directory / "seen.json"
    models = make_weights(model, directory / "weights", dtype)
    arguments = [str(model), dtype, str(directory / "weights"), str(out), "kill" if dtype == "bfloat16" else "serve"]
    with (directory / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.actors.engine_session", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            while not out.exists() or not out.read_text():
                try:
                    process.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
                log.seek(0)
                pytest.fail(f"the session ended early:\n{log.read()[-6000:]}")
            yield Played(dtype, json.loads(out.read_text()), process, models)
        finally:
            process.kill()
            process.wait()


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


def test_what_fails_while_weights_are_prepared_leaves_the_old_version_serving(played: Played) -> None:
    reasons = played.seen["not_prepared"]
    assert f"has the hash {'00' * 16}, but the engine read" in reasons["2.safetensors"]
    assert "the engine could not prepare vanished.safetensors" in reasons["vanished.safetensors"]
    played.assert_exact(played.seen["greedy_after_not_prepared"], {(7, 2)}, 1.0)


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
