"""The chart, rendered by the real helm, for a matrix of values. Knows no test."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "deploy" / "chart"
TOOLS: Final = ROOT / ".venv" / "cluster" / "bin"
RELEASE, NAMESPACE = "demo", "rl"
RUN: Final = ("--set-file", f"run.config={ROOT / 'deploy' / 'runs' / 'quickstart.toml'}")

Manifest = dict[str, Any]


def profile(name: str) -> tuple[str, ...]:
    """helm's arguments for a profile."""
    return ("-f", str(CHART / "profiles" / f"{name}.yaml"))


MATRIX: Final[dict[str, tuple[str, ...]]] = {
    "cpu": (*RUN, *profile("cpu")),
    "one-gpu": (*RUN, *profile("one-gpu")),
    "eight-gpus": (*RUN, *profile("eight-gpus")),
    "many-nodes": (*RUN, *profile("many-nodes")),
    "hpa": (*RUN, *profile("one-gpu"), "--set", "actors.scaling.mode=hpa", "--set", "actors.scaling.max=3"),
    "pods": (*RUN, *profile("one-gpu"), "--set", "sandboxes.create=true", "--set", "sandboxes.actors=true"),
    "own-everything": (
        *("--set", "run.existingConfigMap=mine", "--set", "run.name=other", "--set", "keys.create=false"),
        *("--set", "keys.secretPrefix=kept", "--set", "model.existingClaim=models", "--set", "model.path=smollm2"),
        *("--set", "images.registry=registry.example/ergon", "--set", "images.tag=1.2.3"),
        *("--set", "images.pullSecrets[0].name=pull", "--set", "relays.levels={1,2,4}"),
        *("--set", "learner.nodes=2", "--set", "learner.gpus=8", "--set", "learner.storage.accessMode=ReadWriteMany"),
        *("--set", "actors.seccompProfile.type=Localhost", "--set", "actors.runtimeClassName=kata"),
        *("--set", "actors.seccompProfile.localhostProfile=ergon/bubblewrap.json"),
        *("--set-string", "run.env.ERGON__LEARNER__NUM_STEPS=100"),
    ),
}


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm."""
    return subprocess.run([TOOLS / "helm", *arguments], capture_output=True, text=True, timeout=120, check=False)


@functools.cache
def render(*arguments: str) -> tuple[Manifest, ...]:
    """The manifests of a release, hooks and tests included."""
    done = helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, *arguments)
    assert done.returncode == 0, done.stderr
    return tuple(manifest for manifest in yaml.safe_load_all(done.stdout) if manifest)


def golden(manifests: tuple[Manifest, ...]) -> str:
    """The text of a golden file: everything but the contents of dashboards and rules, which other tests compare."""
    shown = []
    for manifest in manifests:
        if manifest["kind"] == "PrometheusRule":
            manifest = manifest | {"spec": _digest(manifest["spec"])}
        if manifest["kind"] == "ConfigMap":
            manifest = manifest | {"data": {name: _digest(text) for name, text in manifest["data"].items()}}
        shown.append(manifest)
    return yaml.safe_dump_all(shown, sort_keys=True, width=120)


def _digest(value: Any) -> str:
    return hashlib.sha256(yaml.safe_dump(value, sort_keys=True).encode()).hexdigest()[:16]


def pods(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """(name, labels, spec) of every pod that a manifest describes."""
    for manifest in manifests:
        name, spec = f"{manifest['kind']}/{manifest['metadata']['name']}", manifest.get("spec", {})
        if manifest["kind"] == "Pod":
            yield name, manifest["metadata"]["labels"], spec
        elif manifest["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield name, spec["template"]["metadata"]["labels"], spec["template"]["spec"]
        elif manifest["kind"] == "JobSet":
            for job in spec["replicatedJobs"]:
                template = job["template"]["spec"]["template"]
                yield f"{name}/{job['name']}", template["metadata"]["labels"], template["spec"]


def of_kind(manifests: tuple[Manifest, ...], kind: str) -> list[Manifest]:
    """All of a kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def main() -> None:
    """Rewrite the golden files."""
    directory = Path(__file__).parent / "golden"
    for name, arguments in MATRIX.items():
        (directory / f"{name}.yaml").write_text(golden(render(*arguments)), encoding="utf-8")


if __name__ == "__main__":
    main()
