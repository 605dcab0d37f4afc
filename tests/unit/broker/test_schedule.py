"""The schedule: urgent first, groups finish, environments share leased time, nobody waits for ever."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.ledger.schedule import MEMORY_LEASES, OLDEST_EVERY, LeasedTime, Schedule, Waiting


def fill(schedule: Schedule, env: str, num: int, first_seq: int = 1, group_size: int = 1) -> list[str]:
    """Whole groups of training tickets, as a learner issues them."""
    ids = [f"{env}{first_seq + i}" for i in range(num)]
    for i, ticket_id in enumerate(ids):
        group_id = f"{env}-group-{first_seq + i - i % group_size}"
        schedule.add(ticket_id, env=env, group_id=group_id, seq=first_seq + i, num_missing=group_size)
    return ids


def drain(schedule: Schedule) -> list[str]:
    return list(iter(schedule.take, None))


def test_urgent_tickets_come_first_the_oldest_of_them_before_the_others() -> None:
    schedule = Schedule()
    fill(schedule, "a", 2)
    schedule.add("late", env="a", group_id="late", seq=9, urgent=True)
    schedule.add("early", env="b", group_id="early", seq=8, urgent=True)
    assert drain(schedule) == ["early", "late", "a1", "a2"]
    assert schedule.take() is None


def test_within_one_environment_it_is_first_come_first_served() -> None:
    schedule = Schedule()
    ids = fill(schedule, "a", 12, group_size=4)
    assert drain(schedule) == ids


def test_almost_complete_groups_come_first_and_their_retried_tickets_at_the_very_first() -> None:
    schedule = Schedule()
    fill(schedule, "a", 8, group_size=4)
    assert [schedule.take() for _ in range(3)] == ["a1", "a2", "a3"]
    schedule.set_missing("a", "a-group-5", 1)
    schedule._environments["a"].num_grants = 0
    assert schedule.take() == "a5"
    schedule.set_missing("a", "a-group-1", 1)
    schedule.add("a2", env="a", group_id="a-group-1", seq=2, num_missing=1)  # it comes back
    assert [schedule.take() for _ in range(2)] == ["a2", "a4"]


def test_a_large_group_is_not_passed_over_for_ever_by_small_ones() -> None:
    schedule = Schedule()
    fill(schedule, "a", 8, group_size=8)
    taken = []
    for seq in range(100, 140):
        schedule.add(f"small{seq}", env="a", group_id=f"small{seq}", seq=seq, num_missing=1)
        taken.append(schedule.take())
    assert taken[OLDEST_EVERY - 1 :: OLDEST_EVERY][:8] == [f"a{i}" for i in range(1, 9)]


def test_a_numerous_environment_does_not_delay_another() -> None:
    schedule = Schedule()
    fill(schedule, "many", 1000)
    few = fill(schedule, "few", 10, first_seq=2000)
    first = [schedule.take() for _ in range(20)]
    assert [ticket_id for ticket_id in first if ticket_id in few] == few


@pytest.mark.parametrize(("slow_s", "fast_s"), [(10.0, 1.0), (3.0, 0.05), (1.0, 1.0)])
def test_environments_share_leased_time_however_long_their_episodes_are(slow_s: float, fast_s: float) -> None:
    schedule, num_slots = Schedule(), 24
    seq = itertools.count(1)
    running: list[tuple[float, int, str]] = []
    leased_s: Counter[str] = Counter()
    for _ in range(6000):
        for env in ("slow", "fast"):
            while len(schedule._environment(env)) < num_slots:
                number = next(seq)
                schedule.add(f"{env}{number}", env=env, group_id=str(number), seq=number)
        while len(running) < num_slots:
            env = str(schedule.take())[:4]
            heapq.heappush(running, (schedule.now + (slow_s if env == "slow" else fast_s), next(seq), env))
            schedule.lease_began(env)
        schedule.now, _, env = heapq.heappop(running)
        schedule.lease_ended(env)
        leased_s[env] += slow_s if env == "slow" else fast_s  # type: ignore[assignment]  # a Counter of floats
    share = leased_s["slow"] / leased_s.total()
    assert 0.35 < share < 0.65


def test_the_shares_are_bounded_however_far_the_durations_are_apart() -> None:
    schedule = Schedule(max_cost_ratio=2.0)
    fill(schedule, "slow", 20)
    fill(schedule, "fast", 100, first_seq=1000)
    for env, seconds in (("slow", 1e4), ("fast", 1e-4)):
        schedule.lease_began(env)
        schedule.now += seconds
        schedule.lease_ended(env)
    first = Counter(str(schedule.take())[:4] for _ in range(50))
    assert first["slow"] == 10  # a fifth: one of its grants costs four of the others


def test_an_idle_environment_saves_up_no_share() -> None:
    schedule = Schedule()
    fill(schedule, "a", 300)
    for _ in range(200):
        schedule.take()
    fill(schedule, "b", 100, first_seq=1000)
    first = Counter(str(schedule.take())[:1] for _ in range(20))
    assert first == {"a": 10, "b": 10}


def test_what_was_taken_or_discarded_leaves_no_trace() -> None:
    schedule = Schedule()
    for round_ in range(300):
        ids = fill(schedule, "a", 10, first_seq=1 + 10 * round_, group_size=5)
        schedule.discard(ids[3])
        schedule.discard(ids[3])
        for num_missing in range(5, 0, -1):
            schedule.set_missing("a", f"a-group-{1 + 10 * round_}", num_missing)
        assert ids[3] not in drain(schedule)
    environment = schedule._environments["a"]
    assert (len(schedule), len(environment), len(environment.groups)) == (0, 0, 0)
    for heap in (environment.oldest.heap, environment.order, schedule._turns, schedule._urgent.heap):
        assert len(heap) <= 16


def test_the_mean_lease_counts_those_that_still_run() -> None:
    leased = LeasedTime()
    for _ in range(4):
        leased.began(0.0)
    assert leased.mean_s(0.0) == 0.0
    assert leased.mean_s(5.0) == 5.0
    for i in range(40 * MEMORY_LEASES):
        now = 10.0 + i / 2
        leased.ended(now)
        leased.began(now)
    assert leased.mean_s(now) == pytest.approx(2.0, rel=0.05)  # four at once, one ends every half second


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=80))
def test_waiting_tickets_are_a_sorted_set(steps: list[tuple[int, bool]]) -> None:
    tickets, waiting = Waiting(), set[str]()
    for seq, waits in steps:
        ticket_id = f"t{-seq}"
        if waits and ticket_id not in waiting:
            waiting.add(ticket_id)
            tickets.add(seq, ticket_id)
        elif not waits and ticket_id in waiting:
            waiting.remove(ticket_id)
            tickets.remove(waiting)
        assert tickets.num == len(waiting)
        assert len(tickets.heap) <= 2 * len(waiting) + 16
        if waiting:
            assert tickets.first(waiting) == min((-int(key[1:]), key) for key in waiting)


GROUP_STEPS = st.tuples(st.sampled_from(["wait", "discard", "missing", "take"]), st.integers(0, 11), st.integers(1, 4))


@given(st.lists(GROUP_STEPS, max_size=80))
def test_groups_are_chosen_by_what_they_lack_and_then_by_age(steps: list[tuple[str, int, int]]) -> None:
    """Against a model that looks at every waiting ticket."""
    schedule = Schedule()
    missing: dict[str, int] = {}
    waiting: dict[str, int] = {}  # seq by ticket; a group has every third
    for num_steps, (what, seq, num_missing) in enumerate(steps):
        ticket_id, group_id = f"t{seq}", f"g{seq % 3}"
        if what == "wait" and ticket_id not in waiting:
            waiting[ticket_id], missing[group_id] = seq, num_missing
            schedule.add(ticket_id, env="a", group_id=group_id, seq=seq, num_missing=num_missing)
        elif what == "discard":
            waiting.pop(ticket_id, None)
            schedule.discard(ticket_id)
        elif what == "missing":
            missing[group_id] = num_missing
            schedule.set_missing("a", group_id, num_missing)
        elif what == "take" and waiting:
            is_oldests_turn = schedule._environments["a"].num_grants % OLDEST_EVERY == OLDEST_EVERY - 1
            ranked = [(0 if is_oldests_turn else missing[f"g{seq % 3}"], seq, key) for key, seq in waiting.items()]
            expected = min(ranked)[2]
            assert schedule.take() == expected
            del waiting[expected]
        if environment := schedule._environments.get("a"):
            assert len(environment.order) <= 2 * len(environment.groups) + 16
        assert len(schedule) == len(waiting), num_steps


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.floats(0, 5)), max_size=60))
def test_the_environment_with_the_least_leased_time_has_its_turn(steps: list[tuple[str, int, float]]) -> None:
    """Against a model that looks at every environment."""
    schedule = Schedule()
    seq = itertools.count(1)
    for env, what, seconds in steps:
        schedule.now += seconds
        if what == 0:
            fill(schedule, env, 2, first_seq=10 * next(seq))
        elif what == 1:
            if env in schedule._environments and schedule._environments[env].leased.running:
                schedule.lease_ended(env)
        else:
            has_waiting = len(schedule) > 0
            ticket_id = schedule.take()
            assert (ticket_id is not None) == has_waiting
            if ticket_id is not None:
                schedule.lease_began(ticket_id[0])
        waiting_times = {key: value.virtual_time for key, value in schedule._environments.items() if len(value)}
        if waiting_times:
            found = schedule._next_environment()
            assert found is not None
            assert found.virtual_time == min(waiting_times.values())


RATIO = 2.0


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_ticket_is_leased_within_a_bound_of_grants(data: st.DataObject) -> None:
    """Whatever else is issued, comes back, completes groups or ends leases, and whatever leases last."""
    schedule = Schedule(RATIO)
    envs = data.draw(st.integers(1, 3))
    per_turn = (envs - 1) * (RATIO**2 + 1) + 1
    left: dict[str, float] = {}  # ticket: grants within which it must be leased
    home: dict[str, tuple[str, str, int]] = {}
    waiting: set[str] = set()
    leased: list[str] = []

    def put(ticket_id: str, num_missing: int) -> None:
        env, group_id, seq = home[ticket_id]
        older = sum(home[other][0] == env and home[other][2] < seq for other in waiting)
        left[ticket_id] = OLDEST_EVERY * (older + 1) * per_turn
        for other in waiting:  # one that comes back is older than some that wait
            if home[other][0] == env and home[other][2] > seq:
                left[other] += OLDEST_EVERY * per_turn
        waiting.add(ticket_id)
        schedule.add(ticket_id, env=env, group_id=group_id, seq=seq, num_missing=num_missing)

    step = st.tuples(
        st.sampled_from(["issue", "issue", "grant", "grant", "grant", "return", "end", "missing"]),
        st.integers(0, envs - 1),
        st.integers(0, 4),
        st.floats(0, 5),
    )
    for seq, (what, number, size, seconds) in enumerate(data.draw(st.lists(step, max_size=60))):
        env, group_id = f"env{number}", f"group{size}"
        schedule.now += seconds
        if what == "issue":
            home[f"t{seq}"] = (env, group_id, seq)
            put(f"t{seq}", size + 1)
        elif what == "grant":
            grant(schedule, waiting, leased, left, home)
        elif what == "missing":
            schedule.set_missing(env, group_id, size + 1)
        elif leased:
            ticket_id = leased.pop(size % len(leased))
            schedule.lease_ended(home[ticket_id][0])
            if what == "return":
                put(ticket_id, size + 1)
    while waiting:
        grant(schedule, waiting, leased, left, home)
    assert len(schedule) == 0


def grant(
    schedule: Schedule,
    waiting: set[str],
    leased: list[str],
    left: dict[str, float],
    home: dict[str, tuple[str, str, int]],
) -> None:
    ticket_id = schedule.take()
    assert (ticket_id is None) == (not waiting)
    if ticket_id is None:
        return
    waiting.remove(ticket_id)
    leased.append(ticket_id)
    schedule.lease_began(home[ticket_id][0])
    for other in waiting:
        left[other] -= 1
        assert left[other] > 0, f"{other} starves"
