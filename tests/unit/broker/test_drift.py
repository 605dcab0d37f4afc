"""The monitor of dispatched against trained: an honest learner shows 0, one that drops shows what it starves."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from broker.exchange import drift
from broker.exchange.drift import NUM_BINS, QUANTITIES, SHORTEST_S, DriftMonitor
from broker.ledger.events import Finish, Finished, Settle
from broker.protocol.trajectory import Mode, Outcome
from tests.unit.broker.samples import make_ticket

GROUP = 4


class Run:
    """Groups of episodes; the odd ones are slow and hard."""

    def __init__(self, patience: int = 200) -> None:
        self.monitor = DriftMonitor(patience)
        self.random = random.Random(1)
        self.num_groups = 0

    def finish(self, mode: Mode = Mode.TRAIN) -> tuple[list[str], bool]:
        """The results of one more group, and whether it is a slow one."""
        slow = self.num_groups % 2 == 1
        ids = [f"{self.num_groups}/{i}" for i in range(GROUP)]
        results = []
        for ticket_id in ids:
            seconds = self.random.uniform(30, 60) if slow else self.random.uniform(1, 2)
            reward = float(self.random.random() < (0.2 if slow else 0.8))
            ticket = replace(make_ticket(ticket_id, mode), group_id=f"g{self.num_groups}")
            results.append((ticket, Finish(Outcome.COMPLETED, reward, seconds)))
        self.monitor.observe(Finished(tuple(results)))
        self.num_groups += 1
        return ids, slow

    def settle(self, ids: list[str], consumed: bool = True) -> None:
        self.monitor.observe(Settle(tuple(ids), frozenset(() if consumed else ids)))

    def drift(self) -> dict[str, float]:
        return {quantity: value for (env, quantity), value in self.monitor.drift().items() if env == "shop"}


def test_a_learner_that_uses_everything_shows_exactly_nothing_however_late_and_in_whatever_order() -> None:
    run = Run(patience=2000)
    waiting: list[list[str]] = []
    for _ in range(400):
        waiting.append(run.finish()[0])
        if len(waiting) > 30:
            run.settle(waiting.pop(run.random.randrange(len(waiting))))
            assert max(run.drift().values()) == 0.0
    assert run.drift().keys() == set(QUANTITIES)


@pytest.mark.parametrize("acks_what_it_drops", [True, False])
def test_a_learner_that_drops_slow_and_hard_groups_is_seen(acks_what_it_drops: bool) -> None:
    run = Run()
    for _ in range(400):
        ids, slow = run.finish()
        if not slow:
            run.settle(ids)
        elif acks_what_it_drops:
            run.settle(ids, consumed=False)
    found = run.drift()
    assert found["duration"] == pytest.approx(0.5, abs=0.08)  # half of what was run is missing, all at one end
    assert found["difficulty"] > 0.3


def test_dropping_at_random_is_no_drift() -> None:
    run = Run()
    for _ in range(1000):
        run.settle(run.finish()[0], consumed=run.random.random() < 0.7)
    assert max(run.drift().values()) < 0.1


def test_it_says_nothing_of_few_results_and_one_of_an_environment_without_any() -> None:
    run = Run()
    for _ in range(int(drift.MIN_RESULTS) // GROUP):
        run.settle(run.finish()[0], consumed=False)
    assert max(run.drift().values()) == 0.0
    for _ in range(5):
        run.settle(run.finish()[0], consumed=False)
    assert run.drift() == {"duration": 1.0, "difficulty": 1.0}


def test_it_forgets_so_that_an_alarm_ends() -> None:
    run = Run()
    for _ in range(200):
        ids, slow = run.finish()
        run.settle(ids, consumed=not slow)
    before = run.drift()["duration"]
    for _ in range(3000):
        run.settle(run.finish()[0])
    assert run.drift()["duration"] < before / 10


def test_scaling_down_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def final() -> dict[str, float]:
        run = Run()
        for _ in range(600):
            ids, slow = run.finish()
            run.settle(ids, consumed=not slow or run.random.random() < 0.5)
        return run.drift()

    never = final()
    monkeypatch.setattr(drift, "MAX_WEIGHT", 1.01)
    assert final() == pytest.approx(never)


def test_memory_is_bounded_by_what_is_open() -> None:
    run = Run(patience=50)
    for _ in range(500):
        ids, slow = run.finish()
        if not slow:
            run.settle(ids)
    monitor = run.monitor
    assert len(monitor._results) <= 2 * (50 + GROUP)
    assert len(monitor._groups) <= len(monitor._results)
    assert len(monitor._by_age) <= 4 * (50 + GROUP)
    assert len(monitor._histograms) == 1


def test_one_ack_may_use_some_and_drop_others() -> None:
    run = Run()
    for _ in range(200):
        (fast, _), (slow, _) = run.finish(), run.finish()
        run.monitor.observe(Settle((*fast, *slow), frozenset({*slow, "of another ack"})))
    assert run.drift()["duration"] == pytest.approx(0.5, abs=0.08)
    assert run.monitor._results == {}


def test_evaluation_and_unknown_results_do_not_count_and_a_replaced_one_counts_once() -> None:
    run = Run()
    run.settle(run.finish(Mode.EVAL)[0])
    run.settle(["restored"])
    assert run.monitor.drift() == {}
    run.num_groups = 0
    ids, _ = run.finish()
    run.num_groups = 0
    run.finish()
    run.settle(ids)
    assert sum(run.monitor._histograms["shop"].dispatched[0]) == pytest.approx(GROUP, rel=0.01)
    assert (run.monitor._results, run.monitor._groups) == ({}, {})


def test_every_duration_and_difficulty_has_a_bin() -> None:
    assert [drift._duration_bin(s) for s in (-1.0, 0.0, SHORTEST_S)] == [0, 0, 0]
    assert drift._duration_bin(1e12) == NUM_BINS - 1
    assert drift._duration_bin(SHORTEST_S * 2 ** ((NUM_BINS - 1) / 2)) == NUM_BINS - 1
    assert [drift._duration_bin(SHORTEST_S * 2 ** (k / 2 + 0.01)) for k in range(10)] == list(range(1, 11))
    assert SHORTEST_S * 2 ** ((NUM_BINS - 2) / 2) > 12 * 3600
    last = NUM_BINS - 1
    assert [drift._unit_bin(v) for v in (-5.0, 0.0, 0.5, 1.0, 1e300)] == [0, 0, NUM_BINS // 2, last, last]
