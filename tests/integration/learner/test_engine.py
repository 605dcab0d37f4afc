"""The training engine on real DeepSpeed and a tiny model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from learner.engine import Aggregation, TokenBatch, TrainingError, TrainSequence
from learner.losses.aggregation import token_weights
from learner.losses.policy import policy_loss, supervised_loss
from learner.publisher import wire_bytes
from learner.training.deepspeed_engine import DeepSpeedEngine
from learner.training.packing import pack
from tests.integration.learner.samples import (
    PROMPT,
    engine_settings,
    make_sequence,
    mixed_sequences,
    random_sequences,
)
from tests.tiny_model import make_tiny_model

STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_engine(model_path: Path, **learner: Any) -> DeepSpeedEngine:
    return DeepSpeedEngine(engine_settings(model_path, **learner))


def plain_logprobs(model: Any, sequence: TrainSequence) -> np.ndarray[Any, Any]:
    ids_1T = torch.from_numpy(sequence.token_ids_T.astype(np.int64))[None]
    with torch.no_grad():
        logits_TV = model(input_ids=ids_1T).logits[0].float()
    all_TV = torch.log_softmax(logits_TV[:-1], -1).gather(1, ids_1T[0, 1:, None])[:, 0].numpy()
    return all_TV[sequence.loss_mask_T[1:]]


@pytest.mark.parametrize("siblings", [True, False])
def test_packed_logprobs_equal_hugging_face(model_path: Path, siblings: bool) -> None:
    engine = make_engine(model_path, dtype="float32", micro_batch_tokens=256)
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    sequences = random_sequences(10, siblings=siblings)
    micros = pack(sequences, 256, token_weights(sequences, "token"))
    shared = any(tree.mask_NN is not None for micro in micros for tree in micro.trees)
    assert shared is siblings
    for packed, sequence in zip(engine.logprobs(sequences), sequences, strict=True):
        assert np.abs(packed - plain_logprobs(reference, sequence)).max() < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_give_the_gradient_of_the_whole(model_path: Path, stage: int) -> None:
    """The gradient norm equals plain PyTorch's on the unpacked batch, however many micro-batches there are."""
    sequences = mixed_sequences()
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="sdpa")
    total, num_tokens = torch.zeros(()), 0
    for sequence in sequences:
        ids_1T = torch.from_numpy(sequence.token_ids_T.astype(np.int64))[None]
        logits = reference(input_ids=ids_1T).logits[0, :-1]
        picked = torch.log_softmax(logits, -1).gather(1, ids_1T[0, 1:, None])[:, 0]
        chosen = torch.from_numpy(sequence.loss_mask_T[1:])
        total = total - picked[chosen].sum()
        num_tokens += int(chosen.sum())
    (total / num_tokens).backward()
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters()))
    for budget in (64, 4096):
        engine = make_engine(model_path, dtype="float32", zero_stage=stage, micro_batch_tokens=budget)
        stats = engine.step(sequences, supervised_loss, 0.0)
        assert stats["num_micro_batches"] == len(pack(sequences, budget, token_weights(sequences, "token")))
        assert stats["loss"] == pytest.approx(float(total.detach()) / num_tokens, rel=1e-5)
        assert stats["grad_norm"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_supervised_steps_learn_and_weights_move(model_path: Path, stage: int) -> None:
    engine = make_engine(model_path, zero_stage=stage)
    before = {name: tensor.clone() for name, tensor in engine.weights()}
    losses = [engine.step(random_sequences(6), supervised_loss, 3e-3)["loss"] for _ in range(12)]
    after = dict(engine.weights())
    assert losses[-1] < 0.7 * losses[0]
    assert engine.policy_version == 12
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("proj.weight"))


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_are_named_as_hugging_face_names_them_tied_ones_once(model_path: Path, stage: int) -> None:
    engine = make_engine(model_path, zero_stage=stage)
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    expected = dict(reference.state_dict())
    layout = engine.weight_layout()
    assert {spec.name for spec in layout} == set(expected) - {"lm_head.weight"}
    for spec, (name, tensor) in zip(layout, engine.weights(), strict=True):
        assert (spec.name, spec.dtype, spec.shape) == (name, "bfloat16", tuple(expected[name].shape))
        assert wire_bytes(tensor).tobytes() == expected[name].view(torch.uint8).numpy().tobytes()
        assert torch.equal(engine.read_weight(name), tensor)


@pytest.mark.parametrize("stage", STAGES)
def test_save_load_continue_is_bit_identical(model_path: Path, tmp_path: Path, stage: int) -> None:
    engine = make_engine(model_path, zero_stage=stage)
    loss = policy_loss(Settings().learner.loss)
    for seed in range(3):
        engine.step(random_sequences(6, seed), supervised_loss, 1e-3)
    engine.save(tmp_path)
    torch_state = torch.get_rng_state()
    continued = [engine.step(random_sequences(6, seed), loss, 1e-3) for seed in range(3, 6)]
    final = {name: tensor.clone() for name, tensor in engine.weights()}

    other = make_engine(model_path, zero_stage=stage)
    other.step(random_sequences(6, 99), supervised_loss, 1e-2)  # whatever it was before
    torch.rand(5)
    other.load(tmp_path)
    assert other.policy_version == 3
    assert torch.equal(torch.get_rng_state(), torch_state)
    again = [other.step(random_sequences(6, seed), loss, 1e-3) for seed in range(3, 6)]
    assert again == continued
    assert other.policy_version == 6
    for name, tensor in other.weights():
        assert torch.equal(tensor, final[name]), name


