"""Two ranks against one, and every ZeRO stage against the others: the same losses, gradients and weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from learner.training.deepspeed_engine import DeepSpeedEngine
from learner.training.shards import Shards
from tests.environment import environment
from tests.integration.learner import ranks_job
from tests.integration.learner.samples import engine_settings, mixed_sequences, random_sequences
from tests.ports import free_port
from tests.tiny_model import make_tiny_model

STAGES = ranks_job.STAGES
# Sums of float32 in another order. Seen here: loss 2.4e-7, norm 1.2e-7 (relative), log-probs 9.5e-7; weights 5.1e-6,
# where Adam divides a gradient that is next to nothing by its own size: half a per cent of one step's learning rate.
SCALARS = {"rel": 2e-6, "abs": 2e-6}
LOGPROBS = 3e-6
WEIGHTS = 1e-5
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What two ranks did, by ZeRO stage."""
    directory = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    job = [str(free_port()), "-m", "tests.integration.learner.ranks_job", str(model), str(directory)]
    environ = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(
        [*command, *job], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[int, dict[str, Any]] = torch.load(directory / "results.pt", weights_only=False)
    return results


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank did."""
    directory = tmp_path_factory.mktemp("one")
    settings = {"dtype": "float32", "zero_stage": 1}
    result = ranks_job.steps(DeepSpeedEngine(engine_settings(model, **settings)), directory / "saved")
    engine = DeepSpeedEngine(engine_settings(model, **settings, minibatches=3))
    return {
        **result,
        "decoupled": ranks_job.decoupled_steps(engine),
        "decoupled_weights": ranks_job.weights_of(engine),
    }


def same_scalars(found: list[Mapping[str, float]], expected: list[Mapping[str, float]]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"num_micro_batches", "num_packed_tokens"}:  # these are a matter of division
            assert mine[name] == pytest.approx(theirs[name], **SCALARS), name


def furthest(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_do_what_one_does(two: dict[int, dict[str, Any]], one: dict[str, Any], stage: int) -> None:
    same_scalars(two[stage]["steps"], one["steps"])
    assert furthest(two[stage]["weights"], one["weights"]) < WEIGHTS
    for mine, theirs in zip(two[stage]["logprobs"], one["logprobs"], strict=True):
        assert np.abs(mine - theirs).max() < LOGPROBS
    same_scalars(two[stage]["further"], one["further"])


@pytest.mark.parametrize("stage", STAGES)
def test_other_policies_and_minibatches_are_the_same_on_two_ranks(
    two: dict[int, dict[str, Any]], one: dict[str, Any], stage: int
) -> None:
    same_scalars(two[stage]["decoupled"], one["decoupled"])
    assert furthest(two[stage]["decoupled_weights"], one["decoupled_weights"]) < WEIGHTS
    assert [stats["num_refused_minibatches"] for stats in one["decoupled"]] == [0, 0]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_resume_bit_for_bit(two: dict[int, dict[str, Any]], stage: int) -> None:
    assert two[stage]["resumed"] == two[stage]["further"]
    assert furthest(two[stage]["resumed_weights"], two[stage]["further_weights"]) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_what_one_rank_refuses_all_refuse(two: dict[int, dict[str, Any]], stage: int) -> None:
    on_rank_0, on_rank_1, guarded = two[stage]["refused"]
    assert on_rank_0 == on_rank_1 == "the loss is inf at version 5"
    assert guarded.startswith("nll ")
    assert furthest(two[stage]["after_refusals"], two[stage]["further_weights"]) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_a_sequence_takes_part_all_the_same(
    two: dict[int, dict[str, Any]], one: dict[str, Any], stage: int
) -> None:
    same_scalars([two[stage]["one_sequence"]], [one["one_sequence"]])


def test_streamed_weights_are_those_gathered_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3, in buckets of a few tensors each, read out of order and across a step."""
    monkeypatch.setattr("learner.training.served.BUCKET_BYTES", 40_000)
    engine = DeepSpeedEngine(engine_settings(model, zero_stage=3))
    assert len(engine._worker.served.buckets) > 3
    for seed in range(2):
        engine.step(random_sequences(6, seed), ranks_job.supervised_loss, 1e-3)
        whole = ranks_job.gathered_at_once(engine)
        assert furthest(ranks_job.weights_of(engine), whole) == 0
        for name in sorted(whole, reverse=True):
            assert torch.equal(engine.read_weight(name), whole[name])
    assert all(parameter.numel() == 0 for parameter in engine._worker._engine.module.causal_lm.parameters())


def test_versions_made_of_each_ranks_changes_are_whole(two: dict[int, dict[str, Any]], model: Path) -> None:
    """What DeepSpeed's own parts say, against weights gathered whole; on two ranks and on one."""
    alone = ranks_job.published_by_parts(DeepSpeedEngine(engine_settings(model, zero_stage=3)))
    for result in (two[3]["by_parts"], alone):
        assert furthest(result["held"], result["live"]) == 0
        assert all(0 < num < 0.5 * result["num_elements"] for num in result["num_changed"])


def test_a_division_that_is_not_known_is_refused() -> None:
    """Should DeepSpeed divide weights in another way one day, nothing wrong is published."""
    shard = torch.zeros(4)
    shard.ds_numel = 4  # type: ignore[attr-defined]
    parameter = SimpleNamespace(ds_id=0, ds_numel=12, ds_tensor=shard)
    with pytest.raises(RuntimeError, match="not how deepspeed is known to divide weights"):
        Shards(0, 2).mark([parameter])


def test_a_model_born_in_parts_has_the_tables_of_one_born_whole(model: Path) -> None:
    """In bf16, ZeRO-3 would round the rotary frequencies, which no weight shows."""
    tables = [
        dict(DeepSpeedEngine(engine_settings(model, zero_stage=stage))._worker._engine.module.named_buffers())
        for stage in (1, 3)
    ]
    assert tables[0].keys() == tables[1].keys()
    for name, table in tables[0].items():
        assert table.dtype == tables[1][name].dtype == torch.float32
        assert torch.equal(table, tables[1][name])


def test_checkpointed_activations_change_nothing(model: Path) -> None:
    plain, checkpointed = (
        DeepSpeedEngine(engine_settings(model, dtype="float32", activation_checkpointing=value))
        for value in (False, True)
    )
    for _ in range(2):
        expected = plain.step(mixed_sequences(), ranks_job.supervised_loss, 1e-3)
        assert checkpointed.step(mixed_sequences(), ranks_job.supervised_loss, 1e-3) == expected
    assert checkpointed._worker._engine.module.causal_lm.is_gradient_checkpointing


@pytest.mark.parametrize("settings", [{"zero_stage": 1}, {"zero_stage": 3, "offload_parameters": "cpu"}])
def test_offloaded_engines_do_the_same(model: Path, one: dict[str, Any], settings: dict[str, Any]) -> None:
    engine = DeepSpeedEngine(engine_settings(model, dtype="float32", offload_optimizer="cpu", **settings))
    same_scalars([engine.step(mixed_sequences(), ranks_job.supervised_loss, 1e-3) for _ in range(3)], one["steps"])
    assert furthest(ranks_job.weights_of(engine), one["weights"]) < WEIGHTS
