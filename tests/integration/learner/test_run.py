"""The learner process against a real broker process; episodes are answered by an actor client with a real policy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from transformers import AutoModelForCausalLM

from broker.client import ActorClient
from broker.process.thinking_settings import BudgetsSection
from broker.protocol.trajectory import Mode, Outcome, Segment, Ticket, Trajectory, TrajectoryHead, VersionRun
from learner.budgets import draw_budget
from tests.environment import environment
from tests.integration.learner.sink_files import kept_id, tensorboard_curves, tensorboard_text, wandb_runs
from tests.ports import free_ports
from tests.tiny_model import make_tiny_model

NUM_STEPS = 6
PROMPT = [5, 6, 7, 8]
GOOD = 60


class Policy:
    """Samples one token after the prompt from the model that the run starts with; answer 60..67 are the arms."""

    def __init__(self, path: Path, flat_every: int = 3) -> None:
        self._flat_every = flat_every  # every such group has no variance
        self.tickets: list[Ticket] = []
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
        self._logprobs = torch.log_softmax(logits, -1).numpy()
        self._rng = np.random.default_rng(0)

    def answer(self, ticket: Ticket) -> Trajectory:
        self.tickets.append(ticket)
        token = GOOD if ticket.mode is Mode.REFERENCE else int(self._rng.integers(GOOD, GOOD + 4))
        logprob = 0.0 if ticket.mode is Mode.REFERENCE else float(self._logprobs[token])
        segment = Segment(
            np.asarray([*PROMPT, token], dtype=np.int32),
            np.asarray([False] * len(PROMPT) + [True]),
            np.asarray([0.0] * len(PROMPT) + [logprob], dtype=np.float32),
            (VersionRun(ticket.min_version.lineage, ticket.min_version.version, 1),),
        )
        flat = ticket.mode is Mode.TRAIN and ticket.task.index % self._flat_every == 0
        head = TrajectoryHead(
            ticket=ticket,
            kind="even" if ticket.task.index % 2 == 0 else "odd",
            outcome=Outcome.COMPLETED,
            reward=float(token == GOOD and not flat),
            num_turns=1,
            actor_id="actor-0",
            finished_at=time.time(),
        )
        return Trajectory(head, (segment,))


async def act(endpoint: str, run_id: str, policy: Policy, stop: asyncio.Event) -> None:
    """Answer tickets until told to stop."""
    client = ActorClient(endpoint, run_id, "actor-0")
    await client.connect()

    async def work() -> None:
        while True:
            ticket = await client.lease()
            await client.send(policy.answer(ticket))

    workers = [asyncio.create_task(work()) for _ in range(8)]
    await stop.wait()
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    await client.close()


class Processes:
    """The learner and the broker as processes of their own."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self._children: list[subprocess.Popen[bytes]] = []
        self._environment = environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([sys.executable, "-m", *command, "--config", str(self._config)], env=self._environment)
        self._children.append(child)
        return child

    def end(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait(timeout=10)


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model")


@pytest.fixture
def values(tmp_path: Path, model_path: Path) -> dict[str, Any]:
    broker, weights, relay, master, *metrics = free_ports(8)
    names = ("broker_port", "relay_port", "learner_port", "actor_port")
    return {
        "run": {"name": "learning", "directory": str(tmp_path / "runs")},
        "model": {"path": str(model_path)},
        "learner": {
            "num_steps": NUM_STEPS,
            "groups_per_step": 2,
            "max_groups_per_step": 4,
            "group_size": 4,
            "max_staleness": 1,
            "learning_rate": 1e-4,
            "checkpoint_every": 2,
            "master_port": master,
            "warm_start": {"episodes": 4, "passes": 1, "batch": 2, "learning_rate": 1e-4},
            "loss": {"token_window": [0.01, 100.0], "sequence_guard": [0.01, 100.0]},
        },
        "eval": {"tasks": 5, "every": 2, "during_tasks": 3},
        "broker": {"port": broker, "heartbeat_s": 0.3, "fsync": "interval"},
        "weights": {"port": weights, "relay_port": relay},
        "metrics": dict(zip(names, metrics, strict=True)),
    }


@pytest.fixture
def processes(tmp_path: Path, values: dict[str, Any]) -> Iterator[Processes]:
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(values))
    processes = Processes(config)
    yield processes
    processes.end()


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


