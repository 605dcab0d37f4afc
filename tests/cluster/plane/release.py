"""A run on the played cluster, looked after as an operator would: by `ergon`, helm and kubectl. And its books."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kubernetes import client
from kubernetes.client.rest import ApiException

from broker.process.config import load_settings
from tests.chaos.verdict import Verdict, judge
from tests.cluster.plane.admission import LABEL
from tests.cluster.plane.control import ControlPlane
from tests.cluster.plane.front import Front
from tests.cluster.plane.network import Object, is_ready
from tests.cluster.plane.nodes import Nodes
from tests.cluster.plane.simulated_learner import FINISH, FINISHED, PACE
from tests.cluster.rendering import ROOT, TOOLS

HERE = Path(__file__).parent
RUN = HERE / "run.toml"
VALUES = HERE / "values.yaml"
CONFLICT = 409


def simulated(words: str) -> str:
    """Simulations in the place of the programs that need an engine or a model; see `Nodes`."""
    words = words.replace("-m\0actors\0", "-m\0tests.cluster.plane.simulated_actor\0")
    return words.replace("-m learner ", "-m tests.cluster.plane.simulated_learner ")


class Cluster:
    """All parts together, and what speaks to them."""

    def __init__(self, plane: ControlPlane, front: Front, nodes: Nodes, directory: Path) -> None:
        self.plane, self.front, self.nodes, self.directory = plane, front, nodes, directory
        self.api = plane.api()
        self.core = client.CoreV1Api(self.api)
        homes = {f"HELM_{name}_HOME": str(directory / "helm" / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        path = f"{TOOLS}:{os.environ['PATH']}"
        self.environment = os.environ | homes | {"KUBECONFIG": str(front.kubeconfig), "PATH": path}

    def run(self, *words: str, check: bool = True, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a program of an operator's."""
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout_s, check=False, env=self.environment, cwd=ROOT
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done

    def ergon(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the `ergon` command."""
        return self.run(sys.executable, "-m", "deploy", *words, check=check)

    def list(self, namespace: str, selector: str = "") -> list[Object]:
        """The pods of a namespace."""
        reply = self.core.list_namespaced_pod(namespace, label_selector=selector, _preload_content=False)
        found: list[Object] = json.loads(reply.data)["items"]
        return found


class Release:
    """The run `demo` in a namespace of its own, which takes no pod that breaks PodSecurity `restricted`."""

    name = "demo"

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        try:
            cluster.core.create_namespace({"metadata": {"name": namespace, "labels": LABEL}})
        except ApiException as error:
            if error.status != CONFLICT:
                raise
        claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
        cluster.core.create_namespaced_persistent_volume_claim(
            namespace, {"metadata": {"name": "models"}, "spec": claim}
        )

    def ergon(self, command: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`ergon COMMAND --name demo -n NAMESPACE ...`."""
        return self.cluster.ergon(command, *words, "--name", self.name, "-n", self.namespace, check=check)

    def up(self, *sets: str, file: Path = RUN, profile: str = "eight-gpus") -> None:
        """`ergon up`, with these values set."""
        more = [word for each in sets for word in ("--set", each)]
        self.ergon("up", str(file), "--profile", profile, "--values", str(VALUES), *more)

    def pods(self, component: str = "") -> list[Object]:
        """Those that are not ending."""
        selector = f"app.kubernetes.io/component={component}" if component else ""
        found = self.cluster.list(self.namespace, f"app.kubernetes.io/instance={self.name},{selector}".rstrip(","))
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def ready(self, component: str = "") -> int:
        """How many are ready."""
        return sum(is_ready(pod) for pod in self.pods(component))

    def wait_ready(self, num: int, timeout_s: float = 180) -> float:
        """Wait until so many pods are there and all are ready; the seconds."""
        return self.wait(lambda: len(self.pods()) == num == self.ready(), f"{num} ready pods", timeout_s)

    def wait(self, met: Callable[[], bool], what: str, timeout_s: float = 180) -> float:
        """Wait for something; the seconds. Fails with what is there instead."""
        begun = time.monotonic()
        while not met():
            if time.monotonic() - begun > timeout_s:
                shown = self.ergon("status", check=False)
                raise AssertionError(f"no {what} within {timeout_s:g} s:\n{shown.stdout}{shown.stderr}{self._logs()}")
            time.sleep(0.25)
        return time.monotonic() - begun

    def _logs(self) -> str:
        """The ends of the logs of what is not ready."""
        told = []
        for pod in self.pods():
            if not is_ready(pod):
                log = self.cluster.nodes.directory.glob(f"pods/{self.namespace}_{pod['metadata']['name']}_*/*.log")
                told += [f"--- {path}\n{path.read_text()[-2000:]}" for path in log]
        return "\n".join(told)

    def _folder(self, claim: str) -> Path:
        return self.cluster.nodes.claim(self.namespace, claim) / self.name

    def pace(self, word: str) -> None:
        """Seconds that a step of the learner takes from now on, or `finish`."""
        path = self._folder("demo-learner") / PACE
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".new")
        draft.write_text(word)
        draft.rename(path)

    def num_trained(self) -> int:
        """Trajectories in the learner's audit."""
        path = self._folder("demo-learner") / "trained.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def finish(self) -> None:
        """Let the learner issue nothing more and train on what was issued."""
        self.pace(FINISH)
        self.wait((self._folder("demo-learner") / FINISHED).exists, "end of the run", 240)

    def books(self, directory: Path) -> Verdict:
        """What became of every ticket that was issued, by the learner's audit, its checkpoint and the broker's store.
        Only after the processes have ended."""
        run_dir = directory / self.name
        shutil.copytree(self._folder("demo-learner"), run_dir)
        shutil.copytree(self._folder("data-demo-broker-0") / "broker", run_dir / "broker")
        issued = json.loads((run_dir / FINISHED).read_text())["issued"]
        settings = load_settings(RUN, [f"run.directory={directory}"])
        groups = {"num_steps": issued // settings.learner.group_size, "groups_per_step": 1}
        settings = settings.model_copy(update={"learner": settings.learner.model_copy(update=groups)})
        verdict = judge(settings)
        folders = self.cluster.nodes.directory.glob(f"pods/{self.namespace}_*/volumes/*/{self.name}/violations.jsonl")
        verdict.problems += [f"violations: {path.read_text()}" for path in folders]
        return verdict

    def killed_actors(self) -> list[str]:
        """Those whose process did not end within its grace period."""
        pods = [pod for pod in list(self.cluster.nodes.pods.values()) if pod.namespace == self.namespace and pod.killed]
        return [pod.pod_name for pod in pods if pod.pod_name.startswith("demo-actor-")]

    def scale_of_actors(self) -> int:
        """How many are asked for."""
        apps = client.AppsV1Api(self.cluster.api)
        return int(apps.read_namespaced_deployment_scale("demo-actor", self.namespace).spec.replicas or 0)
