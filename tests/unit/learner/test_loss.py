"""The objectives against a slow transcription of their formulas, token by token, in value, gradient and statistics."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from broker.process.loss_settings import Correction, Kind, LossSection
from learner.engine import TokenBatch
from learner.losses.importance import effective_sample_size, sequence_means
from learner.losses.policy import policy_loss, supervised_loss
from tests.unit.learner import transcriptions
from tests.unit.learner.transcriptions import Token

KINDS: tuple[Kind, ...] = ("grpo", "cispo", "gspo", "dppo_tv", "decoupled", "reinforce")
ALL: tuple[Correction, ...] = ("truncated", "window", "guard")


def allowed(kind: Kind) -> list[tuple[Correction, ...]]:
    """Every choice of corrections that goes with a kind."""
    subsets = [chosen for size in range(4) for chosen in combinations(ALL, size)]
    match kind:
        case "cispo":
            return [chosen for chosen in subsets if "truncated" in chosen]
        case "reinforce":
            return [chosen for chosen in subsets if "truncated" not in chosen]
        case "gspo":
            return [chosen for chosen in subsets if set(chosen) <= {"guard"}]
        case _:
            return subsets


def make_batch(logprobs: Sequence[float], tokens: Sequence[Token], dtype: torch.dtype = torch.float64) -> TokenBatch:
    """The same tokens as the objectives get them."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(token, name) for token in tokens], dtype=dtype)

    return TokenBatch(
        logprobs_N=torch.tensor(logprobs, dtype=dtype, requires_grad=True),
        behaviour_logprobs_N=column("behaviour"),
        advantages_N=column("advantage"),
        weights_N=column("weight"),
        entropy_N=column("entropy"),
        sequence_ids_N=torch.tensor([token.sequence for token in tokens], dtype=torch.int64),
        proximal_logprobs_N=column("proximal"),
        reference_logprobs_N=column("reference"),
    )


def plain(behaviour: float, advantage: float = 1.0, sequence: int = 0) -> Token:
    return Token(behaviour, behaviour, behaviour, advantage, 0.5, sequence, 1.0)


NEAR = st.floats(-3, -0.01)
FAR = st.floats(-60, -1e-4)
LOGPROB = st.one_of(NEAR, NEAR, FAR)
TOKEN = st.builds(
    Token,
    behaviour=st.one_of(LOGPROB, LOGPROB, LOGPROB, st.sampled_from([-math.inf, math.inf, math.nan])),
    proximal=LOGPROB,
    reference=LOGPROB,
    advantage=st.one_of(st.floats(-2, 2), st.sampled_from([0.0, 1e6, -1e6])),
    entropy=st.floats(0, 3),
    sequence=st.integers(0, 3),
    weight=st.floats(0, 1),
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[float], list[Token]]:
    """Tokens of up to four sequences, many of them near the policy, some absurdly far."""
    tokens = draw(st.lists(TOKEN, min_size=0, max_size=10))
    near = st.floats(-0.5, 0.5)
    logprobs = []
    for token in tokens:
        moved = min(token.behaviour + draw(near), -1e-6) if math.isfinite(token.behaviour) else -1.0
        logprobs.append(draw(st.one_of(st.just(moved), st.just(moved), LOGPROB)))
    for token, logprob in zip(tokens, logprobs, strict=True):  # where a log-ratio stops changing there is no derivative
        for other in (token.behaviour, token.proximal, token.reference):
            assume(not math.isfinite(other) or abs(abs(logprob - other) - 20) > 1e-3)
    return logprobs, tokens


@st.composite
def sections(draw: st.DrawFn) -> LossSection:
    """Settings of every kind."""
    kind = draw(st.sampled_from(KINDS))
    return LossSection(
        kind=kind,
        importance=draw(st.sampled_from(allowed(kind))),
        aggregation="sequence" if kind == "gspo" else draw(st.sampled_from(["token", "sequence", "constant"])),
        sequence_clip=draw(st.sampled_from([(3e-4, 4e-4), (0.2, 0.3)])),
        sequence_guard=(0.4, 2.5),
        drift_penalty=draw(st.sampled_from([0.0, 1e-3, 0.1])),
        reference_kl=draw(st.sampled_from([0.0, 0.05])),
        reference_estimator=draw(st.sampled_from(["k1", "k2", "k3"])),
        entropy_bonus=draw(st.sampled_from([0.0, 0.01])),
    )


