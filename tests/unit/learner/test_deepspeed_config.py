"""Settings and a DeepSpeed JSON, merged or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from broker.process.learner_settings import LearnerSection
from broker.process.lifecycle import ErgonError
from learner.training.deepspeed_config import deepspeed_config


def made(path: Path | None = None, given: Any = None, **settings: Any) -> dict[str, Any]:
    if path is not None:
        path.write_text(given if isinstance(given, str) else json.dumps(given))
        settings["deepspeed_config"] = str(path)
    return deepspeed_config(LearnerSection.model_validate(settings))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deepspeed.json"


def test_the_settings_alone() -> None:
    config = made(zero_stage=2, clip_grad_norm=0.5, learning_rate=1e-5, betas=(0.8, 0.9), weight_decay=0.1)
    assert config["zero_optimization"] == {"stage": 2}
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    params = config["optimizer"]["params"]
    assert (params["lr"], params["betas"], params["weight_decay"]) == (1e-5, [0.8, 0.9], 0.1)
    assert params["torch_adam"]
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1


def test_float32_without_zero_still_checks_the_gradient_first() -> None:
    assert made(zero_stage=0, dtype="float32")["zero_optimization"]["stage"] == 1
    assert made(zero_stage=0)["zero_optimization"]["stage"] == 0


def test_offload_is_passed_through() -> None:
    config = made(zero_stage=3, offload_optimizer="nvme", offload_parameters="cpu", offload_path="/fast")
    assert config["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/fast"},
        "offload_param": {"device": "cpu"},
    }


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"zero_stage": 2, "offload_parameters": "cpu"}, r"learner\.offload_parameters = 'cpu' needs .*zero_stage = 3"),
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, r"learner\.offload_optimizer = 'cpu' needs"),
    ],
)
def test_offload_that_the_stage_cannot_do_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ErgonError, match=named):
        made(**settings)


def test_what_ergon_does_not_own_is_passed_on(path: Path) -> None:
    given = {
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 12, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"params": {"eps": 1e-7, "lr": "auto"}},
        "communication_data_type": "fp32",
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "fp16": {"enabled": False},
        "wall_clock_breakdown": True,
    }
    config = made(path, given, zero_stage=3, learning_rate=1e-5)
    assert config["zero_optimization"] == {
        "stage": 3,
        "stage3_prefetch_bucket_size": 12,
        "offload_optimizer": {"device": "cpu"},
    }
    assert config["optimizer"]["type"] == "AdamW"
    assert (config["optimizer"]["params"]["eps"], config["optimizer"]["params"]["lr"]) == (1e-7, 1e-5)
    assert config["communication_data_type"] == "fp32"
    assert config["wall_clock_breakdown"] is True
    assert "fp16" not in config
    assert "train_batch_size" not in config


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            r"zero_optimization\.stage = 3, but .* 1; set learner\.zero_stage",
        ),
        ({"gradient_clipping": 0.3}, r"gradient_clipping = 0\.3, but Ergon needs 1\.0; set learner\.clip_grad_norm"),
        ({"gradient_accumulation_steps": 8}, r"gradient_accumulation_steps = 8, but Ergon needs 1; leave the key out"),
        ({"optimizer": {"type": "Lion"}}, r'optimizer\.type = "Lion", but Ergon needs "AdamW"; leave'),
        ({"optimizer": {"params": {"lr": 1e-2}}}, r"optimizer\.params\.lr = 0\.01, .*set learner\.learning_rate"),
        ({"bf16": {"enabled": False}}, r"bf16\.enabled = false, but Ergon needs true; set learner\.dtype"),
        ({"zero_optimization": 3}, r"zero_optimization = 3, but Ergon needs"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler = .* cannot be used; .*learner\.learning_rate_schedule"),
        ({"fp16": {"enabled": True}}, r"fp16 = .* cannot be used; set learner\.dtype"),
        ({"train_batch_size": 64}, r"train_batch_size = 64 cannot be used"),
    ],
)
def test_what_contradicts_is_refused_by_name(path: Path, given: Any, sentence: str) -> None:
    with pytest.raises(ErgonError, match=sentence):
        made(path, given)


def test_a_path_that_contradicts_the_offload_setting_is_refused(path: Path) -> None:
    given = {"zero_optimization": {"offload_optimizer": {"nvme_path": "/other"}}}
    with pytest.raises(ErgonError, match=r'nvme_path = "/other", but Ergon needs "/fast"; set learner\.offload_path'):
        made(path, given, offload_optimizer="nvme", offload_path="/fast")


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "is not valid JSON"), ("[1]", "holds a list; a DeepSpeed JSON is an object")]
)
def test_a_file_that_is_no_object_is_refused(path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ErgonError, match=sentence):
        made(path, text)


def test_a_missing_file_is_one_sentence() -> None:
    with pytest.raises(ErgonError, match=r"learner\.deepspeed_config '/no/such\.json' cannot be read"):
        made(deepspeed_config="/no/such.json")
