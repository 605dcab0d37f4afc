"""Low-rank adapters: what is trained, what is published, what is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from broker.process.lifecycle import ErgonError
from broker.process.loss_settings import LossSection
from learner.losses.policy import policy_loss, supervised_loss
from learner.training.deepspeed_engine import DeepSpeedEngine
from tests.integration.learner.samples import engine_settings, mixed_sequences, random_sequences
from tests.tiny_model import make_tiny_model

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def make_engine(model: Path, lora: dict[str, Any] | None = None, **learner: Any) -> DeepSpeedEngine:
    return DeepSpeedEngine(engine_settings(model, lora=lora or LORA, **learner))


def weights_of(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.weights()}


def adapters_of(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The adapters' weights by their names in a whole model (ZeRO 0-2)."""
    parameters = engine._worker._engine.module.causal_lm.named_parameters()
    return {name: parameter.detach() for name, parameter in parameters if parameter.requires_grad}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")])
def test_merged_weights_are_those_that_peft_merges(model: Path, dtype: str, targets: tuple[str, ...]) -> None:
    engine = make_engine(model, {**LORA, "targets": targets}, dtype=dtype)
    for seed in range(3):
        engine.step(random_sequences(6, seed), supervised_loss, 1e-2)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    chosen = "all-linear" if targets == ("all-linear",) else list(targets)
    wrapped = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=chosen), autocast_adapter_dtype=False)
    adapters = {f"base_model.model.{name}": tensor for name, tensor in adapters_of(engine).items()}
    _, unexpected = wrapped.load_state_dict(adapters, strict=False)
    assert not unexpected
    assert adapters
    merged = dict(wrapped.merge_and_unload().state_dict())
    published = weights_of(engine)
    assert published.keys() == merged.keys() - {"lm_head.weight"}
    for name, tensor in published.items():
        assert torch.equal(tensor, merged[name]), name
    moved = {name for name, tensor in published.items() if not torch.equal(tensor, before[name])}
    assert all(name.endswith("proj.weight") for name in moved)
    assert len(moved) == (14 if targets == ("all-linear",) else 4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_only_the_adapters_learn_and_a_resume_is_bit_exact(model: Path, tmp_path: Path, stage: int) -> None:
    """Also with a reference policy, which is the one that reinforcement learning began with, not the base model."""
    objective = policy_loss(LossSection(reference_kl=0.1))
    engine = make_engine(model, zero_stage=stage)
    losses = [engine.step(random_sequences(6), supervised_loss, 1e-2)["loss"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    first = engine.step(mixed_sequences(), objective, 1e-3)
    assert first["reference_kl"] == pytest.approx(0.0, abs=1e-6)
    engine.save(tmp_path)
    expected = [engine.step(random_sequences(6, seed), objective, 1e-3) for seed in range(2)]
    assert expected[-1]["reference_kl"] > 1e-6
    final = weights_of(engine)

    other = make_engine(model, zero_stage=stage)
    other.load(tmp_path)
    assert [other.step(random_sequences(6, seed), objective, 1e-3) for seed in range(2)] == expected
    for name, tensor in other.weights():
        assert torch.equal(tensor, final[name]), name


def test_every_stage_does_the_same(model: Path) -> None:
    """ZeRO-3 merges what it gathers."""
    found = []
    for stage in (0, 1, 3):
        engine = make_engine(model, zero_stage=stage, dtype="float32")
        for _ in range(2):
            engine.step(mixed_sequences(), supervised_loss, 1e-3)
        found.append(weights_of(engine))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert max(float((other[name] - found[0][name]).abs().max()) for name in other) < 1e-5


def test_checkpointed_activations_reach_the_adapters(model: Path) -> None:
    engine = make_engine(model, activation_checkpointing=True)
    plain = make_engine(model)
    for _ in range(2):
        expected = plain.step(mixed_sequences(), supervised_loss, 1e-3)
        assert engine.step(mixed_sequences(), supervised_loss, 1e-3) == expected
    assert expected["grad_norm"] > 0


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (("no_such_proj",), "fits no layer of Qwen3ForCausalLM"),
        (("q_proj", "lm_head"), "names the LM head|names lm_head"),
        (("embed_tokens",), "names model.embed_tokens"),
    ],
)
def test_targets_that_cannot_be_trained_are_refused(model: Path, targets: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ErgonError, match=sentence):
        make_engine(model, {**LORA, "targets": targets})
