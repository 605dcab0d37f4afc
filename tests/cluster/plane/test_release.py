"""A release's life on a real Kubernetes API: install, look, scale, upgrade, roll back, uninstall, and up again.

One run goes through all of it; what it has issued is trained on once, whatever is done to it.
"""

from __future__ import annotations

import base64
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes import client
from kubernetes.client.rest import ApiException

from broker.process.keys import Identity, read_pair
from broker.process.security import Security
from broker.protocol.commands import Ack, Inspect, Role
from broker.protocol.errors import ErrorCode, ProtocolError
from tests.cluster.plane.network import service_address
from tests.cluster.plane.release import RUN, Cluster, Release
from tests.integration.broker.test_security import hello, raw_peer
from tests.pod_security import violations

ALL = 7  # broker, relay, learner, four actors
IDENTITIES = ("broker", "relay", "learner", "actor", "operator")


@pytest.fixture(scope="module")
def release(cluster: Cluster) -> Iterator[Release]:
    release = Release(cluster, "release")
    release.pace("1")
    release.up()
    release.wait_ready(ALL)
    yield release
    release.ergon("down", check=False)


def table(release: Release) -> list[list[str]]:
    return [line.split() for line in release.ergon("status").stdout.splitlines()]


def secrets(release: Release) -> dict[str, str]:
    """The keys' Secrets and their uids."""
    found = release.cluster.core.list_namespaced_secret(release.namespace).items
    return {each.metadata.name: each.metadata.uid for each in found if each.metadata.name.startswith("demo-keys-")}


def test_all_processes_become_ready_and_status_says_so(release: Release) -> None:
    head, *rows = table(release)
    assert head == ["component", "pod", "state", "restarts", "node"]
    assert [row[0] for row in rows] == ["broker", "relay", "learner", "actor", "actor", "actor", "actor"]
    assert {row[2] for row in rows} == {"ready"}
    assert {row[4] for row in rows} <= {"node-1", "node-2"}
    release.wait(lambda: release.num_trained() > 0, "trained trajectory")


