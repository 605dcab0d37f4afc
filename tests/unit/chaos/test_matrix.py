"""A run that has put nothing to the test is no proof."""

from __future__ import annotations

import pytest

from tests.chaos.matrix import ENOUGH_DRAINS, tally, unproven
from tests.chaos.schedule import Fault

KILL, DRAIN = Fault("kill", "broker", 1, 0.0), Fault("drain", "actor", 1, 0.0)
IN_HANDOVER = Fault("kill_handover", "broker", 1, 0.0, variant="handing_over")


@pytest.mark.parametrize("drains", [DRAIN, IN_HANDOVER])
def test_drains_after_which_nobody_went_on_are_a_problem(drains: Fault) -> None:
    done = [KILL, *[drains] * ENOUGH_DRAINS]
    (problem,) = unproven(done, len(done), 1, {"delta": 1}, 0)
    assert "gone on with" in problem
    assert unproven(done, len(done), 1, {"delta": 1}, 1) == []
    assert unproven(done[:-1], len(done) - 1, 1, {"delta": 1}, 0) == []


def test_what_else_was_not_put_to_the_test_is_a_problem() -> None:
    assert len(unproven([KILL], 2, 0, {"anchor": 3}, 0)) == 3


def test_kills_in_handovers_are_told_by_phase() -> None:
    assert tally([KILL, DRAIN, IN_HANDOVER])["by_phase"] == {"broker handing_over": 1}