class Broken:
    """The supervised objective, with a fault in the second of several micro-batches."""

    aggregation: Aggregation = "token"
    needs_proximal = False
    needs_reference = False

    def __init__(self, fault: str) -> None:
        self.num_calls = 0
        self._fault = fault

    def __call__(self, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, float]]:
        self.num_calls += 1
        total, stats = supervised_loss(batch)
        if self.num_calls == 2:
            return (total * math.inf, stats) if self._fault == "loss" else (total + (total * 0).sqrt(), stats)
        return total, stats


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(model_path: Path, stage: int, fault: str) -> None:
    engine, twin = (make_engine(model_path, zero_stage=stage) for _ in range(2))
    sequences = random_sequences(12, siblings=False)
    before = {name: tensor.clone() for name, tensor in engine.weights()}
    broken = Broken(fault)
    with pytest.raises(TrainingError, match="loss is" if fault == "loss" else "gradient norm"):
        engine.step(sequences, broken, 1e-3)
    assert broken.num_calls >= 2
    assert engine.policy_version == 0
    for name, tensor in engine.weights():
        assert torch.equal(tensor, before[name]), name
    # And nothing of the refused batch is left over: the next step is that of an engine that never saw it.
    assert engine.step(sequences, supervised_loss, 1e-3) == twin.step(sequences, supervised_loss, 1e-3)


def test_a_batch_without_trained_tokens_is_refused(model_path: Path) -> None:
    engine = make_engine(model_path)
    with pytest.raises(TrainingError, match="without a single trained token"):
        engine.step([make_sequence([1, 2, 3], 3)], supervised_loss, 1e-3)


def test_reset_optimizer_is_a_fresh_optimizer(model_path: Path, tmp_path: Path) -> None:
    engine = make_engine(model_path, dtype="float32")
    engine.step(random_sequences(6), supervised_loss, 0.0)  # moments, but no change of the weights
    engine.reset_optimizer()
    fresh = make_engine(model_path, dtype="float32")
    engine.step(random_sequences(6, 1), supervised_loss, 1e-3)
    fresh.step(random_sequences(6, 1), supervised_loss, 1e-3)
    for (name, tensor), (_, expected) in zip(engine.weights(), fresh.weights(), strict=True):
        assert torch.equal(tensor, expected), name


class Recording:
    """The supervised objective, with the log-probs that it is shown."""

    aggregation: Aggregation = "token"
    needs_proximal = True
    needs_reference = True

    def __init__(self) -> None:
        self.shown: list[TokenBatch] = []

    def __call__(self, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, float]]:
        self.shown.append(batch)
        return supervised_loss(batch)


@pytest.mark.parametrize("stage", STAGES)
def test_other_policies_are_those_they_claim_to_be(model_path: Path, stage: int) -> None:
    engine = make_engine(model_path, zero_stage=stage, micro_batch_tokens=4096, minibatches=2, dtype="float32")
    engine.step(random_sequences(6, 1), supervised_loss, 1e-3)  # a warm start: the reference is what comes after it
    sequences = random_sequences(8, 2, siblings=False)

    def sorted_logprobs(given: list[TrainSequence]) -> np.ndarray[Any, Any]:
        return np.sort(np.concatenate(engine.logprobs(given)))

    reference = sorted_logprobs(sequences)
    for number in range(2):
        before = sorted_logprobs(sequences)
        recording = Recording()
        engine.step(sequences, recording, 1e-3)
        assert len(recording.shown) == 2
        for name, expected in (("proximal_logprobs_N", before), ("reference_logprobs_N", reference)):
            found = torch.cat([getattr(batch, name) for batch in recording.shown]).numpy()
            assert np.abs(np.sort(found) - expected).max() < 1e-5, name
        moved = recording.shown[1].logprobs_N.detach() - recording.shown[1].proximal_logprobs_N
        assert float(moved.abs().max()) > 1e-3  # the second minibatch sees a policy that the first one changed
        assert bool(np.array_equal(before, reference)) is (number == 0)
    assert engine.policy_version == 5


def test_rewarded_tokens_become_likelier(model_path: Path) -> None:
    """A bandit: eight answers to one prompt are sampled from the policy, one of them is rewarded."""
    engine = make_engine(model_path, dtype="float32")
    loss = policy_loss(Settings().learner.loss)
    answers = list(range(50, 58))
    good = answers[3]

    def probabilities() -> list[float]:
        return [float(np.exp(engine.logprobs([make_sequence([*PROMPT, a], len(PROMPT))])[0][0])) for a in answers]

    start = probabilities()
    for _ in range(10):
        now = probabilities()
        arms = [
            make_sequence([*PROMPT, a], len(PROMPT), (1.0 if a == good else 0.0) - 1 / 8, [math.log(p)])
            for a, p in zip(answers, now, strict=True)
        ]
        stats = engine.step(arms, loss, 3e-3)
        assert stats["mismatch_kl"] < 1e-5
        assert stats["ratio"] == pytest.approx(1.0, abs=1e-4)
    end = probabilities()
    assert end[3] > 2 * start[3]
    assert end[3] == max(end)


def test_a_missing_model_is_one_sentence() -> None:
    with pytest.raises(ErgonError, match=r"model\.path is '/no/such/model'"):
        make_engine(Path("/no/such/model"))


def test_a_deepspeed_json_reaches_deepspeed_and_its_mistakes_are_one_sentence(model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 7}}')
    engine = make_engine(model_path, zero_stage=3, deepspeed_config=str(path))
    assert engine._worker._engine.zero_param_persistence_threshold() == 7
    path.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": "many"}}')
    with pytest.raises(ErgonError, match=r"learner\.deepspeed_config .*stage3_param_persistence_threshold: "):
        make_engine(model_path, zero_stage=3, deepspeed_config=str(path))