def test_the_scheduler_gave_everybody_the_gpus_that_were_asked_for(release: Release) -> None:
    gpus = {"learner": 4, "actor": 1}
    for pod in release.pods():
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        limits = pod["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits.get("nvidia.com/gpu", 0)) == gpus.get(component, 0)


def test_keys_were_made_by_a_job_whose_rights_are_gone(release: Release) -> None:
    assert set(secrets(release)) == {f"demo-keys-{identity}" for identity in IDENTITIES}
    rights = client.RbacAuthorizationV1Api(release.cluster.api)
    assert not rights.list_namespaced_role(release.namespace).items
    assert not rights.list_namespaced_role_binding(release.namespace).items


def test_what_the_api_made_of_the_pods_has_no_token_no_privilege_and_no_path_of_the_host(release: Release) -> None:
    pods = release.pods()
    assert len(pods) == ALL
    for pod in pods:
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        accounts = [v["secret"]["secretName"] for v in spec["volumes"] if "secret" in v]
        assert all(name.startswith("demo-keys-") for name in accounts), "a service account's token is mounted"
        assert not any("hostPath" in volume for volume in spec["volumes"])
        for container in spec["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not container["securityContext"].get("privileged", False)
            assert not any(port.get("hostPort") for port in container.get("ports", []))
        # The API server has asked about each of them before it took it (`admission.py`), as it is stored.
        assert violations(pod) == []


def test_the_account_of_the_pods_may_do_nothing(release: Release) -> None:
    """Asked of the API itself, as that account, for what an intruder would want."""
    account = f"system:serviceaccount:{release.namespace}:demo"
    for verb, resource in (("get", "secrets"), ("list", "pods"), ("create", "pods"), ("patch", "deployments")):
        words = ("auth", "can-i", verb, resource, "-n", release.namespace, "--as", account)
        assert release.cluster.run("kubectl", *words, check=False).stdout.strip() == "no"


def test_with_an_actors_secret_nobody_can_ack_inspect_or_be_of_another_run(release: Release, tmp_path: Path) -> None:
    """Whoever breaks out of an actor has what is mounted there, and the broker's address."""
    secret = release.cluster.nodes.read("Secret", release.namespace, "demo-keys-actor")
    for name, content in secret["data"].items():
        (tmp_path / name).write_bytes(base64.b64decode(content))
        (tmp_path / name).chmod(0o600)
    assert not [path for path in tmp_path.iterdir() if "learner" in path.name or "signing" in path.name]
    security = Security(Identity.ACTOR, read_pair(tmp_path, Identity.ACTOR), tmp_path)
    endpoint = f"tcp://{service_address(release.namespace, 'demo-broker')}:7700"
    for body in (Ack(request_id="r", ticket_ids=("demo/train/0/0",)), Inspect(request_id="r")):
        with raw_peer(endpoint, security, Identity.BROKER) as ask:
            ask(hello(Role.ACTOR, "demo"))
            with pytest.raises(ProtocolError) as caught:
                ask(body)
        assert caught.value.code is ErrorCode.WRONG_ROLE
    for role, run_id, code in (
        (Role.LEARNER, "demo", ErrorCode.WRONG_ROLE),
        (Role.ACTOR, "another", ErrorCode.WRONG_RUN),
    ):
        with raw_peer(endpoint, security, Identity.BROKER) as ask, pytest.raises(ProtocolError) as caught:
            ask(hello(role, run_id))
        assert caught.value.code is code


def test_logs_follow_what_is_said_and_who_comes_later(release: Release) -> None:
    words = (sys.executable, "-m", "deploy", "logs", "actor", "--follow", "--tail", "3", "--name", "demo")
    process = subprocess.Popen(
        [*words, "-n", release.namespace],
        stdout=subprocess.PIPE,
        text=True,
        env=release.cluster.environment,
    )
    said: set[str] = set()
    more = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.add(line.partition(": ")[0])
            more.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        names = {pod["metadata"]["name"] for pod in release.pods("actor")}
        release.wait(lambda: said >= names, "line of each actor")
        assert release.ergon("scale", "5").stdout == "actors: 4 -> 5\n"
        release.wait_ready(ALL + 1)
        (new,) = {pod["metadata"]["name"] for pod in release.pods("actor")} - names
        release.wait(lambda: new in said, "line of the new actor")
        assert {name for name in said if not name.startswith("demo-actor-")} == set()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        reader.join()
    assert release.ergon("scale", "4").stdout == "actors: 5 -> 4\n"
    release.wait_ready(ALL)
    assert "demo-broker-0: " in release.ergon("logs", "broker", "--tail", "2").stdout


def test_the_test_of_the_release_passes(release: Release) -> None:
    """`helm test`: the broker answers an operator, with the operator's key."""
    done = release.cluster.run("helm", "test", "demo", "-n", release.namespace)
    assert "Succeeded" in done.stdout


def test_an_upgrade_restarts_the_processes_and_keeps_run_and_keys(release: Release, tmp_path: Path) -> None:
    keys, trained = secrets(release), release.num_trained()
    before = {pod["metadata"]["uid"] for pod in release.pods()}
    changed = tmp_path / "changed.toml"
    changed.write_text(RUN.read_text().replace("max_num_seqs = 4", "max_num_seqs = 3"))
    release.up(file=changed)
    release.wait(lambda: not before & {pod["metadata"]["uid"] for pod in release.pods()}, "new pods")
    release.wait_ready(ALL)
    assert secrets(release) == keys
    release.wait(lambda: release.num_trained() > trained, "training that goes on")


def test_an_upgrade_that_cannot_start_is_rolled_back(release: Release) -> None:
    keys = secrets(release)
    release.up("images.actor=ergon-missing")
    release.wait(lambda: "ImagePullBackOff" in {row[2] for row in table(release)}, "image that is not there")
    # The half of the actors that may be missing at most is being replaced, and no more.
    assert release.ready("actor") >= 2
    release.cluster.run("helm", "rollback", "demo", "-n", release.namespace)
    release.wait(lambda: {row[2] for row in table(release)[1:]} == {"ready"}, "ready pods")
    release.wait_ready(ALL)
    assert secrets(release) == keys
    trained = release.num_trained()
    release.wait(lambda: release.num_trained() > trained, "training that goes on")


def test_a_mistake_of_an_operator_is_one_sentence_of_the_real_api(release: Release) -> None:
    done = release.cluster.ergon("status", "--name", "none", "-n", release.namespace, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no pod of a run 'none'" in done.stderr
    done = release.cluster.ergon("scale", "3", "--name", "none", "-n", release.namespace, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no run 'none'" in done.stderr


def test_down_ends_everything_and_up_goes_on_and_no_episode_is_lost(release: Release, tmp_path: Path) -> None:
    """The last of them: it also closes the books."""
    core, keys = release.cluster.core, secrets(release)
    release.ergon("down")
    release.wait(lambda: not release.cluster.list(release.namespace), "namespace without a pod")
    claims = {each.metadata.name for each in core.list_namespaced_persistent_volume_claim(release.namespace).items}
    assert claims == {"models", "data-demo-broker-0", "demo-learner"}
    assert secrets(release) == keys
    with pytest.raises(ApiException, match="Not Found"):
        client.AppsV1Api(release.cluster.api).read_namespaced_deployment("demo-actor", release.namespace)
    trained = release.num_trained()
    release.up()
    release.wait_ready(ALL)
    release.wait(lambda: release.num_trained() > trained, "training that goes on")
    release.finish()
    release.ergon("down")
    release.wait(lambda: not release.cluster.list(release.namespace), "namespace without a pod")
    verdict = release.books(tmp_path / "books")
    print(f"episodes issued={verdict.issued} trained={verdict.trained} lost={verdict.lost} twice={verdict.duplicated}")
    assert verdict.problems == []
    assert (verdict.lost, verdict.duplicated) == (0, 0)
    assert verdict.issued == verdict.trained > trained
    assert release.killed_actors() == []
