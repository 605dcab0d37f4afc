"""The judge of pods: a pod that keeps every rule passes, and each rule is broken in every place where it can be."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.pod_security import violations

Path = tuple[str | int, ...]


def container(name: str) -> dict[str, Any]:
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {"name": name, "image": "x", "ports": [{"containerPort": 80}], "securityContext": security}


def good() -> dict[str, Any]:
    """A pod with all three kinds of containers and every kind of volume that is let in."""
    kinds = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
    security = {"runAsNonRoot": True, "runAsUser": 7, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {
        "securityContext": security,
        "initContainers": [container("first")],
        "containers": [container("main")],
        "ephemeralContainers": [container("debug")],
        "volumes": [{"name": kind.lower(), kind: {}} for kind in kinds],
    }
    return {"metadata": {"name": "pod"}, "spec": spec}


def changed(path: Path, value: Any) -> dict[str, Any]:
    pod = copy.deepcopy(good())
    place: Any = pod
    for step in path[:-1]:
        place = place[step] if isinstance(place, list) else place.setdefault(step, {})
    place[path[-1]] = value
    return pod


def test_a_pod_that_keeps_every_rule_passes() -> None:
    assert violations(good()) == []
    assert violations({"spec": good()["spec"]}) == []


def test_what_may_be_said_by_a_container_may_be_left_out_by_the_pod() -> None:
    pod = good()
    said = {"runAsNonRoot": True, "seccompProfile": {"type": "Localhost", "localhostProfile": "x.json"}}
    del pod["spec"]["securityContext"]
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        pod["spec"][kind][0]["securityContext"] |= said
    assert violations(pod) == []


OF_POD: list[tuple[Path, Any, str]] = [
    (("hostNetwork",), True, "hostNetwork"),
    (("hostPID",), True, "hostPID"),
    (("hostIPC",), True, "hostIPC"),
    (("volumes", 3), {"name": "v", "hostPath": {"path": "/"}}, "volume v of a restricted type"),
    (("volumes", 3), {"name": "v", "nfs": {}}, "volume v of a restricted type"),
    (("volumes", 3), {"name": "v", "emptyDir": {}, "hostPath": {}}, "volume v of a restricted type"),
    (("securityContext", "sysctls"), [{"name": "kernel.msgmax", "value": "1"}], "sysctl kernel.msgmax"),
    (("securityContext", "runAsUser"), 0, "pod: runAsUser=0"),
    (("securityContext", "seLinuxOptions"), {"type": "spc_t"}, "pod: seLinuxOptions"),
    (("securityContext", "seLinuxOptions"), {"user": "root"}, "pod: seLinuxOptions"),
    (("securityContext", "appArmorProfile"), {"type": "Unconfined"}, "pod: appArmorProfile"),
    (("securityContext", "seccompProfile"), {"type": "Unconfined"}, "pod: seccompProfile"),
    (("securityContext", "windowsOptions"), {"hostProcess": True}, "pod: hostProcess"),
]


@pytest.mark.parametrize(("path", "value", "phrase"), OF_POD)
def test_each_rule_of_a_pod(path: Path, value: Any, phrase: str) -> None:
    assert violations(changed(("spec", *path), value)) == [phrase]


def test_the_annotation_of_apparmor() -> None:
    key = "container.apparmor.security.beta.kubernetes.io/main"
    assert violations(changed(("metadata", "annotations"), {key: "unconfined"})) == ["AppArmor profile unconfined"]
    assert violations(changed(("metadata", "annotations"), {key: "runtime/default", "other": "unconfined"})) == []


OF_CONTAINER: list[tuple[Path, Any, str]] = [
    (("securityContext", "privileged"), True, "privileged"),
    (("securityContext", "allowPrivilegeEscalation"), True, "allowPrivilegeEscalation != false"),
    (("securityContext", "capabilities"), {"drop": ["NET_RAW"]}, "unrestricted capabilities"),
    (("securityContext", "capabilities"), {"drop": ["ALL"], "add": ["SYS_ADMIN"]}, "unrestricted capabilities"),
    (("securityContext", "runAsNonRoot"), False, "runAsNonRoot != true"),
    (("securityContext", "runAsUser"), 0, "runAsUser=0"),
    (("securityContext", "seccompProfile"), {"type": "Unconfined"}, "seccompProfile"),
    (("securityContext", "procMount"), "Unmasked", "procMount"),
    (("securityContext", "appArmorProfile"), {"type": "Unconfined"}, "appArmorProfile"),
    (("securityContext", "windowsOptions"), {"hostProcess": True}, "hostProcess"),
    (("ports", 0), {"containerPort": 80, "hostPort": 80}, "hostPort"),
    (("livenessProbe",), {"httpGet": {"host": "10.0.0.1", "port": 1}}, "host of a probe"),
    (("startupProbe",), {"tcpSocket": {"host": "10.0.0.1", "port": 1}}, "host of a probe"),
    (("lifecycle",), {"preStop": {"httpGet": {"host": "10.0.0.1", "port": 1}}}, "host of a probe"),
]


@pytest.mark.parametrize("kind", ["initContainers", "containers", "ephemeralContainers"])
@pytest.mark.parametrize(("path", "value", "phrase"), OF_CONTAINER)
def test_each_rule_of_a_container(kind: str, path: Path, value: Any, phrase: str) -> None:
    name = good()["spec"][kind][0]["name"]
    assert violations(changed(("spec", kind, 0, *path), value)) == [f"{name}: {phrase}"]


@pytest.mark.parametrize("key", ["allowPrivilegeEscalation", "capabilities"])
def test_what_must_be_said_is_missed(key: str) -> None:
    pod = good()
    del pod["spec"]["containers"][0]["securityContext"][key]
    assert len(violations(pod)) == 1


def test_a_pod_that_says_nothing_breaks_what_must_be_said() -> None:
    pod = {"spec": {"containers": [{"name": "main", "image": "x"}]}}
    assert violations(pod) == [
        "main: allowPrivilegeEscalation != false",
        "main: unrestricted capabilities",
        "main: runAsNonRoot != true",
        "main: seccompProfile not set",
    ]
    assert violations({"spec": {"containers": []}}) == ["no container"]


def test_what_the_pod_denies_no_container_may_allow() -> None:
    """A pod that says root may, though each container says it may not."""
    pod = good()
    pod["spec"]["securityContext"]["runAsNonRoot"] = False
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        pod["spec"][kind][0]["securityContext"]["runAsNonRoot"] = True
    assert violations(pod) == ["pod: runAsNonRoot != true"]
