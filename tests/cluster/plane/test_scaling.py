"""The autoscaler on a real Kubernetes API: the real controller, the real recording rules in a real Prometheus, which
scrapes a real broker and simulated actors as often as the chart says; an adapter of ours in between.

The learner's appetite is what changes: more actors within a minute when it waits, fewer when they do, and no episode
lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.monitoring.monitor import Prometheus
from tests.cluster.plane.metrics_adapter import Adapter, Discovery, prometheus_config, query
from tests.cluster.plane.release import Cluster, Release
from tests.cluster.rendering import MATRIX, render
from tests.ports import free_ports

MIN, MAX = 2, 4
OTHERS = 3  # broker, relay, learner
ENOUGH, NOTHING, LITTLE = "4", "0", "8"  # seconds a step: two actors are enough; all are too few; two are too many
UP_S = 60.0


@pytest.fixture
def scaled(cluster: Cluster, tmp_path: Path) -> Iterator[tuple[Release, Adapter]]:
    release = Release(cluster, "scaling")
    release.pace(ENOUGH)
    scaling = f"mode=hpa,min={MIN},max={MAX},cooldownSeconds=20".split(",")
    release.up(*(f"actors.scaling.{each}" for each in scaling))
    (monitor,) = (each for each in render(*MATRIX["eight-gpus"]) if each["kind"] == "PodMonitor")
    targets = tmp_path / "targets.json"
    config = prometheus_config(monitor, targets)
    (port,) = free_ports(1)
    with (
        Discovery(cluster.api, release.namespace, targets),
        Prometheus(config, tmp_path / "prometheus", port) as prometheus,
        Adapter(cluster.plane, prometheus.url) as it,
    ):
        yield release, it
        release.ergon("down", check=False)


def told(adapter: Adapter, since: float) -> str:
    """What the autoscaler was told, and how many seconds after `since`."""
    return " ".join(f"{at - since:+.0f}: {value:.2f}" for at, value in adapter.answers[-12:])


def test_actors_come_within_a_minute_and_go_without_losing_an_episode(
    scaled: tuple[Release, Adapter], tmp_path: Path
) -> None:
    release, adapter = scaled
    release.wait_ready(OTHERS + MIN)
    # The autoscaler asks every 15 s, and half a minute is what the rule looks back: what it answers then is of a fleet
    # that is complete, and says nothing of how the run began.
    asked = len(adapter.answers)
    release.wait(lambda: len(adapter.answers) > asked + 3, "answers to the autoscaler")
    before = told(adapter, time.monotonic())
    assert release.scale_of_actors() == MIN, "two actors were enough, and more were asked for"
    (series,) = query(adapter.prometheus_url, 'count by (job) (ergon_broker_tickets{job="ergon-broker"})')
    assert series[1] > 0, "the broker's own metrics are among those that were scraped"

    refused = release.ergon("scale", "3", check=False)
    assert (refused.returncode, "are scaled automatically" in refused.stderr) == (2, True)

    changed = time.monotonic()
    release.pace(NOTHING)
    decided_s = release.wait(lambda: release.scale_of_actors() > MIN, "more actors")
    ready_s = decided_s + release.wait(lambda: release.ready("actor") > MIN, "ready actors")
    release.wait(lambda: release.ready("actor") == MAX, "all actors ready", 300)
    print(f"more actors were asked for after {decided_s:.0f} s, and the first was ready after {ready_s:.0f} s")
    print(f"wanted, by the second: {before}; from the change on {told(adapter, changed)}")
    assert ready_s < UP_S

    release.pace(LITTLE)
    down_s = release.wait(lambda: release.scale_of_actors() < MAX, "fewer actors", 300)
    trained = release.num_trained()
    release.wait(lambda: release.num_trained() > trained, "training that goes on")
    release.finish()
    release.ergon("down")
    release.wait(lambda: not release.cluster.list(release.namespace), "namespace without a pod")
    verdict = release.books(tmp_path / "books")
    books = f"issued={verdict.issued} trained={verdict.trained} lost={verdict.lost} twice={verdict.duplicated}"
    print(f"fewer actors were asked for after {down_s:.0f} s; episodes {books}")
    assert verdict.problems == []
    assert (verdict.lost, verdict.duplicated) == (0, 0)
    assert verdict.issued == verdict.trained > 0
    assert release.killed_actors() == []