async def until(condition: Any, learner: subprocess.Popen[bytes], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert learner.poll() is None, f"the learner ended with {learner.returncode}"
        assert time.monotonic() < deadline, "timeout"
        await asyncio.sleep(0.02)


async def exit_code(learner: subprocess.Popen[bytes], timeout_s: float = 120.0) -> int:
    return await asyncio.wait_for(asyncio.to_thread(learner.wait), timeout_s)


@contextlib.asynccontextmanager
async def actor(values: dict[str, Any], model_path: Path, flat_every: int = 3) -> AsyncIterator[Policy]:
    stop, policy = asyncio.Event(), Policy(model_path, flat_every)
    endpoint = f"tcp://127.0.0.1:{values['broker']['port']}"
    task = asyncio.create_task(act(endpoint, values["run"]["name"], policy, stop))
    try:
        yield policy
    finally:
        stop.set()
        await asyncio.wait_for(task, 15)


async def test_killed_and_stopped_the_run_ends_with_every_trajectory_once(
    values: dict[str, Any], processes: Processes, model_path: Path, tmp_path: Path
) -> None:
    """With thinking budgets, soft ones among them, which no episode overruns; and with both sinks."""
    values["sinks"] = {"tensorboard": True, "wandb": "offline", "wandb_project": "of-the-tests"}
    budgets = {"zero": 0.3, "unlimited": 0.3, "choices": [[8, 1.0]]}
    values["thinking"] = {"budgets": budgets, "soft": {"overrun_rate": 0.1, "price": 0.5}}
    values["eval"]["budgets"] = [0, "unlimited"]
    (tmp_path / "run.toml").write_text(tomli_w.dumps(values))
    run_dir = Path(values["run"]["directory"]) / "learning"
    processes.start("broker", "serve")
    metrics = run_dir / "metrics.jsonl"

    def steps() -> int:
        return sum(line["event"] == "step" for line in lines(metrics))

    async with actor(values, model_path) as policy:
        learner = processes.start("learner")
        await until(lambda: any(line["event"] == "warm_start" for line in lines(metrics)), learner)
        learner.send_signal(signal.SIGKILL)  # in the middle of the warm start
        assert await exit_code(learner) == -signal.SIGKILL
        learner = processes.start("learner")
        await until(lambda: steps() >= 3, learner)
        learner.send_signal(signal.SIGKILL)  # between two checkpoints
        assert await exit_code(learner) == -signal.SIGKILL
        done = steps()
        learner = processes.start("learner")
        await until(lambda: steps() > done, learner)
        learner.send_signal(signal.SIGTERM)
        assert await exit_code(learner) == 0
        learner = processes.start("learner")
        assert await exit_code(learner) == 0

    summary = json.loads((run_dir / "summary.json").read_text())
    audit = lines(run_dir / "trained.jsonl")
    trajectories = summary["trajectories"]
    assert summary["steps"] == NUM_STEPS
    assert summary["warm_start_steps"] == 2
    assert (trajectories["lost"], trajectories["duplicated"]) == (0, 0)
    assert trajectories["trained"] == sum(line["fate"] == "trained" for line in audit)
    assert trajectories["delivered"] == trajectories["trained"] + trajectories["masked"] == len(audit)
    assert trajectories["issued"] == trajectories["delivered"] + trajectories["cancelled"]
    assert {line["reason"] for line in audit} >= {"trained", "zero_variance"}
    surviving = [line["step"] for line in audit if line["reason"] == "trained"]
    assert sorted(set(surviving)) == list(range(1, NUM_STEPS + 1))
    assert summary["eval_tasks"] == 5
    for key in ("reward_before", "reward_after_warm_start", "reward_after", "greedy_before", "greedy_after"):
        assert summary[key] is not None
    assert set(summary["kinds"]) == {"even", "odd"}
    assert len(summary["ci95"]) == 2
    assert summary["staleness_max"] <= 1
    assert {line["lineage"] for line in lines(metrics)} == {1, 2, 3, 4}
    evaluations = [line["evaluation"] for line in lines(metrics) if line["event"] == "evaluation"]
    assert evaluations.count("before") == 1  # its results were in a checkpoint
    assert {"after-warm-start", "after"} <= set(evaluations)
    # Whichever learner issued it, a group has the budget that its number draws.
    section = BudgetsSection.model_validate(budgets)
    for ticket in policy.tickets:
        if ticket.mode is Mode.TRAIN:
            number = int(ticket.group_id.rsplit("/", 1)[1])
            assert ticket.thinking_budget == draw_budget(section, 0, "train", number)
    assert {ticket.thinking_budget for ticket in policy.tickets} == {0, 8, None}
    batches = [line for line in lines(metrics) if line["event"] in ("step", "skipped")]
    prices = {life: [line["overrun_price"] for line in batches if line["lineage"] == life] for life in (2, 4)}
    assert prices[2][0] == 0.5
    assert prices[4][0] < 0.5  # it goes on from the checkpoint's
    assert all(falling == sorted(falling, reverse=True) for falling in prices.values())
    curves = json.loads((run_dir / "budgets.json").read_text())["evaluations"]
    assert {"before", "after-warm-start", "after"} <= set(curves)
    assert summary["budgets"]["after"] == curves["after"]
    assert [(p["budget"], p["episodes"]) for p in curves["after"]["sampled"]] == [(0, 5), ("unlimited", 5)]
    assert (run_dir / "budgets.svg").read_text().startswith("<svg")
    check_tensorboard(run_dir, lines(metrics))
    check_wandb(run_dir, lines(metrics))


def check_tensorboard(run_dir: Path, records: list[dict[str, Any]]) -> None:
    """Every step once, with the value of its last history; evaluations; the settings."""
    curves = tensorboard_curves(run_dir / "tensorboard")
    survived = {line["step"]: line["reward_mean"] for line in records if line["event"] == "step"}
    assert [step for step, _ in curves["train/reward_mean"]] == list(range(1, NUM_STEPS + 1))
    assert dict(curves["train/reward_mean"]) == pytest.approx(survived)
    for name in ("eval/before/greedy", "eval/after-warm-start/sampled", "eval/sampled_curve/unlimited/reward"):
        assert curves[name], name
    assert curves["eval/sampled"][-1][0] == NUM_STEPS
    (after,) = (line for line in records if line["event"] == "evaluation" and line["evaluation"] == "after")
    assert curves["eval/sampled"][-1][1] == pytest.approx(after["sampled"])
    assert [step for step, _ in tensorboard_curves(run_dir / "tensorboard/warm_start")["warm_start/loss"]] == [1, 2]
    assert f"num_steps = {NUM_STEPS}" in tensorboard_text(run_dir / "tensorboard")


def check_wandb(run_dir: Path, records: list[dict[str, Any]]) -> None:
    """One run, whichever learner wrote. The two that were killed lived for less than the library takes to begin."""
    runs = wandb_runs(run_dir)
    assert {run.run_id for run in runs if run.run_id} == {kept_id(run_dir)}
    for run, lineage in zip(runs[-2:], (3, 4), strict=True):
        assert run.config["learner"]["num_steps"] == NUM_STEPS
        said = [line["step"] for line in records if line["lineage"] == lineage and line["event"] == "step"]
        assert [line["step"] for line in run.history if "train/reward_mean" in line] == said
    last = [line for line in records if line["lineage"] == 4]
    (after,) = (line for line in last if line["event"] == "evaluation" and line["evaluation"] == "after")
    assert runs[-1].history[-1]["eval/sampled"] == pytest.approx(after["sampled"])


async def test_two_ranks_killed_together_end_with_every_trajectory_once(
    values: dict[str, Any], processes: Processes, model_path: Path, tmp_path: Path
) -> None:
    """ZeRO-3 and several optimiser steps a batch; what is killed is the launcher, and its ranks die with it."""
    several = {"ranks": 2, "zero_stage": 3, "minibatches": 2, "max_staleness": 3, "num_steps": 4}
    values["learner"] |= several
    (tmp_path / "run.toml").write_text(tomli_w.dumps(values))
    run_dir = Path(values["run"]["directory"]) / "learning"
    metrics = run_dir / "metrics.jsonl"
    processes.start("broker", "serve")
    async with actor(values, model_path):
        learner = processes.start("learner")
        await until(lambda: any(line["event"] == "step" for line in lines(metrics)), learner)
        learner.send_signal(signal.SIGKILL)
        assert await exit_code(learner) == -signal.SIGKILL
        assert await exit_code(processes.start("learner")) == 0

    summary = json.loads((run_dir / "summary.json").read_text())
    audit = lines(run_dir / "trained.jsonl")
    trajectories = summary["trajectories"]
    assert summary["steps"] == several["num_steps"]
    assert (trajectories["lost"], trajectories["duplicated"]) == (0, 0)
    assert trajectories["delivered"] == trajectories["trained"] + trajectories["masked"] == len(audit)
    surviving = [line["step"] for line in audit if line["reason"] == "trained"]
    assert sorted(set(surviving)) == list(range(1, several["num_steps"] + 1))
    assert {line["lineage"] for line in lines(metrics)} == {1, 2}
    assert all(line["num_refused_minibatches"] == 0 for line in lines(metrics) if line["event"] == "step")


async def test_training_without_any_variance_ends_early_and_says_so(
    values: dict[str, Any], processes: Processes, model_path: Path, tmp_path: Path
) -> None:
    values["learner"] |= {"max_skipped_batches": 2, "warm_start": {"episodes": 0}}
    values["eval"] = {"tasks": 2}
    (tmp_path / "run.toml").write_text(tomli_w.dumps(values))
    processes.start("broker", "serve")
    async with actor(values, model_path, flat_every=1):
        assert await exit_code(processes.start("learner")) == 0
    run_dir = Path(values["run"]["directory"]) / "learning"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == summary["trajectories"]["trained"] == 0
    assert summary["trajectories"]["masked"] == summary["trajectories"]["delivered"] > 0
    assert summary["reward_after"] is not None
    assert [line["event"] for line in lines(run_dir / "metrics.jsonl")].count("skipped") == 2


async def test_a_missing_model_ends_with_one_sentence(values: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "bad.toml"
    config.write_text(tomli_w.dumps(values | {"model": {"path": "/no/such/model"}}))
    command = [sys.executable, "-m", "learner", "--config", str(config)]
    result = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, timeout=90, check=False, env=environment()
    )
    assert result.returncode == 2
    last = result.stderr.decode().strip().splitlines()[-1]
    assert last.startswith("ergon learner: error: model.path is '/no/such/model'")
    assert "Traceback" not in result.stderr.decode()
