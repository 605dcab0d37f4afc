"""The kill matrix in small: real processes, a dozen faults, and the verdict of three witnesses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.schedule import HANDOVER_PHASES, UPDATE_PHASES

ROOT = Path(__file__).parents[3]
NUM_FAULTS = 12


def play(
    tmp_path: Path, num_faults: int, options: list[str], num_tickets: int = 288, num_baseline: int = 144
) -> dict[str, Any]:
    """Run the matrix in small; its verdict, which must be a good one."""
    command = [sys.executable, "-m", "tests.chaos.matrix", "--faults", str(num_faults), "--seed", "11"]
    command += [
        "--tickets",
        str(num_tickets),
        "--baseline-tickets",
        str(num_baseline),
        "--directory",
        str(tmp_path),
        "--deadline-s",
        "150",
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr
    verdict: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, (verdict["problems"], done.stderr[-4000:])
    assert verdict["faults"] == num_faults
    assert verdict["issued"] == verdict["trained"] == num_tickets
    assert verdict["lost"] == verdict["duplicated"] == 0
    assert not any(tmp_path.iterdir()), "a run that went well leaves nothing"
    return verdict


@pytest.mark.parametrize("options", [[], ["--curve"]], ids=["plain", "curve"])
def test_a_dozen_faults_lose_and_double_nothing(tmp_path: Path, options: list[str]) -> None:
    verdict = play(tmp_path, NUM_FAULTS, options)
    assert verdict["shared"] > 0, "no message carried several trajectories"
    assert verdict["curve"] == bool(options)
    assert sum(verdict["restarts"].values()) >= verdict["by_kind"]["kill"]


def test_a_kill_in_each_phase_of_an_update_loses_and_doubles_nothing(tmp_path: Path) -> None:
    verdict = play(tmp_path, len(UPDATE_PHASES), ["--kinds", "kill_update"])
    assert verdict["by_phase"] == {f"{target} {phase}": 1 for target, phase in UPDATE_PHASES}
    assert sum(verdict["restarts"].values()) == len(UPDATE_PHASES)


def test_a_kill_in_each_phase_of_a_handover_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """No run without faults before it: what this one is slower by is not asked."""
    options = ["--kinds", "kill_handover"]
    verdict = play(tmp_path, len(HANDOVER_PHASES), options, num_tickets=800, num_baseline=0)
    assert verdict["by_phase"] == {f"{target} {phase}": 1 for target, phase in HANDOVER_PHASES}
    assert verdict["restarts"]["broker"] == sum(target == "broker" for target, _ in HANDOVER_PHASES)
    assert verdict["handed_over"] > 0
    assert verdict["continued"] > 0
