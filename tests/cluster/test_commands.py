"""`ergon up | status | logs | scale | down`: the real helm renders, the real client speaks to an API that is played."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from tests.cluster.rendering import ROOT, TOOLS

RUN = ROOT / "deploy" / "runs" / "quickstart.toml"


class Api(ThreadingHTTPServer):
    """Answers what a cluster with the run `demo` in the namespace `rl` would."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replicas = 2
        self.autoscaled = False
        self.pods = [
            pod("demo-actor-x", "actor", waiting="ImagePullBackOff"),
            pod("demo-broker-0", "broker", ready=True, restarts=3),
            pod("demo-learner-0", "learner"),
        ]

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        """(status, JSON or text)."""
        if path == "/api/v1/namespaces/rl/pods":
            assert "app.kubernetes.io/instance=demo" in query["labelSelector"][0]
            return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self.pods}
        if path.endswith("/demo-broker-0/log"):
            return 200, f"one\ntwo of {query['tailLines'][0]}\n"
        if path == "/apis/autoscaling/v2/namespaces/rl/horizontalpodautoscalers":
            target = {"scaleTargetRef": {"kind": "Deployment", "name": "demo-actor"}, "maxReplicas": 2}
            items = [{"metadata": {"name": "x"}, "spec": target}] if self.autoscaled else []
            return 200, {"kind": "HorizontalPodAutoscalerList", "metadata": {}, "items": items}
        if path == "/apis/apps/v1/namespaces/rl/deployments/demo-actor/scale":
            if method == "PATCH":
                self.replicas = body["spec"]["replicas"]
            return 200, {"metadata": {"name": "demo-actor"}, "spec": {"replicas": self.replicas}}
        if path == "/api/v1/namespaces/other/pods":
            return 200, {"kind": "PodList", "metadata": {}, "items": []}
        return 404, {"kind": "Status", "reason": "NotFound", "code": 404}


def pod(name: str, component: str, *, ready: bool = False, restarts: int = 0, waiting: str = "") -> dict[str, Any]:
    state = {"waiting": {"reason": waiting}} if waiting else {"running": {}}
    container = {
        "name": component,
        "ready": ready,
        "restartCount": restarts,
        "image": "x",
        "imageID": "",
        "state": state,
    }
    return {
        "metadata": {"name": name, "labels": {"app.kubernetes.io/component": component}},
        "spec": {"nodeName": "node-1", "containers": [{"name": component}]},
        "status": {"phase": "Running", "containerStatuses": [container]},
    }


class _Handler(BaseHTTPRequestHandler):
    server: Api

    def _do(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        status, answer = self.server.answer(self.command, parts.path, parse_qs(parts.query), body)
        text = answer if isinstance(answer, str) else json.dumps(answer)
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_PATCH = _do

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
        """Quiet."""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    with Api() as api:
        threading.Thread(target=api.serve_forever, daemon=True).start()
        here = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{api.server_address[1]}"}}
        context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
        config = {"clusters": [here], "contexts": [context], "users": [{"name": "me", "user": {}}]}
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(config | {"current-context": "here", "apiVersion": "v1", "kind": "Config"}))
        monkeypatch.setenv("KUBECONFIG", str(path))
        monkeypatch.setenv("PATH", f"{TOOLS}:{os.environ['PATH']}")
        yield api
        api.shutdown()


def ergon(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def in_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return ergon(*arguments, "--name", "demo", "-n", "rl")


def test_up_renders_this_toml_with_the_real_helm(cluster: Api) -> None:
    done = in_demo("up", str(RUN), "--profile", "one-gpu", "--set", "actors.replicas=3", "--dry-run")
    assert done.returncode == 0, done.stderr
    manifests = [each for each in yaml.safe_load_all(done.stdout) if each]
    (actors,) = (m for m in manifests if m["kind"] == "Deployment" and m["metadata"]["name"] == "demo-actor")
    assert actors["spec"]["replicas"] == 3
    (config,) = (m for m in manifests if m["metadata"]["name"] == "demo-run")
    assert "careless" in config["data"]["run.toml"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("up", str(RUN), "--profile", "huge"), "known are cpu, eight-gpus, many-nodes, one-gpu"),
        (("up", "/no/such.toml"), "the run file /no/such.toml does not exist"),
        (("up", str(RUN), "--dry-run", "--set", "learner.nodes=2"), "learner.storage.accessMode must be ReadWriteMany"),
        (("scale", "-1"), "-1 actors cannot be"),
        (("status", "-n", "other"), "namespace other has no pod of a run 'demo'"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: tuple[str, ...], sentence: str, cluster: Api) -> None:
    done = ergon(arguments[0], "--name", "demo", *(("-n", "rl") if "-n" not in arguments else ()), *arguments[1:])
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_status_is_a_table_that_says_what_a_pod_waits_for(cluster: Api) -> None:
    rows = [line.split() for line in in_demo("status").stdout.splitlines()]
    assert rows == [
        ["component", "pod", "state", "restarts", "node"],
        ["broker", "demo-broker-0", "ready", "3", "node-1"],
        ["learner", "demo-learner-0", "Running", "0", "node-1"],
        ["actor", "demo-actor-x", "ImagePullBackOff", "0", "node-1"],
    ]


def test_logs_say_whose_they_are(cluster: Api) -> None:
    assert in_demo("logs", "broker", "--tail", "7").stdout.splitlines() == [
        "demo-broker-0: one",
        "demo-broker-0: two of 7",
    ]
    assert "demo-actor-x: (no log: Not Found)" in in_demo("logs").stdout


def test_logs_follow_a_container_that_is_started_again_until_the_run_is_gone(cluster: Api) -> None:
    command = [sys.executable, "-m", "deploy", "logs", "broker", "--follow", "--name", "demo", "-n", "rl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "demo-broker-0: one\n"
        assert process.stdout.readline() == "demo-broker-0: two of 100\n"
        cluster.pods[1] = pod("demo-broker-0", "broker", ready=True, restarts=4)
        assert process.stdout.readline() == "demo-broker-0: one\n"
        cluster.pods = []
        assert process.stdout.read() == "demo-broker-0: two of 100\n"
        assert process.wait(30) == 0


def test_scale_sets_the_number_and_leaves_it_to_an_autoscaler(cluster: Api) -> None:
    assert in_demo("scale", "5").stdout == "actors: 2 -> 5\n"
    assert cluster.replicas == 5
    cluster.autoscaled = True
    done = in_demo("scale", "1")
    assert (done.returncode, cluster.replicas) == (2, 5)
    assert "are scaled automatically" in done.stderr