@settings(deadline=None, max_examples=400)
@given(batch=batches(), section=sections())
def test_every_objective_equals_its_transcription(batch: tuple[list[float], list[Token]], section: LossSection) -> None:
    logprobs, tokens = batch
    made = make_batch(logprobs, tokens)
    loss, stats = policy_loss(section)(made)
    expected = transcriptions.objective(tokens, logprobs, logprobs, section)
    scale = 1 + sum(abs(token.advantage) * math.exp(20) for token in tokens if abs(token.advantage) > 2)
    assert float(loss.detach()) == pytest.approx(expected.loss, rel=1e-9, abs=1e-12 * scale)

    masked = [any(m) for m in zip(expected.masked_window, expected.masked_guard, expected.not_finite, strict=True)]
    assert stats["masked_window_fraction"] == sum(expected.masked_window)
    assert stats["masked_guard_fraction"] == sum(expected.masked_guard)
    assert stats["masked_not_finite_fraction"] == sum(expected.not_finite)
    assert stats["loss_masked_fraction"] == sum(masked)
    assert stats["clip_fraction"] == sum(expected.clipped)
    assert all(math.isfinite(value) for value in stats.values())

    (actual,) = torch.autograd.grad(loss, made.logprobs_N)
    # A difference of two sums is no better than the last digits of what is summed, and huge terms may cancel out.
    largest = max([abs(expected.loss), *(abs(token.advantage) for token in tokens)])
    for i, wanted in enumerate(transcriptions.gradient(tokens, logprobs, section)):
        assert actual[i].item() == pytest.approx(wanted, rel=1e-5, abs=1e-6 + 1e-9 * largest)


