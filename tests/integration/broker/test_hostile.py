"""Hostile input in small: the same attack as `python -m tests.fuzz.broker`, on live processes, with honest peers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.broker import FINAL_TICKETS, fuzz

MESSAGES = 20_000
GROWTH_MIB = 64  # a peer that reads nothing may have 8,192 answers waiting for it; a leak per message is far beyond


def test_twenty_thousand_hostile_messages_harm_nobody(tmp_path: Path) -> None:
    summary = fuzz(tmp_path, MESSAGES, seed=7)
    assert summary["crashes"] == 0
    assert summary["honest_arrived"] == summary["honest_issued"]
    assert summary["honest_twice"] == 0
    assert summary["honest_fetches"]
    assert summary["afterwards_arrived"] == FINAL_TICKETS
    answers = summary["answers"]
    assert isinstance(answers, dict)
    for code in ("BAD_FRAME", "BAD_MESSAGE", "BAD_VERSION", "WRONG_ROLE", "UNKNOWN_COMMAND", "UNKNOWN_PEER"):
        assert answers[f"ERROR {code}"] > 0, f"nothing was refused with {code}: the attack misses a layer"
    settled, end = summary["settled_mb"], summary["end_mb"]
    assert isinstance(settled, dict)
    assert isinstance(end, dict)
    for name, settled_mib in settled.items():
        assert end[name] - settled_mib < GROWTH_MIB, f"{name} grew from {settled_mib} to {end[name]} MiB"


def test_coverage_guided_fuzz_of_the_codec() -> None:
    pytest.importorskip("atheris", reason="atheris is optional: pip install atheris")
    command = [sys.executable, "-m", "tests.fuzz.codec", "-runs=50000", "-seed=7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 50000 runs" in done.stderr
