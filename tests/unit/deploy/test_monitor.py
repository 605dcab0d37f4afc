"""Prometheus' configuration for a run on this machine."""

from pathlib import Path

import pytest

from broker.process.lifecycle import ErgonError
from broker.process.settings import ActorSection, MetricsSection, RunSection, Settings
from deploy.monitoring import monitor


def test_every_process_of_the_run_is_scraped_at_its_port() -> None:
    settings = Settings(
        run=RunSection(name="a"), actor=ActorSection(count=3), metrics=MetricsSection(broker_port=1234, actor_port=4000)
    )
    config = monitor.configuration(settings, 0.5, "127.0.0.1:9093")
    found = {
        (job["job_name"], static["labels"]["instance"], *static["targets"])
        for job in config["scrape_configs"]
        for static in job["static_configs"]
    }
    assert {
        ("ergon-broker", "broker", "127.0.0.1:1234"),
        ("ergon-relay", "relay", "127.0.0.1:9701"),
        ("ergon-learner", "learner", "127.0.0.1:9702"),
        *(("ergon-actor", f"actor-{i}", f"127.0.0.1:{4000 + i}") for i in range(3)),
    } == found
    assert {static["labels"]["run"] for job in config["scrape_configs"] for static in job["static_configs"]} == {"a"}
    assert config["global"]["scrape_interval"] == "500ms"
    assert config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] == ["127.0.0.1:9093"]
    assert "alerting" not in monitor.configuration(settings, 5)
    assert [Path(path).name for path in config["rule_files"]] == ["alerts.yml", "recording.yml"]


def test_a_prometheus_that_cannot_start_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(ErgonError, match="prometheus ended at once"),
        monitor.Prometheus({"rule_files": 1}, tmp_path, 1),
    ):
        pytest.fail("it has started")


def test_a_program_that_is_missing_is_named() -> None:
    with pytest.raises(ErgonError, match="no-such-program is not installed"):
        monitor.program("no-such-program")
