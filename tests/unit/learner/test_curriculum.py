"""Which tickets are issued: the same ones every time, never too many, whatever the process dies of."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from broker.process.learner_settings import EvalSection
from broker.process.lifecycle import ErgonError
from broker.process.settings import EnvironmentSection, Settings
from broker.process.thinking_settings import BudgetsSection, ThinkingSection
from broker.protocol.trajectory import Mode, PolicyVersion, TaskRef, Ticket
from learner.batching import Consumed, Reason
from learner.curriculum import Curriculum, IssueLog
from learner.evaluation import parse_eval_id
from learner.mixture import spread
from learner.tickets import REFERENCE_FIRST_INDEX, eval_tickets, reference_tickets
from tests.unit.learner.make import make_trajectory

NEWEST = PolicyVersion(3, 7)
BAND = {"band": [0.2, 0.8], "explore": 0.3}


def make_settings(curriculum: dict[str, object] | None = None, **learner: int) -> Settings:
    values = {"groups_per_step": 2, "group_size": 4, "max_staleness": 1, "max_groups_per_step": 4} | learner
    return Settings.model_validate(
        {
            "run": {"name": "r1"},
            "learner": values,
            "eval": {"tasks": 5},
            "curriculum": curriculum or {},
            "environments": [{"name": "a"}, {"name": "b", "weight": [[0, 1.0], [50, 0.0]]}],
        }
    )


def make_curriculum(path: Path, settings: Settings | None = None, state: dict[str, object] | None = None) -> Curriculum:
    return Curriculum(settings or make_settings(), IssueLog(path / "issued.jsonl"), state)


def test_ids_and_tasks_are_the_same_after_a_resume(tmp_path: Path) -> None:
    first = make_curriculum(tmp_path).top_up(0, 100, NEWEST)
    assert first[0].ticket_id == "r1/train/0/0"
    assert first[0].min_version == NEWEST
    resumed = make_curriculum(tmp_path)  # no checkpoint was made
    assert resumed.num_issued == len(first) == 16
    again = resumed.repeated(NEWEST)
    assert again == first


@given(outstanding=st.integers(0, 40), remaining=st.integers(0, 10))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_admission_never_exceeds_staleness_or_need(tmp_path: Path, outstanding: int, remaining: int) -> None:
    (tmp_path / "issued.jsonl").unlink(missing_ok=True)
    tickets = make_curriculum(tmp_path).top_up(outstanding, remaining, NEWEST)
    assert len(tickets) % 4 == 0
    if tickets:
        assert outstanding + len(tickets) <= min(2 * 8, remaining * 8 + 2)
    elif remaining:
        assert outstanding + 4 > min(2 * 8, remaining * 8 + 2)


@pytest.mark.parametrize(("max_staleness", "minibatches", "num_batches"), [(3, 1, 4), (3, 2, 2), (3, 8, 1)])
def test_admission_counts_versions_not_batches(
    tmp_path: Path, max_staleness: int, minibatches: int, num_batches: int
) -> None:
    settings = make_settings(max_staleness=max_staleness, minibatches=minibatches)
    assert len(make_curriculum(tmp_path, settings).top_up(0, 100, NEWEST)) == num_batches * 8


class Broker:
    """Binds an id to the first task it comes with, as the real one does: an id that it knows is ignored."""

    def __init__(self) -> None:
        self.tickets: dict[str, TaskRef] = {}
        self.waiting: list[Ticket] = []

    def issue(self, tickets: list[Ticket], chunk: int | None = None) -> None:
        for ticket in tickets[:chunk]:
            if ticket.ticket_id not in self.tickets:
                self.tickets[ticket.ticket_id] = ticket.task
                self.waiting.append(ticket)


@given(seed=st.integers(0, 10_000))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_killed_anywhere_every_group_has_one_task_and_all_its_tickets(tmp_path: Path, seed: int) -> None:
    """Random kills between choosing, issuing (cut anywhere, as the client sends chunks) and checkpointing, while the
    choice depends on results that the next process does not know."""
    (tmp_path / "issued.jsonl").unlink(missing_ok=True)
    rng, settings, broker = random.Random(seed), make_settings(BAND, num_steps=200), Broker()
    checkpoint: tuple[dict[str, object], int] = ({}, 0)
    curriculum, num_consumed = make_curriculum(tmp_path, settings), 0
    for _ in range(60):
        outstanding = curriculum.num_issued - num_consumed
        tickets = curriculum.top_up(outstanding, 150, NEWEST)
        killed = rng.random() < 0.3
        broker.issue(tickets, rng.randrange(len(tickets) + 1) if killed and tickets else None)
        if killed:
            curriculum, num_consumed = make_curriculum(tmp_path, settings, checkpoint[0] or None), checkpoint[1]
            broker.issue(curriculum.repeated(NEWEST))
            continue
        groups = sorted({ticket.group_id for ticket in broker.waiting}, key=lambda g: int(g.rsplit("/", 1)[1]))
        for group in groups[: rng.randrange(3)]:
            members = [ticket for ticket in broker.waiting if ticket.group_id == group]
            rewards = [float(rng.random() < 0.5) for _ in members]
            curriculum.learn(
                Consumed(make_trajectory(t, r), Reason.TRAINED) for t, r in zip(members, rewards, strict=True)
            )
            num_consumed += len(members)
            broker.waiting = [ticket for ticket in broker.waiting if ticket.group_id != group]
        if rng.random() < 0.3:
            checkpoint = (curriculum.to_state(), num_consumed)
    broker.issue(curriculum.repeated(NEWEST))
    num_groups = curriculum.next_group
    assert set(broker.tickets) == {f"r1/train/{g}/{i}" for g in range(num_groups) for i in range(4)}
    for group in range(num_groups):
        assert len({broker.tickets[f"r1/train/{group}/{i}"] for i in range(4)}) == 1


def test_the_same_state_makes_the_same_choices(tmp_path: Path) -> None:
    settings = make_settings(BAND)
    curriculum = make_curriculum(tmp_path, settings)
    tickets = curriculum.top_up(0, 100, NEWEST)
    curriculum.learn(Consumed(make_trajectory(t, float(i % 2)), Reason.TRAINED) for i, t in enumerate(tickets))
    state = curriculum.to_state()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "issued.jsonl").write_bytes((tmp_path / "issued.jsonl").read_bytes())
    one, two = (make_curriculum(tmp_path / name, settings, state) for name in ("one", "two"))
    assert one.top_up(0, 100, NEWEST) == two.top_up(0, 100, NEWEST)
    assert one.to_state() == two.to_state()


def test_a_torn_line_is_of_a_group_that_was_never_issued(tmp_path: Path) -> None:
    first = make_curriculum(tmp_path).top_up(0, 100, NEWEST)
    with (tmp_path / "issued.jsonl").open("ab") as file:
        file.write(b'[4, 0, "a"')
    resumed = make_curriculum(tmp_path)
    assert resumed.repeated(NEWEST) == first
    more = resumed.top_up(0, 100, NEWEST)
    assert more[0].group_id == "r1/train/4"
    assert make_curriculum(tmp_path).repeated(NEWEST) == first + more


@pytest.mark.parametrize(
    ("log", "next_group", "sentence"),
    [
        ('[0, 0, "a", 0]\n[2, 0, "a", 1]\n', 0, r"issued\.jsonl does not have a line for each group"),
        ('[0, 0, "a", 0]\n', 2, r"does not have a line for each group, but the newest checkpoint has 2 groups"),
        ('[0, 0, "a"]\n', 0, r"issued\.jsonl is damaged"),
        ('[0, 0, "a", 0]\nnonsense\n', 1, r"issued\.jsonl is damaged"),
    ],
)
def test_a_log_that_is_not_whole_is_refused(tmp_path: Path, log: str, next_group: int, sentence: str) -> None:
    (tmp_path / "issued.jsonl").write_text(log)
    with pytest.raises(ErgonError, match=sentence):
        make_curriculum(tmp_path, state={"next_group": next_group, "credit": None, "pools": {}})


def test_environments_that_left_the_run_do_not_stop_it(tmp_path: Path) -> None:
    make_curriculum(tmp_path).top_up(0, 100, NEWEST)
    settings = make_settings().model_copy(update={"environments": (EnvironmentSection(name="a"),)})
    resumed = make_curriculum(tmp_path, settings)
    assert {t.task.env for t in resumed.repeated(NEWEST)} == {"a", "b"}  # their ids are bound already
    assert {t.task.env for t in resumed.top_up(0, 100, NEWEST)} == {"a"}


def test_a_schedule_shifts_the_mixture(tmp_path: Path) -> None:
    settings = make_settings(num_steps=100)
    curriculum = make_curriculum(tmp_path, settings)
    shares = {}
    for step in (0, 25, 60):
        drawn: Counter[str] = Counter()
        while drawn.total() < 160:
            drawn.update(ticket.task.env for ticket in curriculum.top_up(0, 100 - step, NEWEST))
        shares[step] = drawn["b"] / drawn.total()
    assert shares[0] == pytest.approx(0.5)
    assert shares[25] == pytest.approx(1 / 3, abs=0.03)
    assert shares[60] == 0.0


@given(weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=4))
def test_environments_get_their_share_and_consecutive_tasks(weights: list[float]) -> None:
    environments = [EnvironmentSection(name=f"e{i}", weight=w) for i, w in enumerate(weights)]
    drawn = spread(environments, 200)
    counts = Counter(name for name, _ in drawn)
    for environment, weight in zip(environments, weights, strict=True):
        share = 200 * weight / sum(weights)
        assert abs(counts[environment.name] - share) <= len(weights)
        indices = [index for name, index in drawn if name == environment.name]
        assert indices == list(range(len(indices)))


@pytest.mark.parametrize(
    ("environments", "sentence"),
    [
        ([{"name": "a", "weight": 0}], "at step 0 no environment has a weight above 0"),
        ([{"name": "a", "weight": [[0, 1], [9, 0]]}, {"name": "b", "weight": 0}], "at step 9 no environment"),
        ([{"name": "a", "weight": [[5, 1], [5, 0]]}], "must rise"),
        ([{"name": "a", "weight": []}], "must rise and there must be one"),
        ([{"name": "a", "weight": -1}], "greater than or equal to 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(environments: list[dict[str, object]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Settings.model_validate({"environments": environments})


def test_evaluation_tickets_are_paired_over_phases() -> None:
    settings = make_settings()
    before = eval_tickets(settings, "before", "sampled", 5, NEWEST)
    after = eval_tickets(settings, "after", "greedy", 5, NEWEST)
    assert [t.task for t in before] == [t.task for t in after]
    assert {t.task.env for t in before} == {"a", "b"}  # whatever the schedule says at the end
    assert before[0].ticket_id == "r1/eval/before/sampled/0"
    assert {t.task.split for t in before} == {"heldout"}
    assert {t.sampling.temperature for t in after} == {0.0}
    assert {t.group_size for t in before} == {1}
    assert {t.mode for t in before} == {Mode.EVAL}
    assert before[0].min_version == NEWEST


def test_evaluations_with_several_budgets_have_ids_of_their_own() -> None:
    plain = make_settings()
    settings = plain.model_copy(update={"eval": EvalSection(budgets=(0, 16, "unlimited"))})
    tickets = eval_tickets(settings, "after", "greedy", 5, NEWEST)
    assert len({t.ticket_id for t in tickets}) == 15
    assert tickets[5].ticket_id == "r1/eval/after/greedy/b16/0"
    assert tickets[14].ticket_id == "r1/eval/after/greedy/bunlimited/4"
    assert [t.thinking_budget for t in tickets[::5]] == [0, 16, None]
    for budget in range(3):  # the same tasks with each
        assert [t.task for t in tickets[5 * budget : 5 * budget + 5]] == [t.task for t in tickets[:5]]
    for ticket in tickets:
        phase, style, number, known = parse_eval_id(ticket.ticket_id, "r1")
        assert (phase, style, known) == ("after", "greedy", ticket.thinking_budget)
        assert ticket.task == tickets[number].task
    assert [t.thinking_budget for t in eval_tickets(plain, "after", "greedy", 5, NEWEST)] == [None] * 5


def test_a_resumed_learner_draws_the_same_budgets_and_siblings_share_one(tmp_path: Path) -> None:
    budgets = BudgetsSection(zero=0.25, unlimited=0.25, between=(4, 64))
    settings = make_settings(num_steps=200).model_copy(update={"thinking": ThinkingSection(budgets=budgets)})
    first = make_curriculum(tmp_path, settings).top_up(0, 100, NEWEST)
    resumed = make_curriculum(tmp_path, settings)
    assert resumed.repeated(NEWEST) == first
    more = first + resumed.top_up(0, 100, NEWEST) + resumed.top_up(0, 100, NEWEST)
    by_group = {group: {t.thinking_budget for t in more if t.group_id == group} for group in {t.group_id for t in more}}
    assert all(len(shared) == 1 for shared in by_group.values())
    drawn = {budget for shared in by_group.values() for budget in shared}
    assert {0, None} < drawn  # thinking and instruct in one run
    assert all(4 <= budget <= 64 for budget in drawn if budget)


def test_demonstrations_have_budgets_of_the_same_distribution() -> None:
    settings = Settings.model_validate(
        {
            "learner": {"warm_start": {"episodes": 40}},
            "thinking": {"budgets": {"zero": 0.5, "unlimited": 0.25, "choices": [[8, 1.0]]}},
        }
    )
    drawn = Counter(ticket.thinking_budget for ticket in reference_tickets(settings))
    assert drawn.keys() == {0, 8, None}
    assert drawn[0] == pytest.approx(20, abs=3)


def test_reference_tasks_are_never_training_tasks() -> None:
    settings = Settings.model_validate({"learner": {"warm_start": {"episodes": 6}}})
    tickets = reference_tickets(settings)
    assert [t.task.index for t in tickets] == [REFERENCE_FIRST_INDEX + i for i in range(6)]
    assert tickets[0].ticket_id == "run/reference/0"
    assert {t.mode for t in tickets} == {Mode.REFERENCE}


@pytest.mark.parametrize("episodes", [0, 3])
def test_reference_count(episodes: int) -> None:
    settings = Settings.model_validate({"learner": {"warm_start": {"episodes": episodes}}})
    assert len(reference_tickets(settings)) == episodes
