"""What the learner's container runs, by the real sh: its ends are told apart. A `python` that obeys is the learner."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cluster.rendering import MATRIX, pods, render

PYTHON = """#!/bin/sh
# Ends with $END at once, or lives until SIGTERM and ends with 0 then, as the learner does.
[ "$END" = never ] || exit "$END"
trap 'echo told; exit 0' TERM
echo up
sleep 60 & wait $!
"""


def start(tmp_path: Path, name: str, end: str) -> subprocess.Popen[str]:
    (spec,) = (
        spec for _, labels, spec in pods(render(*MATRIX[name])) if labels["app.kubernetes.io/component"] == "learner"
    )
    (container,) = spec["containers"]
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "END": end, "NODE_RANK": "0"}
    command = [*container["command"], *container["args"]]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what else it said; in a container what it leaves behind ends with it."""
    assert process.stdout is not None
    try:
        code = process.wait(30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return code, process.stdout.read()


@pytest.mark.parametrize("name", ["cpu", "many-nodes"])
def test_a_learner_that_fails_is_started_again(name: str, tmp_path: Path) -> None:
    assert end(start(tmp_path, name, "3")) == (3, "")


@pytest.mark.parametrize(("name", "code"), [("cpu", 0), ("many-nodes", 143)])
def test_a_learner_that_is_told_to_stop_ends_at_once_and_has_not_finished(name: str, code: int, tmp_path: Path) -> None:
    process = start(tmp_path, name, "never")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert end(process) == (code, "told\n")


def test_a_learner_that_has_finished_stays_in_a_statefulset_until_it_is_told(tmp_path: Path) -> None:
    process = start(tmp_path, "cpu", "0")
    assert process.stdout is not None
    assert "the run has finished" in process.stdout.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process) == (0, "")


def test_a_learner_that_has_finished_completes_a_jobset(tmp_path: Path) -> None:
    assert end(start(tmp_path, "many-nodes", "0")) == (0, "")
