"""A real node, where the machine allows it: kubelet, containerd and runc. A sandbox's pod, as the chart's closed
namespace would have it, runs there, does what it is told and can do nothing else.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config, stream

from envs.sandbox.bubblewrap import WORK_DIR
from tests.cluster.plane.admission import LABEL
from tests.cluster.plane.conftest import PROGRAMS_AT
from tests.cluster.plane.control import ControlPlane
from tests.cluster.plane.machine import Machine, UnavailableError

IMAGES_AT = "ERGON_IMAGES"
IMAGE = "localhost/ergon-sandbox:test"
NAMESPACE = "boxes"


@pytest.fixture(scope="module")
def machine(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    archive = Path(os.environ.get(IMAGES_AT, "/nowhere")) / "sandbox.tar"
    if not archive.exists():
        pytest.skip(f"no image of a sandbox in ${IMAGES_AT}: `make test-images` builds it")
    with contextlib.ExitStack() as stack:
        try:
            machine = stack.enter_context(
                Machine(plane, tmp_path_factory.mktemp("node"), Path(os.environ[PROGRAMS_AT]))
            )
        except UnavailableError as error:
            pytest.skip(f"this machine cannot be a node: {error}")
        machine.load(archive)
        yield machine


@pytest.fixture(scope="module")
def box(plane: ControlPlane, machine: Machine) -> Iterator[tuple[Any, str]]:
    """A running pod of the sandbox's image: (client, name)."""
    core = client.CoreV1Api(config.new_client_from_config(str(plane.kubeconfig)))
    core.create_namespace({"metadata": {"name": NAMESPACE, "labels": LABEL}})
    security = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    container = {
        "name": "box",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", "infinity"],
        "securityContext": security,
        "resources": {"limits": {"cpu": "1", "memory": "256Mi"}},
        "volumeMounts": [{"name": "work", "mountPath": WORK_DIR}],
    }
    user = {"runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532}
    spec = {
        "containers": [container],
        "volumes": [{"name": "work", "emptyDir": {}}],
        "securityContext": user | {"seccompProfile": {"type": "RuntimeDefault"}},
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
    }
    core.create_namespaced_pod(NAMESPACE, {"metadata": {"name": "box"}, "spec": spec | machine.placement})
    deadline = time.monotonic() + 120
    while (pod := core.read_namespaced_pod("box", NAMESPACE)).status.phase != "Running":
        told = core.list_namespaced_event(NAMESPACE).items
        assert time.monotonic() < deadline, [event.message for event in told][-5:]
        time.sleep(0.2)
    yield core, pod.metadata.name
    core.delete_namespaced_pod("box", NAMESPACE)
    while core.list_namespaced_pod(NAMESPACE).items:
        assert time.monotonic() < deadline + 60, "the pod does not end"
        time.sleep(0.2)


def told(box: tuple[Any, str], script: str) -> str:
    core, name = box
    return str(
        stream.stream(
            core.connect_get_namespaced_pod_exec,
            name,
            NAMESPACE,
            command=["sh", "-c", script],
            stdout=True,
            stderr=True,
            stdin=False,
            tty=False,
        )
    ).strip()


def test_it_does_what_it_is_told(box: tuple[Any, str]) -> None:
    assert told(box, f"echo $((6 * 7)) > {WORK_DIR}/a && cat {WORK_DIR}/a") == "42"
    assert told(box, "python3 -c 'print(2 ** 70)'") == str(2**70)


def test_it_is_nobody_and_can_become_no_one(box: tuple[Any, str]) -> None:
    assert told(box, "id -u") == "65532"
    assert told(box, "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | cut -f2 | tr '\\n' ' '") == (
        "0000000000000000 0000000000000000 1 2"
    )
    assert "Read-only" in told(box, "touch /usr/x")


def test_it_has_no_token_and_sees_no_process_of_the_machine(box: tuple[Any, str]) -> None:
    assert "No such file" in told(box, "ls /var/run/secrets/kubernetes.io")
    assert told(box, "ls -d /proc/[0-9]* | wc -l").isdigit()
    assert int(told(box, "ls -d /proc/[0-9]* | wc -l")) < 8
