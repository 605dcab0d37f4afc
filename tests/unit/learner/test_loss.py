"""The losses against a slow transcription of their formula in plain Python, token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.process.learner_settings import LossSection
from learner.engine import TokenBatch
from learner.losses.policy import effective_sample_size, policy_loss, sequence_means, supervised_loss


def make_batch(rows: list[tuple[float, float, float, int]]) -> TokenBatch:
    """Rows of (target log-prob, behaviour log-prob, advantage, sequence id)."""
    columns = list(zip(*rows, strict=True))
    return TokenBatch(
        logprobs_N=torch.tensor(columns[0], dtype=torch.float32, requires_grad=True),
        behaviour_logprobs_N=torch.tensor(columns[1], dtype=torch.float32),
        advantages_N=torch.tensor(columns[2], dtype=torch.float32),
        entropy_N=torch.zeros(len(rows)),
        sequence_ids_N=torch.tensor(columns[3], dtype=torch.int64),
    )


def transcription(rows: list[tuple[float, float, float, int]], s: LossSection) -> tuple[float, list[float], int, int]:
    """(loss sum, d loss / d log pi, tokens masked, tokens clipped), from the docstring, one token at a time."""
    by_sequence: dict[int, list[float]] = {}
    for target, behaviour, _, sequence in rows:
        by_sequence.setdefault(sequence, []).append(target - behaviour)
    total, gradient, masked, clipped = 0.0, [], 0, 0
    for target, behaviour, advantage, sequence in rows:
        d = target - behaviour
        r = math.exp(d)
        geometric = math.exp(sum(by_sequence[sequence]) / len(by_sequence[sequence]))
        in_window = s.token_window[0] <= r <= s.token_window[1]
        guarded = s.sequence_guard[0] <= geometric <= s.sequence_guard[1]
        if not (in_window and guarded):
            gradient.append(0.0)
            masked += 1
            continue
        w = min(r, s.importance_cap)
        bounded = min(max(r, 1 - s.clip_low), 1 + s.clip_high)
        penalty = 2 * s.drift_penalty * d
        if bounded * advantage < w * advantage:
            clipped += 1
            total += -bounded * advantage + s.drift_penalty * d * d
            gradient.append(penalty)
        else:
            total += -w * advantage + s.drift_penalty * d * d
            gradient.append(-w * advantage + penalty)
    return total, gradient, masked, clipped


ROW = st.tuples(
    st.floats(-4, -0.01), st.floats(-4, -0.01), st.integers(-200, 200).map(lambda n: n / 100), st.integers(0, 3)
)


@settings(deadline=None, max_examples=100)
@given(rows=st.lists(ROW, min_size=1, max_size=24), drift=st.sampled_from([0.0, 1e-3, 0.1]))
def test_policy_loss_equals_its_transcription(rows: list[tuple[float, float, float, int]], drift: float) -> None:
    section = LossSection(drift_penalty=drift, sequence_guard=(0.4, 2.5))
    edges = (*section.token_window, *section.sequence_guard, 0.8, 1.28, section.importance_cap)
    by_sequence: dict[int, list[float]] = {}
    for t, b, _, q in rows:
        by_sequence.setdefault(q, []).append(t - b)
    ratios = [math.exp(t - b) for t, b, _, _ in rows] + [math.exp(np.mean(v)) for v in by_sequence.values()]
    if any(abs(r - edge) < 1e-3 for r in ratios for edge in edges):
        return  # float32 and float64 may fall on different sides
    batch = make_batch(rows)
    loss, stats = policy_loss(section)(batch)
    expected, gradient, masked, clipped = transcription(rows, section)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert stats["loss_masked_fraction"] == masked
    (actual,) = torch.autograd.grad(loss, batch.logprobs_N)
    assert actual.tolist() == pytest.approx(gradient, rel=1e-4, abs=1e-4)
    zero_advantages = sum(row[2] == 0 for row in rows)
    assert abs(stats["clip_fraction"] - clipped) <= zero_advantages
    kl = sum(math.exp(t - b) - 1 - (t - b) for t, b, _, _ in rows)
    assert stats["mismatch_kl"] == pytest.approx(kl, rel=1e-3, abs=1e-3)


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    batch = make_batch([(-1.0, -1.0, 0.5, 0), (-2.0, -2.0, -0.25, 0)])
    loss, _ = policy_loss(LossSection())(batch)
    (gradient,) = torch.autograd.grad(loss, batch.logprobs_N)
    assert gradient.tolist() == pytest.approx([-0.5, 0.25])


def test_truncated_weight_still_pushes_a_bad_token_down_with_the_cap() -> None:
    batch = make_batch([(math.log(0.9), math.log(0.3), -1.0, 0)])  # r = 3, cap 2, inside the window [0.5, 5]
    loss, _ = policy_loss(LossSection(drift_penalty=0.0, sequence_guard=(0.1, 10.0)))(batch)
    (gradient,) = torch.autograd.grad(loss, batch.logprobs_N)
    assert float(loss.detach()) == pytest.approx(2.0)
    assert gradient.item() == pytest.approx(2.0)


def test_gradient_equals_finite_differences_inside_the_cap() -> None:
    rows = [(-1.0, -1.1, 0.7, 0), (-0.5, -0.45, -0.6, 0), (-2.0, -1.9, 0.3, 1), (-1.5, -1.0, 0.9, 1)]
    section = LossSection(drift_penalty=0.05)

    def value(logprobs: list[float]) -> float:
        moved = [(t, *row[1:]) for t, row in zip(logprobs, rows, strict=True)]
        return transcription(moved, section)[0]

    batch = make_batch(rows)
    (gradient,) = torch.autograd.grad(policy_loss(section)(batch)[0], batch.logprobs_N)
    start = [row[0] for row in rows]
    for i in range(len(rows)):
        up, down = list(start), list(start)
        up[i] += 1e-5
        down[i] -= 1e-5
        assert gradient[i].item() == pytest.approx((value(up) - value(down)) / 2e-5, rel=1e-3, abs=1e-4)


def test_a_masked_token_with_an_infinite_ratio_leaves_no_trace() -> None:
    batch = make_batch([(-0.1, -3e38, 1.0, 0), (-1.0, -1.0, 1.0, 1)])
    loss, _ = policy_loss(LossSection())(batch)
    (gradient,) = torch.autograd.grad(loss, batch.logprobs_N)
    assert math.isfinite(float(loss.detach()))
    assert gradient.tolist() == pytest.approx([0.0, -1.0])


def test_supervised_loss_is_the_negative_log_likelihood() -> None:
    batch = make_batch([(-1.0, 0.0, 1.0, 0), (-2.5, 0.0, 1.0, 0)])
    loss, stats = supervised_loss(batch)
    assert float(loss.detach()) == pytest.approx(3.5)
    assert stats["nll"] == pytest.approx(3.5)


def test_sequence_means_and_effective_sample_size() -> None:
    means = sequence_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]))
    assert means.tolist() == [2.0, 0.0, 5.0]
    ratios = np.asarray([1.0, 1.0, 4.0])
    expected = ratios.sum() ** 2 / (3 * (ratios**2).sum())
    assert effective_sample_size(float(ratios.mean()), float((ratios**2).mean())) == pytest.approx(expected)
    assert effective_sample_size(0.0, 0.0) == 0.0
