"""A node is drained by kubectl: actors are evicted no faster than their budget allows, broker and learner move with
their volumes, and no episode is lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes import client, config

from tests.cluster.plane.network import is_ready
from tests.cluster.plane.release import Cluster, Release

ALL, ACTORS = 7, 4


@pytest.fixture
def crowded(cluster: Cluster) -> Iterator[Release]:
    """A run all of whose pods are on node-1."""
    cluster.run("kubectl", "cordon", "node-2")
    release = Release(cluster, "drain")
    release.pace("1")
    try:
        release.up()
        release.wait_ready(ALL)
        cluster.run("kubectl", "uncordon", "node-2")
        yield release
    finally:
        cluster.run("kubectl", "uncordon", "node-1", "node-2")
        release.ergon("down", check=False)


class Watch(threading.Thread):
    """How many actors were ready, at least, while it ran."""

    def __init__(self, release: Release) -> None:
        super().__init__(name="actors that are ready", daemon=True)
        self.least, self._release, self._ended = ACTORS, release, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            found = self._release.cluster.list(self._release.namespace, "app.kubernetes.io/component=actor")
            # One that is ending still finishes its episodes, but the budget counts it as gone.
            ready = sum(is_ready(pod) and "deletionTimestamp" not in pod["metadata"] for pod in found)
            self.least = min(self.least, ready)

    def end(self) -> int:
        self._ended.set()
        self.join()
        return self.least


def test_a_drained_node_loses_no_episode_and_the_budget_is_kept(crowded: Release, tmp_path: Path) -> None:
    release = crowded
    assert {pod["spec"]["nodeName"] for pod in release.pods()} == {"node-1"}
    newer = config.new_client_from_config(str(release.cluster.front.kubeconfig))
    budget = client.PolicyV1Api(newer).read_namespaced_pod_disruption_budget("demo-actor", release.namespace)
    assert (budget.status.expected_pods, budget.status.disruptions_allowed) == (ACTORS, ACTORS // 2)
    watch = Watch(release)
    watch.start()
    words = ("kubectl", "drain", "node-1", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=300s")
    begun = time.monotonic()
    done = release.cluster.run(*words, check=False, timeout_s=330)
    seconds, least = time.monotonic() - begun, watch.end()
    assert done.returncode == 0, done.stdout + done.stderr
    assert least >= ACTORS // 2
    release.wait_ready(ALL)
    assert {pod["spec"]["nodeName"] for pod in release.pods()} == {"node-2"}
    refused = (done.stdout + done.stderr).count("would violate the pod's disruption budget")
    print(f"drained in {seconds:.0f} s; {least} actors were ready at least; {refused} evictions were refused meanwhile")
    assert refused > 0, "four actors were to go and two might"
    trained = release.num_trained()
    release.wait(lambda: release.num_trained() > trained, "training that goes on")
    release.finish()
    release.ergon("down")
    release.wait(lambda: not release.cluster.list(release.namespace), "namespace without a pod")
    verdict = release.books(tmp_path / "books")
    print(f"episodes issued={verdict.issued} trained={verdict.trained} lost={verdict.lost} twice={verdict.duplicated}")
    assert verdict.problems == []
    assert (verdict.lost, verdict.duplicated) == (0, 0)
    assert verdict.issued == verdict.trained > 0
    assert release.killed_actors() == []
