"""`python -m actors` as an operating-system process, with a real broker, a real weight channel and a real engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from broker.client import LearnerClient
from broker.process.config import save_settings
from broker.process.settings import Settings
from broker.protocol.trajectory import Mode, Outcome, PolicyVersion, Sampling, TaskRef, Ticket, Trajectory
from broker.weights.publisher import WeightPublisher
from tests.ports import free_ports
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[3]
ENVIRONMENT = "tests.unit.actors.support:WordEnvironment"
PROGRAM = "tests.integration.gateway.words:PlainProgram"


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def ticket(ticket_id: str, mode: Mode, env: str = ENVIRONMENT, **changes: Any) -> Ticket:
    return Ticket(
        ticket_id=ticket_id,
        group_id="g",
        group_size=1,
        task=TaskRef(env=env, split="train", index=3),
        mode=mode,
        sampling=Sampling(max_turn_tokens=40, max_episode_tokens=100, max_turns=3),
        deadline_s=200.0,
        **changes,
    )


def settings_for(directory: Path, model: Path) -> Settings:
    broker, relay, actor_metrics, broker_metrics, gateway = free_ports(5)
    return Settings.model_validate(
        {
            "run": {"name": "e2e", "directory": directory},
            "model": {"path": str(model)},
            "environments": [{"name": ENVIRONMENT}, {"name": PROGRAM}],
            "gateway": {"port": gateway},
            "actor": {
                "max_num_seqs": 8,
                "dtype": "float32",
                "kv_cache_mb": 32,
                "max_model_len": 256,
                "drain_s": 5,
                "staging": directory / "staging",
            },
            "broker": {"port": broker},
            "weights": {"relay_port": relay},
            "metrics": {"actor_port": actor_metrics, "broker_port": broker_metrics},
        }
    )


def publish(publisher: WeightPublisher, model: Path, version: PolicyVersion) -> None:
    import torch
    from safetensors.torch import load_file

    state = load_file(model / "model.safetensors")
    publisher.publish(
        version,
        [(name, "bfloat16", tuple(t.shape), t.contiguous().view(torch.uint8).numpy()) for name, t in state.items()],
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_tickets_become_trajectories_and_a_stop_gives_the_rest_back(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    model = make_tiny_model(tmp_path / "model")
    settings = settings_for(tmp_path, model)
    config = tmp_path / "run.toml"
    save_settings(settings, config)
    settings.run_dir.mkdir()
    (staging := settings.actor.staging).mkdir()
    port = settings.metrics.actor_port
    processes.append(start("broker", "serve", "--config", str(config)))
    processes.append(actor := start("actors", "--config", str(config), "--index", "0"))
    publisher = WeightPublisher(f"tcp://127.0.0.1:{settings.weights.relay_port}", "e2e")
    learner = LearnerClient(f"tcp://127.0.0.1:{settings.broker.port}", "e2e")
    try:
        learner.connect(60)
        learner.resume()
        version, later = PolicyVersion(learner.lineage, 0), PolicyVersion(learner.lineage, 1)
        learner.issue([ticket("train", Mode.TRAIN), ticket("reference", Mode.REFERENCE), ticket("no-such", Mode.EVAL)])
        learner.issue([ticket("program", Mode.TRAIN, PROGRAM)])
        learner.issue([ticket(f"later-{i}", Mode.EVAL, min_version=later) for i in range(2)])

        first = learner.receive(240)  # the engine starts meanwhile
        assert isinstance(first, Trajectory)
        assert first.ticket.ticket_id == "reference"  # needs no weights; all others wait for an announced version
        assert (first.head.outcome, first.head.reward) == (Outcome.COMPLETED, 1.1)
        status, body = get(port, "/healthz")
        assert (status, json.loads(body)["policy_version"]) == (503, None)

        publish(publisher, model, version)
        received = [learner.receive(100) for _ in range(3)]
        assert {t.ticket.ticket_id for t in received if isinstance(t, Trajectory)} == {"train", "no-such", "program"}
        for trajectory in received:
            assert isinstance(trajectory, Trajectory)
            assert trajectory.num_sampled > 0
            assert {run[:2] for run in trajectory.segments[0].version_runs} == {tuple(version)}
        assert get(port, "/healthz")[0] == 200
        scraped = get(port, "/metrics")[1]
        for name in (
            "ergon_actor_episodes_total{",
            "ergon_actor_adopt_pause_seconds_count 1.0",
            "vllm:generation_tokens",
        ):
            assert name in scraped
        assert "ergon_actor_waiting_for_version 2.0" in scraped

        engine = psutil.Process(actor.pid).children(recursive=True)
        actor.send_signal(signal.SIGTERM)
        output, _ = actor.communicate(timeout=90)
        assert actor.returncode == 0, output
        _, alive = psutil.wait_procs(engine, timeout=20)
        assert alive == []
        assert list(staging.iterdir()) == []
        # Both waiting leases were given back without an attempt: at once, not when they would have run out.
        tickets = learner.status().tickets
        assert (tickets["leased"]["eval"], tickets["issued"]["eval"]) == (0, 2)
    finally:
        learner.close()
        publisher.close()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([], "model.path = "),
        (["environments.0.name=chess"], "environment 'chess' does not exist"),
        (["actor.router_replay=true"], "actor.router_replay = true cannot be had: model.path = "),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(tmp_path: Path, changes: list[str], sentence: str) -> None:
    model = make_tiny_model(tmp_path / "model") if changes else tmp_path / "nowhere"
    config = tmp_path / "run.toml"
    save_settings(settings_for(tmp_path, model), config)
    overrides = [part for change in changes for part in ("--set", change)]
    process = start("actors", "--config", str(config), *overrides)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert f"error: {sentence}" in output
