"""A run whose learner is killed again and again ends with the same weights, bit by bit, as one that never was."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from learner.checkpoint import Checkpoint, CheckpointStore, checkpoint_directories
from tests.integration.learner.lives import Lives
from tests.integration.learner.scripted import number_of, ordered_actor
from tests.ports import free_ports
from tests.tiny_model import make_tiny_model

NUM_STEPS = 60
GROUP_SIZE = 4
NUM_KILLS = 14


class Run:
    """One run: its folder, its broker, its learners."""

    def __init__(self, directory: Path, model: Path, name: str) -> None:
        broker, weights, relay, master, *metrics = free_ports(8)
        self.values: dict[str, Any] = {
            "run": {"name": name, "directory": str(directory), "seed": 3},
            "model": {"path": str(model)},
            "environments": [{"name": "a", "num_tasks": 40}, {"name": "b", "weight": [[0, 1.0], [40, 0.25]]}],
            "curriculum": {"band": [0.1, 0.9], "explore": 0.5},
            "learner": {
                "num_steps": NUM_STEPS,
                "groups_per_step": 3,
                "max_groups_per_step": 6,
                "group_size": GROUP_SIZE,
                "max_staleness": 1,
                "learning_rate": 1e-3,
                "checkpoint_every": 2,
                "keep_checkpoints": 2,
                "master_port": master,
                "warm_start": {"episodes": 12, "passes": 2, "batch": 2, "learning_rate": 1e-3, "checkpoint_every": 3},
                "loss": {"token_window": [0.001, 1000.0], "sequence_guard": [0.001, 1000.0]},
            },
            "eval": {"tasks": 3, "every": 10, "during_tasks": 2},
            "broker": {"port": broker, "heartbeat_s": 0.3, "fsync": "interval"},
            "weights": {"port": weights, "relay_port": relay},
            "metrics": dict(zip(("broker_port", "relay_port", "learner_port", "actor_port"), metrics, strict=True)),
        }
        self.directory = directory / name
        self.checkpoints = self.directory / "checkpoints"
        self.config = directory / f"{name}.toml"
        self.config.write_text(tomli_w.dumps(self.values))
        command = [sys.executable, "-m", "broker", "serve", "--config", str(self.config)]
        self._broker = subprocess.Popen(command)
        self.lives = Lives(self.config)

    def end(self) -> None:
        self.lives.end()
        self._broker.kill()
        self._broker.wait(10)

    async def live(self, killed_when: list[str], rng: random.Random) -> list[str]:
        """Run to the end; each life but the last is killed some time after its event. Returns what they died at."""
        endpoint = f"tcp://127.0.0.1:{self.values['broker']['port']}"
        died: list[str] = []
        async with ordered_actor(endpoint, self.values["run"]["name"], GROUP_SIZE):
            for event in killed_when:
                learner = self.lives.start()
                if not await self._reached(event, learner):
                    break  # it ended before
                await asyncio.sleep(rng.random() * (0.01 if event == "writing" else 0.1))
                learner.kill()
                learner.join(10)
                died.append(event)
            if not (self.directory / "summary.json").exists():
                learner = self.lives.start()
                while learner.exitcode is None:
                    await asyncio.sleep(0.05)
                assert learner.exitcode == 0
        return died

    async def _reached(self, event: str, learner: ForkServerProcess) -> bool:
        seen = len(self.events())
        deadline = time.monotonic() + 60
        while learner.exitcode is None:
            assert time.monotonic() < deadline, f"no {event}"
            if event == "writing" and self.events()[seen:]:
                return await asyncio.to_thread(self._sees_writing, learner)
            if event in self.events()[seen:]:
                return True
            await asyncio.sleep(0.005)
        return False

    def _sees_writing(self, learner: ForkServerProcess) -> bool:
        """Wait for the folder of a checkpoint that is being written, which is there for milliseconds."""
        while not any(name.startswith(".tmp-") for name in os.listdir(self.checkpoints)):  # noqa: PTH208  it is fast
            if learner.exitcode is not None:
                return False
            time.sleep(0.0002)
        return True

    def events(self) -> list[str]:
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line)["event"] for line in path.read_bytes().split(b"\n")[:-1]]

    def last(self) -> Checkpoint:
        newest = CheckpointStore(self.checkpoints, 10).newest()
        assert newest is not None
        return newest


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in what DeepSpeed saved."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors(item, f"{path}/{i}")


def saved(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    assert checkpoint.engine_directory is not None
    found = {}
    for path in sorted(checkpoint.engine_directory.rglob("*.pt")):
        found |= dict(tensors(torch.load(path, weights_only=False), path.name))
    return found


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[list[Run]]:
    model = make_tiny_model(tmp_path / "model")
    runs = [Run(tmp_path, model, name) for name in ("whole", "killed")]
    yield runs
    for run in runs:
        run.end()


@pytest.mark.timeout(600)
async def test_killed_at_random_the_weights_are_the_same_bit_by_bit(runs: list[Run]) -> None:
    whole, killed = runs
    rng = random.Random(11)
    moments = ["warm_start", "warm_start", "evaluation"]
    moments += [rng.choice(["step", "writing"]) for _ in range(NUM_KILLS - len(moments))]
    assert await whole.live([], rng) == []
    died = await killed.live(moments, rng)
    print("killed at", died)
    assert len(died) >= NUM_KILLS - 4
    assert died.count("writing") >= 3

    expected, found = saved(whole.last()), saved(killed.last())
    assert expected.keys() == found.keys()
    assert len(expected) > 20
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert different == []

    summaries = [json.loads((run.directory / "summary.json").read_text()) for run in runs]
    for summary in summaries:
        assert summary["steps"] == NUM_STEPS
        assert summary["warm_start_steps"] == 12
        assert summary["trajectories"]["lost"] == summary["trajectories"]["duplicated"] == 0
    audits = [(run.directory / "trained.jsonl").read_text().splitlines() for run in runs]
    fates = [
        [(number_of(json.loads(line)["ticket_id"]), json.loads(line)["step"]) for line in audit] for audit in audits
    ]
    trained = [[fate for fate in of_run if fate[1] < NUM_STEPS] for of_run in fates]  # what is left over may differ
    assert trained[0] == trained[1]
    lines = [(run.directory / "issued.jsonl").read_text().splitlines() for run in runs]
    for issued in lines:
        assert [json.loads(line)[0] for line in issued] == list(range(len(issued)))
    # Of the killed lives' supervised steps only those since the last checkpoint were taken again.
    assert killed.events().count("warm_start") < 12 + 3 * 3 + 3
    assert killed.last().state["best"] in (
        "after-warm-start",
        "after",
        *(f"step-{step}" for step in range(10, NUM_STEPS, 10)),
    )
    assert len(checkpoint_directories(killed.checkpoints)) <= 3
