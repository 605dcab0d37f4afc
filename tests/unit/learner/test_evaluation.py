"""Evaluation results, the paired bootstrap, the summary, the warm start's order, the line files, the state."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from broker.process.learner_settings import WarmStartSection
from broker.protocol.trajectory import Mode, Outcome
from learner.audit import AuditCounts, LineFile, audit_lines, read_audit
from learner.batching import Consumed, Reason
from learner.evaluation import Evaluation, paired_ci95, parse_eval_id
from learner.report import by_env
from learner.state import TrainerState
from learner.summary import summarise
from learner.warm_start import num_batches, scheduled, supervised_batches, warmed_up, worth_imitating
from tests.unit.learner.make import make_ticket, make_trajectory


def make_evaluation(phase: str, rewards: list[float], kinds: tuple[str, ...] = ("a", "b")) -> Evaluation:
    evaluation = Evaluation(phase, len(rewards))
    for number, reward in enumerate(rewards):
        for style in ("sampled", "greedy"):
            evaluation.add(style, number, make_trajectory(reward=reward, kind=kinds[number % len(kinds)]))
    return evaluation


def test_an_evaluation_is_complete_with_results_or_dead_letters() -> None:
    evaluation = Evaluation("before", 2)
    for style in ("sampled", "greedy"):
        evaluation.add(style, 0, make_trajectory(reward=1.0))
        assert not evaluation.complete
    evaluation.add_dead("sampled", 1)
    evaluation.add("greedy", 1, make_trajectory(reward=0.0))
    assert evaluation.complete
    assert evaluation.mean("sampled") == 1.0
    assert evaluation.mean("greedy") == 0.5
    again = Evaluation.from_state("before", json.loads(json.dumps(evaluation.to_state())))
    assert again.to_state() == evaluation.to_state()
    assert again.complete


def test_the_first_result_of_a_task_counts() -> None:
    evaluation = Evaluation("before", 1)
    evaluation.add("sampled", 0, make_trajectory(reward=1.0))
    evaluation.add("sampled", 0, make_trajectory(reward=0.0))
    assert evaluation.mean("sampled") == 1.0


def test_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    start = {k: float(v) for k, v in enumerate(rng.integers(0, 2, 200))}
    end = {k: v + 1.0 for k, v in start.items()}
    assert paired_ci95(start, end) == [1.0, 1.0]  # paired: the tasks' own spread cancels
    noisy = {k: v + float(rng.normal(0.3, 1)) for k, v in start.items()}
    interval = paired_ci95(start, noisy)
    assert interval is not None
    gains = np.asarray([noisy[k] - start[k] for k in start])
    half = 1.96 * gains.std(ddof=1) / np.sqrt(len(gains))
    assert interval == pytest.approx([gains.mean() - half, gains.mean() + half], abs=0.03)
    assert paired_ci95({}, end) is None


def test_eval_ids() -> None:
    assert parse_eval_id("my.run/eval/step-4/greedy/12", "my.run") == ("step-4", "greedy", 12, None)
    assert parse_eval_id("my.run/eval/after/greedy/b16/12", "my.run") == ("after", "greedy", 12, 16)
    assert parse_eval_id("my.run/eval/after/greedy/bunlimited/12", "my.run") == ("after", "greedy", 12, None)
    for bad in ("eval/step-4/beam/12", "eval/after/greedy/16/12", "train/4/0"):
        with pytest.raises(ValueError, match="no evaluation ticket"):
            parse_eval_id(f"my.run/{bad}", "my.run")


def test_summary_reports_kinds_gain_and_losses() -> None:
    state = TrainerState(phase="done", step=7, first_version=3)
    state.evaluations = {
        "before": make_evaluation("before", [0.0, 0.0]),
        "after-warm-start": make_evaluation("after-warm-start", [0.0, 1.0]),
        "after": make_evaluation("after", [1.0, 1.0]),
    }
    state.counters |= {"staleness_sum": 30, "staleness_tokens": 20, "staleness_max": 4, "tokens_trained": 20}
    tickets = {
        "acked": {"train": 9, "eval": 12},
        "delivered": {"train": 1},
        "cancelled": {"train": 4},
        "dead": {"train": 1},
    }
    summary = summarise(state, AuditCounts(6, 2, 7, 1), tickets, 12.5)
    assert (summary["reward_before"], summary["reward_after_warm_start"], summary["reward_after"]) == (0.0, 0.5, 1.0)
    assert (summary["greedy_before"], summary["greedy_after"]) == (0.0, 1.0)
    low, high = summary["ci95"]
    assert 0.0 <= low <= 0.5 <= high <= 1.0
    assert summary["kinds"]["a"] == {
        "before": 0.0,
        "after_warm_start": 0.0,
        "after": 1.0,
        "greedy_before": 0.0,
        "greedy_after_warm_start": 0.0,
        "greedy_after": 1.0,
    }
    assert summary["trajectories"] == {
        "issued": 15,
        "delivered": 10,
        "trained": 6,
        "masked": 2,
        "lost": 2,  # ten results, one still held, seven known to the audit
        "duplicated": 1,
        "cancelled": 4,
        "dead": 1,
    }
    assert (summary["staleness_mean"], summary["staleness_max"], summary["eval_tasks"]) == (1.5, 4, 2)


def test_a_mixture_is_summarised_by_environment() -> None:
    evaluations = {}
    for phase, reasoned in (("before", 0.0), ("after", 1.0)):
        evaluation = evaluations[phase] = Evaluation(phase, 4)
        for number, env in enumerate(("shop", "reason", "shop", "shop")):
            reward = reasoned if env == "reason" else 0.5
            evaluation.add("sampled", number, make_trajectory(make_ticket(env=env), reward))
            evaluation.add_dead("greedy", number)
    summary = summarise(TrainerState(evaluations=evaluations), AuditCounts(0, 0, 0, 0), {}, 1.0)
    assert summary["environments"] == {"reason": {"before": 0.0, "after": 1.0}, "shop": {"before": 0.5, "after": 0.5}}
    kept = json.loads(json.dumps(evaluations["after"].to_state()))
    assert Evaluation.from_state("after", kept).mean_by_env("sampled") == {"reason": 1.0, "shop": 0.5}
    for row in kept["results"]["sampled"].values():  # as a checkpoint of before has it
        del row[5:]
    assert Evaluation.from_state("after", kept).mean_by_env("sampled") == {}


def test_a_step_is_told_by_environment() -> None:
    episodes = [make_trajectory(make_ticket(env=env), reward) for env, reward in (("b", 1.0), ("a", 0.0), ("b", 0.0))]
    assert by_env(episodes) == {
        "a": {"episodes": 1, "reward": 0.0, "tokens_sampled": 3},
        "b": {"episodes": 2, "reward": 0.5, "tokens_sampled": 6},
    }


def test_summary_without_evaluation_or_warm_start() -> None:
    summary = summarise(TrainerState(), AuditCounts(0, 0, 0, 0), {}, 1.0)
    assert summary["reward_after_warm_start"] is None
    assert summary["ci95"] is None
    assert summary["trajectories"]["lost"] == 0


def test_supervised_batches_depend_on_the_seed_alone() -> None:
    episodes = [make_trajectory(make_ticket(k, 0, 1, Mode.REFERENCE)) for k in range(10)]
    section = WarmStartSection(episodes=10, passes=2, batch=4)
    sizes = [len(batch) for batch in supervised_batches(episodes, section, 1)]
    assert sorted(sizes[:3]) == sorted(sizes[3:]) == [2, 4, 4]
    assert len(sizes) == num_batches(10, section)
    ids = [[id(s.token_ids_T) for s in batch] for batch in supervised_batches(episodes, section, 1)]
    again = [[id(s.token_ids_T) for s in batch] for batch in supervised_batches(episodes[::-1], section, 1)]
    other = [[id(s.token_ids_T) for s in batch] for batch in supervised_batches(episodes, section, 2)]
    assert ids == again != other
    assert len({i for batch in ids[:3] for i in batch}) == 10


def test_consecutive_demonstrations_stay_in_one_batch() -> None:
    episodes = [make_trajectory(make_ticket(k, 0, 1, Mode.REFERENCE)) for k in range(12)]
    place = {id(e.segments[0].token_ids_T): e.ticket.task.index // 4 for e in episodes}
    for batch in supervised_batches(episodes[::-1], WarmStartSection(episodes=12, batch=4), 0):
        assert len({place[id(s.token_ids_T)] for s in batch}) == 1


def test_what_is_imitated() -> None:
    anything, good = WarmStartSection(), WarmStartSection(min_reward=1.0)
    assert worth_imitating(make_trajectory(reward=1.0), good)
    assert not worth_imitating(make_trajectory(reward=0.0), good)
    assert worth_imitating(make_trajectory(reward=0.0), anything)
    assert not worth_imitating(make_trajectory(reward=1.0, outcome=Outcome.ENV_FAILURE), anything)


def test_the_supervised_learning_rate_rises_stays_and_falls() -> None:
    section = WarmStartSection(learning_rate=1.0, learning_rate_warmup_steps=1, decay=0.5)
    assert [scheduled(section, step, 8) for step in range(8)] == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert scheduled(section.model_copy(update={"decay": 0.0}), 7, 8) == 1.0


def test_learning_rate_rises() -> None:
    assert [warmed_up(3.0, step, 2) for step in range(4)] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert warmed_up(3.0, 0, 0) == 3.0


def test_the_audit_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "trained.jsonl"
    consumed = [
        Consumed(make_trajectory(make_ticket(0, m)), Reason.TRAINED if m else Reason.ZERO_VARIANCE) for m in range(2)
    ]
    audit = LineFile(path)
    audit.append(audit_lines(consumed, 1), durable=True)
    kept = audit.num_bytes
    audit.append(audit_lines(consumed, 2), durable=True)
    audit.close()
    assert read_audit(path) == AuditCounts(num_trained=2, num_masked=2, num_ids=2, num_duplicated=2)
    with path.open("ab") as file:
        file.write(b'{"torn')  # a write that the kill interrupted
    audit = LineFile(path)
    audit.cut(kept)
    assert read_audit(path) == AuditCounts(num_trained=1, num_masked=1, num_ids=2, num_duplicated=0)
    audit.append(audit_lines(consumed[:1], 2), durable=True)
    assert read_audit(path).num_duplicated == 1
    with pytest.raises(ValueError, match="expects at least"):
        audit.cut(10**9)
    audit.close()


def test_state_survives_json_and_forgets_incomplete_evaluations() -> None:
    state = TrainerState(phase="train", step=3, curriculum={"next_group": 9}, unacked=["x"], audit_bytes=17)
    state.evaluations = {"before": make_evaluation("before", [1.0]), "step-2": Evaluation("step-2", 4)}
    state.overrun_price, state.overrun_rate = 0.7, 0.25
    again = TrainerState.from_json(json.loads(json.dumps(state.to_json())))
    assert set(again.evaluations) == {"before"}
    assert again.to_json() == state.to_json()
    assert (again.overrun_price, again.overrun_rate) == (0.7, 0.25)
