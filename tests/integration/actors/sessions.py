"""Real engines in processes of their own, and the Hugging Face models that what they sampled is compared with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[3]
TEMPERATURE = 0.8
BASE = (0, 0)
LIMITS = {  # mean |difference|, |mean ratio - 1|
    "float32": (1e-4, 1e-4),
    "bfloat16": (5e-2, 5e-3),
    "float16": (1e-2, 2e-3),
}


@dataclass
class Played:
    """What a session saw, and the models to compare it with."""

    dtype: str
    seen: dict[str, Any]
    process: subprocess.Popen[str]
    models: dict[int, Any]  # by the number of their file; 0: the model itself

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

    def score_all(self, version: tuple[int, int], ids: list[int], temperature: float) -> Any:
        """Log-probs of all tokens but the first, given those before them."""
        import torch

        batch = torch.tensor([ids])
        with torch.no_grad():
            logits = self.models[version[1]](batch).logits[0, :-1].float() / temperature
        return logits.log_softmax(-1).gather(1, batch[0, 1:, None])[:, 0].numpy()

    def score(self, version: tuple[int, int], sample: dict[str, Any], temperature: float) -> Any:
        scores = self.score_all(version, sample["prompt"] + sample["ids"], temperature)
        return scores[len(sample["prompt"]) - 1 :]

    def assert_exact(self, samples: list[dict[str, Any]], versions: set[tuple[int, int]], temperature: float) -> None:
        differences = self.differences(samples, temperature)
        assert set(differences) == versions
        self.assert_close(differences)

    def assert_close(self, differences: dict[tuple[int, int], Any]) -> None:
        """Differences by version, each of some tokens, are within the dtype's limits."""
        max_mean, max_ratio_error = LIMITS[self.dtype]
        for version, difference in differences.items():
            print(
                f"{self.dtype} version={version} tokens={difference.size} mean_abs={np.abs(difference).mean():.2e} "
                f"max={np.abs(difference).max():.2e} mean_ratio={np.exp(difference).mean():.5f}"
            )
            assert np.abs(difference).mean() < max_mean
            # The bound is for a mean over many tokens; few ones scatter around it by chance.
            assert abs(np.exp(difference).mean() - 1) < max_ratio_error * max(1.0, (400 / difference.size) ** 0.5)


def make_weights(model: Path, directory: Path, dtype: str, wire_dtypes: Sequence[str]) -> dict[int, Any]:
    """Write three updates far from each other, each in a number format of its own, and some bad ones; returns the
    reference models by number."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    directory.mkdir()
    torch_dtype = getattr(torch, dtype)
    base = load_file(model / "model.safetensors")
    models = {0: AutoModelForCausalLM.from_pretrained(model, dtype=torch_dtype).eval()}
    for number, wire_dtype in enumerate(wire_dtypes, start=1):
        generator = torch.Generator().manual_seed(number)
        state = {
            name: (tensor.float() * (1.5 + 0.5 * torch.randn(tensor.shape, generator=generator))).to(
                getattr(torch, wire_dtype)
            )
            for name, tensor in base.items()
        }
        save_file(state, directory / f"{number}.safetensors")
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch_dtype).eval()
        reference.load_state_dict(state, strict=False)
        models[number] = reference
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**state, name: state[name][:-1].contiguous()}, directory / "bad_shape.safetensors")
    save_file({**state, name: state[name].to(torch.int32)}, directory / "bad_dtype.safetensors")
    save_file({key: value for key, value in state.items() if key != name}, directory / "bad_missing.safetensors")
    save_file({**state, "model.extra": state[name].clone()}, directory / "bad_extra.safetensors")
    shutil.copy(directory / "3.safetensors", directory / "bad_cut.safetensors")
    with (directory / "bad_cut.safetensors").open("r+b") as file:
        file.truncate(5000)
    return models


@contextmanager
def play(
    directory: Path,
    dtype: str,
    scenes: Sequence[str],
    *,
    wire_dtypes: Sequence[str] = (),
    num_workers: int = 1,
    mode: str = "recompute",
) -> Iterator[Played]:
    """Start a session (`engine_session.py`) that plays these scenes; it goes on serving until the end.

    wire_dtypes: of the three updates; by default they are in the engine's own format.
    """
    model, out = make_tiny_model(directory / "model"), directory / "seen.json"
    models = make_weights(model, directory / "weights", dtype, wire_dtypes or [dtype] * 3)
    settings = {"dtype": dtype, "tensor_parallel": num_workers, "adopt_mode": mode}
    plan = {"settings": settings, "scenes": list(scenes)}
    with (directory / "log").open("w+") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.integration.actors.engine_session"),
                *(str(model), str(directory / "weights"), str(out), json.dumps(plan)),
            ],
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
