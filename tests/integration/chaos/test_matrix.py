"""The kill matrix in small: real processes, a dozen faults, and the verdict of three witnesses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NUM_FAULTS = 12


@pytest.mark.parametrize("options", [[], ["--curve"]], ids=["plain", "curve"])
def test_a_dozen_faults_lose_and_double_nothing(tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "tests.chaos.matrix", "--faults", str(NUM_FAULTS), "--seed", "11"]
    command += [
        "--tickets",
        "288",
        "--baseline-tickets",
        "144",
        "--directory",
        str(tmp_path),
        "--deadline-s",
        "150",
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr
    verdict = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, (verdict["problems"], done.stderr[-4000:])
    assert verdict["faults"] == NUM_FAULTS
    assert verdict["issued"] == verdict["trained"] == 288
    assert verdict["lost"] == verdict["duplicated"] == 0
    assert verdict["shared"] > 0, "no message carried several trajectories"
    assert verdict["curve"] == bool(options)
    assert sum(verdict["restarts"].values()) >= verdict["by_kind"]["kill"]
    assert not any(tmp_path.iterdir()), "a run that went well leaves nothing"
