"""A review of what is rendered: no pod has a privilege, a host's path, a needless token or an open port."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envs.sandbox import Limits, PodSettings
from envs.sandbox.pods.manifest import make_manifest
from tests.cluster.rendering import MATRIX, NAMESPACE, RELEASE, TOOLS, Manifest, of_kind, pods, render
from tests.pod_security import violations

WITH_TOKEN = {"keys", "costs"}  # the two that speak to the API server; actors do where they make sandboxes

all_profiles = pytest.mark.parametrize("name", MATRIX)


def containers(spec: Manifest) -> Iterator[Manifest]:
    yield from spec.get("initContainers", [])
    yield from spec["containers"]


@all_profiles
def test_no_pod_has_a_privilege(name: str) -> None:
    found = list(pods(render(*MATRIX[name])))
    assert len(found) >= 5
    for pod, _, spec in found:
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), pod
        assert spec["securityContext"]["runAsNonRoot"] is True, pod
        assert spec["securityContext"]["runAsUser"] > 0, pod
        assert spec["securityContext"]["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost"), pod
        assert spec["enableServiceLinks"] is False, pod
        for container in containers(spec):
            security = container["securityContext"]
            assert security == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, pod
            assert "memory" in container["resources"]["limits"], pod
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), pod
            assert not any("hostPort" in port for port in container.get("ports", [])), pod
            assert container["image"].rpartition(":")[2] not in ("", "latest"), pod


@all_profiles
def test_every_pod_keeps_to_restricted(name: str) -> None:
    """The whole standard, also for whoever gives the run's own namespace that label. And none was overlooked: there are
    as many pods as there are lists of containers anywhere in what is rendered."""
    manifests = render(*MATRIX[name])
    judged = [
        (pod, violations({"metadata": {"labels": labels}, "spec": spec})) for pod, labels, spec in pods(manifests)
    ]
    assert [(pod, found) for pod, found in judged if found] == []
    assert len(judged) == sum(lists_of_containers(manifest) for manifest in manifests)


def lists_of_containers(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(lists_of_containers, value))
    if isinstance(value, dict):
        return ("containers" in value) + sum(map(lists_of_containers, value.values()))
    return 0


@all_profiles
def test_no_pod_sees_the_host_or_the_keys_of_another(name: str) -> None:
    allowed = {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
    for pod, labels, spec in pods(render(*MATRIX[name])):
        for volume in spec.get("volumes", []):
            (source,) = volume.keys() - {"name"}
            assert source in allowed, pod
            if source == "secret":
                component = labels["app.kubernetes.io/component"]
                assert volume["secret"]["secretName"].endswith(f"-{component}"), pod
                assert volume["secret"]["defaultMode"] & 0o007 == 0, pod


@all_profiles
def test_only_what_speaks_to_the_api_has_a_token_and_may_do_next_to_nothing(name: str) -> None:
    manifests = render(*MATRIX[name])
    with_token = WITH_TOKEN | ({"actor"} if "sandboxes.actors=true" in MATRIX[name] else set())
    holders = {}
    for pod, labels, spec in pods(manifests):
        has = spec["automountServiceAccountToken"]
        assert has == (labels["app.kubernetes.io/component"] in with_token), pod
        holders[spec["serviceAccountName"]] = holders.get(spec["serviceAccountName"], False) or has
    for account in of_kind(manifests, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    bound = {subject["name"] for binding in of_kind(manifests, "RoleBinding") for subject in binding["subjects"]}
    assert bound == {account for account, has in holders.items() if has}
    assert not of_kind(manifests, "ClusterRole")
    assert not of_kind(manifests, "ClusterRoleBinding")
    rights = [(tuple(r["resources"]), tuple(r["verbs"])) for role in of_kind(manifests, "Role") for r in role["rules"]]
    allowed = {(("secrets",), ("create",)), (("secrets",), ("get",)), (("pods",), ("list", "patch"))}
    if "sandboxes.actors=true" in MATRIX[name]:
        allowed |= {(("pods",), ("create", "list", "watch", "delete")), (("pods/exec",), ("create", "get"))}
    assert set(rights) <= allowed
    for role in of_kind(manifests, "Role"):
        for rule in role["rules"]:
            if rule["resources"] == ["secrets"] and rule["verbs"] == ["get"]:
                assert len(rule["resourceNames"]) == 5


def selects(selector: Manifest, labels: Manifest) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def policies_of(manifests: tuple[Manifest, ...], labels: Manifest) -> list[Manifest]:
    return [m["spec"] for m in of_kind(manifests, "NetworkPolicy") if selects(m["spec"]["podSelector"], labels)]


def admitted(rules: list[Manifest], peer: Manifest, port: Any) -> bool:
    """Whether a rule lets these labels through to this port."""
    for rule in rules:
        peers = rule.get("from", rule.get("to"))
        by_pod = peers is None or any(
            selects(p["podSelector"], peer) for p in peers if "podSelector" in p and "namespaceSelector" not in p
        )
        if by_pod and ("ports" not in rule or any(p["port"] == port for p in rule["ports"])):
            return True
    return False


@all_profiles
def test_every_open_port_has_a_policy_and_every_pod_is_closed_otherwise(name: str) -> None:
    manifests = render(*MATRIX[name])
    for pod, labels, spec in pods(manifests):
        policies = policies_of(manifests, labels)
        if labels["app.kubernetes.io/component"] != "keys":  # a hook comes before the default policy, and has its own
            default = [p for p in policies if "ingress" not in p and p["policyTypes"] == ["Ingress", "Egress"]]
            assert default, f"{pod} is open"
        assert any("Ingress" in p["policyTypes"] for p in policies), pod
        assert any("Egress" in p["policyTypes"] for p in policies), pod
        for container in containers(spec):
            for port in container.get("ports", []):
                rules = [rule for p in policies for rule in p.get("ingress", [])]
                assert any(any(named["port"] == port["name"] for named in rule.get("ports", [])) for rule in rules) or (
                    port["name"] == "rendezvous" and any("ports" not in rule for rule in rules)
                ), f"{pod} {port}"


CONVERSATIONS = {
    ("actor", "broker", "experience"),
    ("learner", "broker", "experience"),
    ("operator", "broker", "experience"),
    ("relay", "learner", "weights"),
    ("actor", "relay", "weights"),
    ("relay", "relay", "weights"),
    ("learner", "learner", "rendezvous"),
}


@all_profiles
def test_the_policies_let_through_who_must_talk_and_nobody_else(name: str) -> None:
    manifests = render(*MATRIX[name])
    found = {labels["app.kubernetes.io/component"]: labels for _, labels, _ in pods(manifests)}
    ports = {
        (labels["app.kubernetes.io/component"], port["name"])
        for _, labels, spec in pods(manifests)
        for container in containers(spec)
        for port in container.get("ports", [])
        if port["name"] != "metrics"
    }
    talking = set()
    for source, source_labels in found.items():
        out = [rule for p in policies_of(manifests, source_labels) for rule in p.get("egress", [])]
        for target, port in ports:
            into = [rule for p in policies_of(manifests, found[target]) for rule in p.get("ingress", [])]
            if admitted(out, found[target], port) and admitted(into, source_labels, port):
                talking.add((source, target, port))
    # Ranks of several nodes choose their own ports, so between learners all are open.
    assert talking - {("learner", "learner", "weights")} == CONVERSATIONS


def test_the_namespace_of_sandboxes_is_closed() -> None:
    manifests = render(*MATRIX["many-nodes"])
    (namespace,) = of_kind(manifests, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    inside = [m for m in manifests if m["metadata"].get("namespace") == f"{RELEASE}-sandboxes"]
    (policy,) = (m["spec"] for m in inside if m["kind"] == "NetworkPolicy")
    assert policy == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (account,) = (m for m in inside if m["kind"] == "ServiceAccount")
    assert account["metadata"]["name"] == "default"
    assert account["automountServiceAccountToken"] is False
    (quota,) = (m["spec"]["hard"] for m in inside if m["kind"] == "ResourceQuota")
    assert quota["pods"] == "512"
    assert quota["secrets"] == "0"
    assert [m["handler"] for m in of_kind(manifests, "RuntimeClass")] == ["runsc"]


def test_actors_may_make_sandboxes_there_and_touch_nothing_here() -> None:
    manifests = render(*MATRIX["pods"])
    roles = [
        role for role in of_kind(manifests, "Role") if any("pods/exec" in rule["resources"] for rule in role["rules"])
    ]
    (binding,) = (m for m in of_kind(manifests, "RoleBinding") if m["roleRef"]["name"] == roles[0]["metadata"]["name"])
    assert [role["metadata"]["namespace"] for role in roles] == [f"{RELEASE}-sandboxes"]
    assert binding["metadata"]["namespace"] == f"{RELEASE}-sandboxes"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": f"{RELEASE}-actor", "namespace": NAMESPACE}]


def test_a_sandboxs_pod_fits_the_schemas_and_asks_for_no_privilege() -> None:
    """What actors make, beside what the chart does."""
    taint: dict[str, str | int] = {"key": "ergon.dev/sandboxes", "operator": "Exists", "effect": "NoSchedule"}
    placed = {"node_selector": {"ergon.dev/pool": "sandboxes"}, "tolerations": (taint,), "pull_secrets": ("pull",)}
    settings = PodSettings(runtime_class="gvisor", run="a run", owner=("actor-x", "0123"), **placed)
    manifest = make_manifest(settings, Limits(), {"/opt/tool": b"x" * 300_000, "/tests/a": b""})
    command = [TOOLS / "python", Path(__file__).parent / "check_manifests.py", "1.34", "1.35", "1.36", "1.37"]
    done = subprocess.run(
        command, input=json.dumps([manifest]), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    assert manifest["spec"]["automountServiceAccountToken"] is False
    assert violations(manifest) == []


def test_every_pod_that_actors_make_keeps_to_restricted() -> None:
    """With and without each thing that a run, a chart or an environment can ask for."""
    taint: dict[str, str | int] = {"key": "ergon.dev/sandboxes", "operator": "Exists", "effect": "NoSchedule"}
    asked: dict[str, tuple[Any, Any]] = {
        "runtime_class": ("", "gvisor"),
        "node_selector": ({}, {"ergon.dev/pool": "sandboxes"}),
        "tolerations": ((), (taint,)),
        "pull_secrets": ((), ("pull",)),
        "owner": (None, ("actor-x", "0123")),
        "cpu": (0.05, 4.0),
    }
    files: tuple[dict[str, bytes], ...] = ({}, {"/opt/tool": b"x"}, {"/opt/tool": b"x" * 300_000, "/tests/a": b""})
    limits = (Limits(), Limits(processes=1, memory_bytes=1 << 20, work_bytes=4096, tmp_bytes=4096))
    made = [
        make_manifest(PodSettings(**dict(zip(asked, values, strict=True))), each, given)
        for values, given, each in itertools.product(itertools.product(*asked.values()), files, limits)
    ]
    assert len(made) == 2**6 * 3 * 2
    assert [found for manifest in made if (found := violations(manifest))] == []
