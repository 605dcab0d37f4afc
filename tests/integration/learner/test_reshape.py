"""A checkpoint of one rank goes on with two, and that of two with one: no number changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from broker.process.lifecycle import ErgonError
from learner.training.deepspeed_engine import DeepSpeedEngine
from tests.environment import environment
from tests.integration.learner import reshape_job
from tests.integration.learner.reshape_job import STAGES, begun, gone_on, saved_by_one, saved_by_two
from tests.integration.learner.samples import engine_settings
from tests.ports import free_port
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[3]
WEIGHTS = 1e-5  # see test_ranks: float32 sums in another order


def make_engine(model: Path, stage: int) -> DeepSpeedEngine:
    return DeepSpeedEngine(engine_settings(model, dtype="float32", zero_stage=stage))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[int, Any], dict[int, Any]]:
    """The model, the folder, and what one rank and two ranks did after one rank's checkpoint, by ZeRO stage."""
    directory = tmp_path_factory.mktemp("reshape")
    model = make_tiny_model(directory / "model")
    one = {}
    for stage in STAGES:
        engine = make_engine(model, stage)
        begun(engine, saved_by_one(directory, stage))
        one[stage] = gone_on(engine)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    job = [str(free_port()), "-m", reshape_job.__name__, str(model), str(directory)]
    done = subprocess.run(
        [*command, *job],
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return model, directory, one, torch.load(directory / "results.pt", weights_only=False)


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["version"] == expected["version"] == 3
    for name, tensor in expected["weights"].items():
        assert torch.equal(found["weights"][name], tensor), name
    for mine, theirs in zip(found["further"], expected["further"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-6)
    for name, tensor in expected["further_weights"].items():
        assert (found["further_weights"][name] - tensor).abs().max() < WEIGHTS, name


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_go_on_from_what_one_saved(played: tuple[Path, Path, Any, Any], stage: int) -> None:
    _, directory, one, two = played
    compare(two[stage], one[stage])
    assert sorted(p.name for p in saved_by_one(directory, stage).parents[1].iterdir()) == ["000001"]  # no scratch


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_goes_on_from_what_two_saved(played: tuple[Path, Path, Any, Any], stage: int) -> None:
    model, directory, one, _ = played
    engine = make_engine(model, stage)
    engine.load(saved_by_two(directory, stage))
    compare(gone_on(engine), one[stage])


def test_another_division_of_the_weights_is_refused(played: tuple[Path, Path, Any, Any]) -> None:
    model, directory, _, _ = played
    engine = make_engine(model, 2)
    with pytest.raises(ErgonError, match=r"was written with ZeRO-3; set learner\.zero_stage"):
        engine.load(saved_by_two(directory, 3))
