"""Faults: seeded, as often as the profile says, never too many in a row."""

from __future__ import annotations

from collections import Counter

import pytest

from envs.faults import PROFILES, Fault, FaultInjector, FaultProfile, check_profile, profile_of


@pytest.mark.parametrize("name", PROFILES)
def test_kinds_come_as_often_as_the_profile_says(name: str) -> None:
    profile = PROFILES[name]
    injector = FaultInjector(profile, "seed")
    drawn = [injector.draw() for _ in range(4000)]
    counts = Counter(fault.kind for fault in drawn)
    for kind in ("error", "lost", "partial"):
        # A fourth fault in a row is not drawn, so a little less than the profile's share.
        share = getattr(profile, kind)
        assert 0.8 * share - 0.01 <= counts[kind] / 4000 <= share + 0.02
    delays = [fault.delay_s for fault in drawn if fault.delay_s]
    assert abs(len(delays) / 4000 - profile.slow) < 0.03
    assert not delays or max(delays) <= profile.slow_s


def test_the_same_seed_gives_the_same_faults_and_another_one_others() -> None:
    def first(seed: str) -> list[Fault]:
        injector = FaultInjector(PROFILES["hostile"], seed)
        return [injector.draw() for _ in range(50)]

    assert first("a") == first("a") != first("b")


def test_who_tries_again_gets_through() -> None:
    injector = FaultInjector(FaultProfile(error=1.0, max_in_a_row=3), "seed")
    assert [injector.draw().kind for _ in range(8)] == ["error", "error", "error", "none"] * 2


def test_a_partial_answer_always_lacks_something() -> None:
    injector = FaultInjector(FaultProfile(partial=1.0, max_in_a_row=1000), "seed")
    for _ in range(200):
        assert "0123456789".startswith(injector.draw().cut("0123456789"))
        assert injector.draw().cut("0123456789") != "0123456789"
    assert Fault().cut("all") == "all"


def test_profiles_are_named() -> None:
    assert profile_of("rough", "x") is PROFILES["rough"]
    assert {profile_of("mixed", str(seed)) for seed in range(50)} == set(PROFILES.values())
    with pytest.raises(ValueError, match="faults is 'some'; choose none, mild, rough, hostile or mixed"):
        check_profile("some")
