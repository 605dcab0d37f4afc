"""What a sandbox's pod asks for, and what is made of Kubernetes' refusals; without a cluster."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import tarfile

import pytest

from broker.process.config import load_settings
from broker.process.lifecycle import ErgonError
from envs.sandbox.limits import Limits
from envs.sandbox.pods.manifest import PodSettings, divide, label, make_manifest, memory_bytes
from envs.sandbox.pods.refusals import refusal, why_ended
from envs.sandbox.pods.session import _meaning


def test_a_pod_has_no_privilege_a_user_of_its_own_and_an_end() -> None:
    settings = PodSettings(
        namespace="boxes", runtime_class="gvisor", run="a run", actor="host-0", owner=("actor", "1-2")
    )
    made = [make_manifest(settings, Limits(), {}) for _ in range(20)]
    spec = made[0]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["restartPolicy"] == "Never"
    assert spec["activeDeadlineSeconds"] == settings.life_s
    assert spec["runtimeClassName"] == "gvisor"
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert {"cpu", "memory", "ephemeral-storage"} == container["resources"]["limits"].keys()
    assert all(int(volume["emptyDir"]["sizeLimit"]) > 0 for volume in spec["volumes"])
    metadata = made[0]["metadata"]
    assert metadata["ownerReferences"][0]["uid"] == "1-2"
    assert metadata["labels"]["ergon.dev/run"] == label("a run")
    assert metadata["labels"]["ergon.dev/actor"] == "host-0"
    assert len({each["spec"]["securityContext"]["runAsUser"] for each in made}) == 20
    assert len({each["metadata"]["name"] for each in made}) == 20


def test_immutable_files_are_a_read_only_volume_that_is_filled_before() -> None:
    files = {"/opt/a/one": b"1" * 200_000, "/opt/a/b/two": b"2", "/tests/three": b"3"}
    spec = make_manifest(PodSettings(), Limits(), files)["spec"]
    mounts = {each["mountPath"]: each for each in spec["containers"][0]["volumeMounts"]}
    assert mounts.keys() == {"/workspace", "/tmp", "/opt/a", "/tests"}
    assert all(mounts[path]["readOnly"] for path in ("/opt/a", "/tests"))
    variables = {each["name"]: each["value"] for each in spec["initContainers"][0]["env"]}
    text = "".join(variables[f"ERGON_FILES_{number}"] for number in range(int(variables["ERGON_FILES"])))
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(base64.b64decode(text)))) as tar:
        found = {f"/{member.name}": tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert found == files


def test_files_that_a_pod_cannot_take_are_refused() -> None:
    assert divide({"a": b"1", "/tmp/b": b"2", "/opt/c": b"3"}) == (
        {"/workspace/a": b"1", "/tmp/b": b"2"},
        {"/opt/c": b"3"},
    )
    for path in ("/etc/passwd", "/usr/libexec/ergon/python", "/top"):
        with pytest.raises(ValueError, match="image has its own files"):
            divide({path: b""})
    with pytest.raises(ValueError, match="packed; a pod takes"):
        make_manifest(PodSettings(), Limits(), {"/opt/big": random.Random(0).randbytes(1_000_000)})


def test_a_pods_memory_is_what_its_limits_need_or_the_bound() -> None:
    small = Limits(processes=2, memory_bytes=64 << 20, work_bytes=1 << 20, tmp_bytes=1 << 20)
    assert memory_bytes(PodSettings(memory_mb=1024), small) == (2 * 64 + 1 + 1 + 64) << 20
    assert memory_bytes(PodSettings(memory_mb=512), Limits()) == 512 << 20


@pytest.mark.parametrize("text", ["run", "a run!", "-x-", "r" * 128, "", "ü"])
def test_labels_are_such_as_kubernetes_takes(text: str) -> None:
    made = label(text)
    assert len(made) <= 63
    assert all(letter.isascii() and (letter.isalnum() or letter in "._-") for letter in made)
    assert not made or (made[0].isalnum() and made[-1].isalnum())
    assert (made == text) == (text in ("run", ""))


@pytest.mark.parametrize(
    ("status", "message", "sentence"),
    [
        (
            403,
            'pods is forbidden: User "x" cannot create resource "pods"',
            "may not create pods in the namespace 'boxes'",
        ),
        (403, 'pods "x" is forbidden: exceeded quota: sandboxes', r"raise sandboxes\.maxPods"),
        (403, 'pods "x" is forbidden: violates PodSecurity "restricted:latest": seccomp', "PodSecurity level refuses"),
        (403, 'pods "x" is forbidden: maximum memory usage per Container is 1Gi', r"lower sandboxes\.cpu"),
        (
            403,
            "x is forbidden: unable to create new content in namespace x because it is being terminated",
            "being deleted",
        ),
        (404, 'namespaces "boxes" not found', r"sandboxes\.create=true"),
        (401, "Unauthorized", "renew its credentials"),
        (422, 'Pod "x" is invalid: spec.runtimeClassName', "is invalid: spec.runtimeClassName"),
    ],
)
def test_a_refusal_is_one_sentence_with_the_remedy(status: int, message: str, sentence: str) -> None:
    error = refusal(status, json.dumps({"kind": "Status", "message": message}), "create", "pods", "boxes")
    assert str(error).count("\n") == 0
    with pytest.raises(type(error), match=sentence):
        raise error


def test_why_a_session_or_a_pod_ended_is_told_apart() -> None:
    killed = {"status": "Failure", "details": {"causes": [{"reason": "ExitCode", "message": "137"}]}}
    assert _meaning(json.dumps(killed), "") == ("its session ended with status 137", True)
    crashed = {"status": "Failure", "details": {"causes": [{"reason": "ExitCode", "message": "1"}]}}
    assert _meaning(json.dumps(crashed), "Traceback\nKeyError")[1] is False
    assert _meaning('{"status": "Failure", "message": "container not running"}', "")[1] is False
    assert _meaning("nonsense", "")[1] is False
    evicted = {"status": {"phase": "Failed", "reason": "Evicted", "message": "the node was low on memory"}}
    assert why_ended(evicted) == "Evicted: the node was low on memory"


def test_a_pod_must_live_longer_than_an_episode() -> None:
    overrides = ['environments=[{name="terminal", options={sandbox="pod"}}]', "sandboxes.life_s=200"]
    with pytest.raises(ErgonError, match=r"sandboxes\.life_s = 200 is less than twice sampling\.deadline_s = 120"):
        load_settings(None, overrides, environ={})
    assert load_settings(None, ["sandboxes.life_s=200"], environ={}).sandboxes.life_s == 200
