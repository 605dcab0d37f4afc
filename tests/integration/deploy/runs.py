"""The smallest whole run there is: vLLM and DeepSpeed on a tiny model, every process killed once on the way."""

from __future__ import annotations

import contextlib
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class WholeRun:
    """The run's folder, what was watched meanwhile, and its summary."""

    directory: Path
    watch: Watch
    summary: dict[str, Any]


def run_and_kill(tmp_path: Path) -> WholeRun:
    """Have it run to its end, and kill each process once."""
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
    return WholeRun(tmp_path / "runs" / "tiny", watch, result["summary"])
