"""The schedule of faults: repeatable, complete, within the work."""

from __future__ import annotations

from collections import Counter

from tests.chaos.schedule import HANDOVER_PHASES, KINDS, LINKS, PROCESSES, UPDATE_PHASES, combinations, make_schedule

NUM_TICKETS = 6400


def test_a_seed_names_one_schedule() -> None:
    assert make_schedule(7, 200, NUM_TICKETS, 3) == make_schedule(7, 200, NUM_TICKETS, 3)
    assert make_schedule(7, 200, NUM_TICKETS, 3) != make_schedule(8, 200, NUM_TICKETS, 3)


def test_two_hundred_faults_hit_everything_in_every_way() -> None:
    schedule = make_schedule(1, 200, NUM_TICKETS, 3)
    assert len(schedule) == 200
    assert {(fault.kind, fault.target) for fault in schedule} == {row[:2] for row in combinations()}
    killed = {(fault.target, fault.variant) for fault in schedule if fault.kind == "kill_update"}
    assert killed == set(UPDATE_PHASES)
    killed = {(fault.target, fault.variant) for fault in schedule if fault.kind == "kill_handover"}
    assert killed == set(HANDOVER_PHASES)
    assert {fault.kind for fault in schedule} == set(KINDS)
    assert {fault.target for fault in schedule} == {*PROCESSES, *LINKS, "disk"}
    assert {fault.place for fault in schedule} >= {"actor-0", "actor-1", "actor-2"}


def test_about_half_come_in_pairs_on_two_targets() -> None:
    pairs: dict[int, list[str]] = {}
    for fault in make_schedule(2, 400, NUM_TICKETS, 3):
        if fault.pair is not None:
            pairs.setdefault(fault.pair, []).append(fault.target)
    assert 120 <= 2 * len(pairs) <= 280
    assert all(len(set(targets)) == len(targets) == 2 for targets in pairs.values())


def test_all_fall_into_the_work() -> None:
    schedule = make_schedule(3, 200, NUM_TICKETS, 3)
    assert all(0 < fault.at_tickets < NUM_TICKETS - 48 for fault in schedule)
    assert max(Counter(fault.at_tickets * 10 // NUM_TICKETS for fault in schedule).values()) < 60


def test_what_the_machine_cannot_do_is_left_out() -> None:
    schedule = make_schedule(4, 200, NUM_TICKETS, 3, unavailable=("clock", "disk_low"))
    assert len(schedule) == 200
    assert not {fault.kind for fault in schedule} & {"clock", "disk_low"}


def test_only_the_kinds_that_are_asked_for() -> None:
    schedule = make_schedule(5, 16, NUM_TICKETS, 3, kinds=("kill_update",))
    assert {fault.kind for fault in schedule} == {"kill_update"}
    counts = Counter((fault.target, fault.variant) for fault in schedule)
    assert counts.keys() == set(UPDATE_PHASES)
    assert set(counts.values()) <= {16 // len(UPDATE_PHASES), -(-16 // len(UPDATE_PHASES))}


def test_after_an_order_to_kill_in_an_update_there_are_updates() -> None:
    for num_tickets in (288, NUM_TICKETS):
        schedule = make_schedule(6, 40, num_tickets, 3, kinds=("kill_update",))
        assert all(fault.at_tickets <= num_tickets - 96 for fault in schedule)


def test_actors_are_told_to_end_alone_and_beside_every_other_fault() -> None:
    partners: set[str] = set()
    for seed in range(10):
        schedule = make_schedule(seed, 200, NUM_TICKETS, 3)
        pairs = [fault.pair for fault in schedule if fault.kind == "drain"]
        partners |= {fault.target for fault in schedule if fault.pair in set(pairs) - {None} and fault.kind != "drain"}
        assert None in pairs
        assert len({fault.place for fault in schedule if fault.kind == "drain"}) == 3
    assert partners == {*PROCESSES, *LINKS, "disk"} - {"actor"}


def test_after_an_actor_was_told_to_end_there_are_episodes() -> None:
    for num_tickets, latest in ((288, 1), (NUM_TICKETS, NUM_TICKETS - 512)):
        schedule = make_schedule(6, 100, num_tickets, 3, kinds=("drain", "kill_handover"))
        assert all(0 < fault.at_tickets <= latest for fault in schedule)
