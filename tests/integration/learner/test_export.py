"""An exported checkpoint is what was trained, for transformers and for vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from broker.process.config import save_settings
from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from learner.checkpoint import CheckpointStore
from learner.engine import TrainSequence
from learner.evaluation import STYLES, Evaluation
from learner.export import export
from learner.losses.policy import supervised_loss
from learner.state import TrainerState
from learner.training.deepspeed_engine import DeepSpeedEngine
from tests.ports import free_ports
from tests.tiny_model import make_tiny_model
from tests.unit.learner.make import make_trajectory

PROMPT = list(range(20, 40))


def sequences(seed: int) -> list[TrainSequence]:
    rng = np.random.default_rng(seed)
    return [
        TrainSequence(
            rng.integers(3, 400, 30).astype(np.int32),
            np.arange(30) >= 10,
            np.zeros(30, dtype=np.float32),
            1.0,
            np.zeros(30, dtype=np.int32),
        )
        for _ in range(4)
    ]


class Trained:
    """A run's folder with three checkpoints, the second one the best, and the weights of each."""

    def __init__(self, directory: Path, **learner: object) -> None:
        (master,) = free_ports(1)
        threads = torch.get_num_threads()
        model = make_tiny_model(directory / "model")
        values = {
            "run": {"directory": str(directory), "name": "trained"},
            "model": {"path": str(model)},
            "learner": {"master_port": master, **learner},
        }
        self.settings = Settings.model_validate(values)
        self.settings.run_dir.mkdir()
        save_settings(self.settings, self.settings.run_dir / "config.toml")
        engine = DeepSpeedEngine(self.settings)
        store = CheckpointStore(self.settings.run_dir / "checkpoints", 9)
        state = TrainerState(phase="train")
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        for step, (label, reward) in enumerate([("step-1", 0.25), ("step-2", 0.75), ("step-3", 0.5)], 1):
            engine.step(sequences(step), supervised_loss, 3e-3)
            state.step = step
            evaluation = Evaluation(label, 1)
            for style in STYLES:
                evaluation.add(style, 0, make_trajectory(reward=reward))
            state.evaluations[label], state.best = evaluation, "step-2" if step > 1 else "step-1"
            draft = store.draft()
            engine.save(draft.engine_directory)
            number = store.complete(draft, state.to_json(), label=label).number
            self.weights[number] = {name: tensor.clone() for name, tensor in engine.weights()}
        engine.close()
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize(("which", "number"), [("best", 2), ("last", 3), ("1", 1)])
def test_transformers_loads_what_was_trained(trained: Trained, tmp_path: Path, which: str, number: int) -> None:
    target = export(trained.settings, which, tmp_path / "out")
    saved = load_file(target / "model.safetensors")
    assert saved.keys() == trained.weights[number].keys()
    for name, tensor in trained.weights[number].items():
        assert saved[name].dtype == torch.bfloat16
        assert torch.equal(saved[name], tensor), name
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    for name, tensor in trained.weights[number].items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    base, tokenizer = (AutoTokenizer.from_pretrained(p) for p in (trained.settings.model.path, target))
    chat = [{"role": "user", "content": "What is the bill?"}]
    assert tokenizer.apply_chat_template(chat) == base.apply_chat_template(chat)
    card = (target / "README.md").read_text()
    assert f"| checkpoint | {number} |" in card
    assert f"| reinforcement-learning steps | {number} |" in card
    assert ("| step-2 | 1 | 0.750 | 0.750 |" in card) is (number > 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_what_cannot_be_exported_is_one_sentence(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ErgonError, match="exists and is not an empty directory"):
        export(trained.settings, "last", tmp_path / "full")
    with pytest.raises(ErgonError, match="--checkpoint '7' is not `best`, `last` or one of 1, 2, 3"):
        export(trained.settings, "7", tmp_path / "out")
    other = trained.settings.model_copy(update={"run": trained.settings.run.model_copy(update={"name": "none"})})
    with pytest.raises(ErgonError, match="holds no complete checkpoint yet"):
        export(other, "last", tmp_path / "out")
    small = trained.settings.model_copy(
        update={"model": trained.settings.model.model_copy(update={"path": str(tmp_path / "no-model")})}
    )
    with pytest.raises(ErgonError, match="no-model"):
        export(small, "last", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_without_an_evaluation_there_is_no_best(tmp_path: Path) -> None:
    settings = Settings.model_validate({"run": {"directory": str(tmp_path), "name": "new"}})
    CheckpointStore(settings.run_dir / "checkpoints", 1).save(TrainerState().to_json(), None)
    with pytest.raises(ErgonError, match=r"knows no best checkpoint.* name `last` or one of 1"):
        export(settings, "best", tmp_path / "out")


VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], max_model_len=128, enforce_eager=True, dtype="bfloat16", seed=0)
    prompt = {"prompt_token_ids": json.loads(sys.argv[2])}
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1))
    tokens = list(output.outputs[0].token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, tokens)]
    print("RESULT", json.dumps([tokens, logprobs]))
"""


@pytest.mark.timeout(600)
def test_the_command_exports_and_vllm_samples_what_transformers_would(trained: Trained, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy", "export", str(trained.settings.run_dir), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("MB, for transformers and vLLM")
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert again.returncode == 2
    assert "exists and is not an empty directory" in again.stderr
    assert "Traceback" not in again.stderr

    script = tmp_path / "sample.py"
    script.write_text(VLLM)
    command = [sys.executable, str(script), str(tmp_path / "out"), json.dumps(PROMPT)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=400, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    tokens, logprobs = json.loads(line.removeprefix("RESULT"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()
    assert np.abs(expected - np.asarray(logprobs)).max() < 0.1  # bf16 against float32
    untrained = AutoModelForCausalLM.from_pretrained(trained.settings.model.path, dtype=torch.float32)
    with torch.no_grad():
        before = untrained(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    assert np.abs(before.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy() - np.asarray(logprobs)).max() > 0.3