@settings(deadline=None, max_examples=100)
@given(batch=batches(), section=sections())
def test_statistics_are_sums_over_all_tokens(batch: tuple[list[float], list[Token]], section: LossSection) -> None:
    logprobs, tokens = batch
    _, stats = policy_loss(section)(make_batch(logprobs, tokens))
    logs = [
        transcriptions.bounded(p - t.behaviour) if math.isfinite(t.behaviour) else 0.0
        for p, t in zip(logprobs, tokens, strict=True)
    ]
    assert stats["ratio"] == pytest.approx(sum(math.exp(d) for d in logs))
    assert stats["ratio_squared"] == pytest.approx(sum(math.exp(2 * d) for d in logs))
    assert stats["mismatch_kl"] == pytest.approx(sum(math.exp(d) - 1 - d for d in logs), rel=1e-9, abs=1e-9)
    assert stats["entropy"] == pytest.approx(sum(token.entropy for token in tokens))
    references = [transcriptions.bounded(p - t.reference) for p, t in zip(logprobs, tokens, strict=True)]
    assert stats["reference_kl"] == pytest.approx(sum(math.exp(-d) - 1 + d for d in references), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_has_no_nan_at_the_ends_of_its_range(kind: Kind) -> None:
    far = [plain(b, a, q) for q, (b, a) in enumerate([(-3e38, 1e6), (-1e-30, -1e6), (-math.inf, 1.0), (math.nan, 1.0)])]
    logprobs = [-0.1, -200.0, -1.0, -1.0, -1.0]
    far = [token._replace(reference=-1.0, proximal=-1.0) for token in far]  # the trainer's own, always finite
    batch = make_batch(logprobs, [*far, plain(-1.0, 1.0, 4)], torch.float32)
    loss, stats = policy_loss(LossSection(kind=kind, importance=("guard",) if kind == "gspo" else ("auto",)))(batch)
    (gradient,) = torch.autograd.grad(loss, batch.logprobs_N)
    assert math.isfinite(float(loss.detach()))
    assert torch.isfinite(gradient).all()
    assert all(math.isfinite(value) for value in stats.values())
    assert stats["masked_not_finite_fraction"] == 2
    assert gradient[2:].tolist() == pytest.approx([0.0, 0.0, -1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_is_not_a_number_shows_in_the_loss(kind: Kind) -> None:
    """It is not masked: masking it would train on the rest of a broken model."""
    loss, _ = policy_loss(LossSection(kind=kind))(make_batch([math.nan, -1.0], [plain(-1.0), plain(-1.0, 1.0, 1)]))
    assert math.isnan(float(loss.detach()))


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_every_objective_has_the_policy_gradient(kind: Kind) -> None:
    tokens = [plain(-1.0, 0.5), plain(-2.0, 0.5), plain(-0.5, -0.25, 1)]
    batch = make_batch([token.behaviour for token in tokens], tokens)
    loss, stats = policy_loss(LossSection(kind=kind))(batch)
    (gradient,) = torch.autograd.grad(loss, batch.logprobs_N)
    assert gradient.tolist() == pytest.approx([-0.5, -0.5, 0.25])
    assert stats["loss_masked_fraction"] == 0
    assert stats["clip_fraction"] == 0


def test_truncated_weight_still_pushes_a_bad_token_down_with_the_cap() -> None:
    batch = make_batch([math.log(0.9)], [plain(math.log(0.3), -1.0)])  # r = 3, cap 2, inside the window [0.5, 5]
    loss, _ = policy_loss(LossSection(drift_penalty=0.0, sequence_guard=(0.1, 10.0)))(batch)
    (gradient,) = torch.autograd.grad(loss, batch.logprobs_N)
    assert float(loss.detach()) == pytest.approx(2.0)
    assert gradient.item() == pytest.approx(2.0)


def test_dppo_lets_rare_tokens_move_and_holds_frequent_ones() -> None:
    rare = make_batch([math.log(0.03)], [plain(math.log(0.01), 1.0)])  # r = 3, a difference of 0.02
    frequent = make_batch([math.log(0.98)], [plain(math.log(0.7), 1.0)])  # r = 1.4, a difference of 0.28
    no_guard = LossSection(kind="dppo_tv", importance=(), drift_penalty=0.0)
    assert torch.autograd.grad(policy_loss(no_guard)(rare)[0], rare.logprobs_N)[0].item() == pytest.approx(-3.0)
    assert torch.autograd.grad(policy_loss(no_guard)(frequent)[0], frequent.logprobs_N)[0].item() == 0.0


def test_decoupled_does_not_clip_for_staleness_alone() -> None:
    """pi = rho has moved far from mu: PPO's clip around mu leaves no gradient, around rho it does."""
    token = Token(math.log(0.3), math.log(0.6), 0.0, 1.0, 0.0, 0, 1.0)  # r = 2
    wide = {"token_window": (0.1, 10.0), "sequence_guard": (0.1, 10.0), "drift_penalty": 0.0}
    for kind, expected in (("grpo", 0.0), ("decoupled", -2.0)):
        batch = make_batch([math.log(0.6)], [token])
        loss, _ = policy_loss(LossSection(kind=kind, **wide))(batch)
        assert torch.autograd.grad(loss, batch.logprobs_N)[0].item() == pytest.approx(expected)


def test_what_an_objective_needs_and_does_not_get_is_said() -> None:
    batch = make_batch([-1.0], [plain(-1.0)])
    bare = TokenBatch(
        *(getattr(batch, name) for name in TokenBatch.__dataclass_fields__ if not name.startswith(("prox", "ref")))
    )
    for section, missing in ((LossSection(kind="decoupled"), "proximal"), (LossSection(reference_kl=0.1), "reference")):
        objective = policy_loss(section)
        assert (objective.needs_proximal, objective.needs_reference) == (missing == "proximal", missing == "reference")
        with pytest.raises(ValueError, match=missing):
            objective(bare)


def test_objectives_travel_to_other_ranks() -> None:
    objective = policy_loss(LossSection(kind="gspo"))
    assert pickle.loads(pickle.dumps(objective)) == objective
    assert objective.aggregation == "sequence"
    assert pickle.loads(pickle.dumps(supervised_loss)) == supervised_loss


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), section=sections())
def test_gradient_of_a_whole_policy_equals_finite_differences(seed: int, section: LossSection) -> None:
    """Through a softmax over a table of logits, in float64, with masks and stop-gradients held where they are."""
    rng = np.random.default_rng(seed)
    logits_CV, contexts_N, targets_N = rng.normal(size=(3, 4)), rng.integers(0, 3, 7), rng.integers(0, 4, 7)

    def logprobs(values_CV: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(values_CV, -1)[contexts_N, targets_N]

    start = logprobs(torch.from_numpy(logits_CV)).tolist()
    tokens = [
        Token(
            *(p + rng.normal(0, 0.3, 3)), float(rng.normal()), float(rng.uniform(0, 1.3)), int(q), float(rng.uniform())
        )
        for p, q in zip(start, rng.integers(0, 3, 7), strict=True)
    ]
    table = torch.from_numpy(logits_CV).requires_grad_()
    batch = make_batch(start, tokens)
    object.__setattr__(batch, "logprobs_N", logprobs(table))
    loss, _ = policy_loss(section)(batch)
    (actual,) = torch.autograd.grad(loss, table)
    for place in np.ndindex(3, 4):
        values = []
        for width in (1e-6, -1e-6):
            moved = logits_CV.copy()
            moved[place] += width
            values.append(
                transcriptions.objective(tokens, logprobs(torch.from_numpy(moved)).tolist(), start, section).loss
            )
        assert actual[place].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_supervised_loss_is_the_negative_log_likelihood() -> None:
    loss, stats = supervised_loss(make_batch([-1.0, -2.5], [plain(0.0), plain(0.0)._replace(weight=0.5)]))
    assert float(loss.detach()) == pytest.approx(1.0 + 1.25)
    assert stats["nll"] == pytest.approx(3.5)


def test_sequence_means_and_effective_sample_size() -> None:
    means = sequence_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]))
    assert means.tolist() == [2.0, 0.0, 5.0]
    assert sequence_means(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []
    ratios = np.asarray([1.0, 1.0, 4.0])
    expected = ratios.sum() ** 2 / (3 * (ratios**2).sum())
    assert effective_sample_size(float(ratios.mean()), float((ratios**2).mean())) == pytest.approx(expected)
    assert effective_sample_size(0.0, 0.0) == 0.0
