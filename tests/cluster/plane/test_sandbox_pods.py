"""The backend `pod` on a real API server, scheduler and controllers, by the very role that the chart gives actors.

No node is there, so no pod runs: what is shown is what Kubernetes takes, what it refuses, and that nothing stays.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client.rest import ApiException

from envs.interface import SandboxError
from envs.sandbox import Limits, PodSandbox, PodSettings, configure_pods
from envs.sandbox.pods import pod_settings
from envs.sandbox.pods.cluster import Cluster
from envs.sandbox.pods.manifest import make_manifest
from tests.cluster.rendering import MATRIX, RELEASE, render

control = pytest.importorskip("tests.cluster.plane.control", reason="the control plane of the tests is not here")
admission = pytest.importorskip("tests.cluster.plane.admission", reason="the control plane of the tests is not here")

NAMESPACE = f"{RELEASE}-sandboxes"
SETTINGS = PodSettings(namespace=NAMESPACE, run="demo", actor="actor-0", start_timeout_s=6)
PROGRAMS = Path(os.environ.get("ERGON_KUBERNETES", "/nowhere"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A control plane with the chart's namespace for sandboxes, and a user with the role of its actors."""
    if not (PROGRAMS / "kube-apiserver").exists():
        pytest.skip("no kube-apiserver in $ERGON_KUBERNETES")
    directory = tmp_path_factory.mktemp("plane")
    with control.ControlPlane(directory, PROGRAMS) as plane, admission.PodSecurity(plane):
        core, rbac = client.CoreV1Api(plane.api()), client.RbacAuthorizationV1Api(plane.api())
        (namespace,) = (each for each in render(*MATRIX["pods"]) if each["kind"] == "Namespace")
        core.create_namespace(namespace)
        for manifest in render(*MATRIX["pods"]):
            if manifest["metadata"].get("namespace") != NAMESPACE:
                continue
            if manifest["kind"] == "Role":
                rbac.create_namespaced_role(NAMESPACE, manifest)
            elif manifest["kind"] == "RoleBinding":
                user = {"kind": "User", "name": "an-actor", "apiGroup": "rbac.authorization.k8s.io"}
                rbac.create_namespaced_role_binding(NAMESPACE, manifest | {"subjects": [user]})
            elif manifest["kind"] == "LimitRange":
                core.create_namespaced_limit_range(NAMESPACE, manifest)
        yield plane


@pytest.fixture(autouse=True)
def configured(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig_of("an-actor")))
    before = pod_settings()
    configure_pods(SETTINGS)
    yield
    configure_pods(before)


def pods(server: Any) -> list[str]:
    return [pod.metadata.name for pod in client.CoreV1Api(server.api()).list_namespaced_pod(NAMESPACE).items]


async def test_a_pod_that_no_node_takes_says_so_and_is_removed(server: Any) -> None:
    with pytest.raises(SandboxError, match=r"not ready within 6 s: no node can take it \(Unschedulable: no nodes"):
        await PodSandbox.create({"/opt/tool": b"x", "a": b"1"})
    assert pods(server) == []


@pytest.mark.parametrize(
    ("place", "value", "phrase"),
    [
        ("hostNetwork", True, "hostNetwork"),
        ("volumes", [{"name": "v", "hostPath": {"path": "/"}}], "volume v of a restricted type"),
        ("securityContext", {"runAsNonRoot": True, "runAsUser": 7}, "sandbox: seccompProfile not set"),
    ],
)
def test_the_chart_s_namespace_takes_no_pod_with_a_privilege(server: Any, place: str, value: Any, phrase: str) -> None:
    """By the label that the chart gives it. A pod as actors make it is taken; with one thing changed it is not."""
    core, manifest = client.CoreV1Api(server.api()), make_manifest(SETTINGS, Limits(), {})
    core.create_namespaced_pod(NAMESPACE, manifest, dry_run="All")
    manifest["spec"]["containers"][0]["volumeMounts"] = []
    manifest["spec"][place] = value
    with pytest.raises(ApiException, match=rf'violates PodSecurity \\"restricted:latest\\": {phrase}') as caught:
        core.create_namespaced_pod(NAMESPACE, manifest, dry_run="All")
    assert caught.value.status == 403


async def test_without_the_role_it_is_refused_with_the_chart_s_value(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig_of("nobody")))
    configure_pods(dataclasses.replace(SETTINGS, run=""))
    with pytest.raises(
        SandboxError, match=r"may not create pods in the namespace 'demo-sandboxes'; set sandboxes\.actors"
    ):
        await PodSandbox.create()


async def test_a_namespace_that_is_not_there_is_said(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    configure_pods(dataclasses.replace(SETTINGS, namespace="nowhere"))
    with pytest.raises(SandboxError, match=r"no such namespace; set sandboxes\.create=true"):
        await PodSandbox.create()


async def test_a_limit_range_and_a_quota_are_told_apart(server: Any) -> None:
    configure_pods(dataclasses.replace(SETTINGS, cpu=2.0))
    with pytest.raises(SandboxError, match=r"maximum cpu usage per Container is 1.*lower sandboxes\.cpu"):
        await PodSandbox.create()
    configure_pods(SETTINGS)
    core = client.CoreV1Api(server.api())
    core.create_namespaced_resource_quota(NAMESPACE, {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}})
    deadline = time.monotonic() + 20
    while not core.read_namespaced_resource_quota("none", NAMESPACE).status.hard:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    try:
        with pytest.raises(SandboxError, match=r"quota is used up; raise sandboxes\.maxPods"):
            await PodSandbox.create()
    finally:
        core.delete_namespaced_resource_quota("none", NAMESPACE)


async def test_what_an_earlier_process_left_is_removed(server: Any) -> None:
    earlier = dataclasses.replace(SETTINGS, process="earlier")
    before = await Cluster.acquire(earlier)
    name = await before.create(make_manifest(earlier, Limits(), {}))
    assert pods(server) == [name]
    with pytest.raises(SandboxError, match="pods/exec"):  # it has no node to run on
        await before.connect(name, ["true"])
    after = await Cluster.acquire(dataclasses.replace(SETTINGS, process="later"))
    assert pods(server) == []
    await after.release()
    await before.release()
