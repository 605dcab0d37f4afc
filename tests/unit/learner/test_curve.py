"""Evaluations that go through budgets: keys, curves, the files they leave, and what the summary says."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from learner.audit import AuditCounts
from learner.curve import draw, write_curves
from learner.evaluation import Evaluation, is_better, paired_ci95
from learner.state import TrainerState
from learner.summary import summarise
from learner.thinking import by_bucket
from tests.unit.learner.make import make_ticket, make_trajectory

BUDGETS = (0, 16, None)
SVG = "{http://www.w3.org/2000/svg}"


def make_evaluation(phase: str, rewards: dict[int | None, list[float]]) -> Evaluation:
    """One with these rewards of its tasks by budget; every other thinker is stopped."""
    evaluation = Evaluation(phase, len(rewards[0]), BUDGETS)
    for style in ("sampled", "greedy"):
        for budget, values in rewards.items():
            for number, reward in enumerate(values):
                thinking = (0, 0, 0) if budget == 0 else (10 + number, 0, number % 2)
                evaluation.add(style, number, make_trajectory(make_ticket(budget=budget), reward, thinking=thinking))
    return evaluation


REWARDS: dict[int | None, list[float]] = {0: [0.0, 0.0], 16: [0.0, 1.0], None: [1.0, 1.0]}


def test_it_is_complete_with_every_budget() -> None:
    evaluation = Evaluation("after", 1, BUDGETS)
    for style in ("sampled", "greedy"):
        for budget in BUDGETS:
            assert not evaluation.complete
            if budget == 16:
                evaluation.add_dead(style, 0, 16)
            else:
                evaluation.add(style, 0, make_trajectory(make_ticket(budget=budget), 0.5))
    assert evaluation.complete
    assert [point["budget"] for point in evaluation.curve("sampled")] == [0, "unlimited"]
    again = Evaluation.from_state("after", json.loads(json.dumps(evaluation.to_state())))
    assert again.to_state() == evaluation.to_state()
    assert again.complete


def test_a_curve_has_reward_tokens_adherence_and_forced_stops() -> None:
    points = make_evaluation("after", REWARDS).curve("greedy")
    assert [(p["budget"], p["reward"], p["episodes"]) for p in points] == [
        (0, 0.0, 2),
        (16, 0.5, 2),
        ("unlimited", 1.0, 2),
    ]
    assert [p["tokens"] for p in points] == [0.0, 10.5, 10.5]
    assert [(p["adherence"], p["forced"]) for p in points] == [(1.0, 0.0), (0.5, 0.5), (0.5, 0.5)]
    assert points[1]["reward_ci95"] == pytest.approx(1.96 * 0.5**0.5 / 2**0.5, abs=1e-3)


def test_a_checkpoint_of_before_there_were_budgets_is_read() -> None:
    evaluation = Evaluation.from_state(
        "after",
        {
            "num_tasks": 1,
            "results": {"sampled": {"0": ["kind", 0.5]}, "greedy": {"0": ["kind", 1.0]}},
            "missing": {"sampled": [], "greedy": []},
        },
    )
    assert evaluation.complete
    assert not evaluation.has_budgets
    assert evaluation.mean("greedy") == 1.0


def test_checkpoints_are_compared_budget_by_budget() -> None:
    best = make_evaluation("after", REWARDS)
    short = make_evaluation("step-2", {budget: values[:1] for budget, values in REWARDS.items()})
    assert set(short.rewards("sampled")) < set(best.rewards("sampled"))
    assert is_better(short, best)  # as good on the task that both have, though the other's mean is higher
    assert not is_better(make_evaluation("step-4", {0: [0.0], 16: [0.0], None: [0.5]}), best)


def test_the_interval_draws_tasks_not_results() -> None:
    start = dict.fromkeys(range(300), 0.0)
    end = {key: float(key // 3 % 2) for key in range(300)}  # a task gains with all three budgets, or with none
    by_task, by_result = paired_ci95(start, end, 3), paired_ci95(start, end)
    assert by_task is not None
    assert by_result is not None
    assert by_task[1] - by_task[0] == pytest.approx(3**0.5 * (by_result[1] - by_result[0]), rel=0.15)


def test_the_files_have_every_complete_evaluation(tmp_path: Path) -> None:
    evaluations = {
        "before": make_evaluation("before", {budget: [0.0, 0.0] for budget in BUDGETS}),
        "step-2": make_evaluation("step-2", REWARDS),
        "after": make_evaluation("after", REWARDS),
        "step-9": Evaluation("step-9", 4, BUDGETS),
    }
    write_curves(tmp_path, evaluations, "turn")
    data = json.loads((tmp_path / "budgets.json").read_text())
    assert data["per"] == "turn"
    assert list(data["evaluations"]) == ["before", "step-2", "after"]
    assert data["evaluations"]["after"]["greedy"] == evaluations["after"].curve("greedy")
    root = ElementTree.fromstring((tmp_path / "budgets.svg").read_text())
    assert len(root.findall(f"{SVG}polyline")) == 3 * 2  # reward and adherence of each
    texts = [element.text for element in root.findall(f"{SVG}text")]
    assert {"before", "step 2", "after", "0", "16", "unlimited"} <= set(texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["budgets.json", "budgets.svg"]


def test_a_higher_reward_is_drawn_higher_and_rewards_below_0_fit() -> None:
    curve = [{"budget": b, "reward": r, "reward_ci95": 0.1, "adherence": 1.0} for b, r in ((0, -1.0), (16, 2.0))]
    root = ElementTree.fromstring(draw({"after": curve}, "episode"))
    first, second = root.findall(f"{SVG}polyline")[0].attrib["points"].replace(",", " ").split()[1::2]
    assert float(first) > float(second)
    assert all(0 <= float(y) <= float(root.attrib["height"]) for y in (first, second))


def test_the_summary_has_the_curves_of_a_run_with_budgets() -> None:
    state = TrainerState(phase="done")
    state.evaluations = {"after": make_evaluation("after", REWARDS)}
    summary = summarise(state, AuditCounts(0, 0, 0, 0), {}, 1.0)
    assert [point["reward"] for point in summary["budgets"]["after"]["sampled"]] == [0.0, 0.5, 1.0]
    plain = Evaluation("after", 1)
    plain.add("sampled", 0, make_trajectory())
    state.evaluations = {"after": plain}
    assert summarise(state, AuditCounts(0, 0, 0, 0), {}, 1.0)["budgets"] == {}


def test_a_batch_is_reported_by_buckets() -> None:
    trajectories = [
        make_trajectory(make_ticket(budget=budget), reward, thinking=thinking)
        for budget, reward, thinking in (
            (None, 1.0, (90, 0, 0)),
            (0, 0.0, (0, 0, 0)),
            (20, 0.5, (20, 0, 1)),
            (60, 1.0, (70, 10, 0)),
        )
    ]
    buckets = by_bucket(trajectories)
    assert list(buckets) == ["0", "16-63", "unlimited"]
    middle = buckets["16-63"]
    assert (middle.episodes, middle.reward, middle.tokens) == (2, 0.75, 45.0)
    assert (middle.adherence, middle.over, middle.forced) == (0.0, 0.5, 0.5)
