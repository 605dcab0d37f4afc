"""Judges rendered manifests: `python check_manifests.py VERSION... < manifests.json`; one line for each fault.

Runs in the environment that tools.sh makes and imports nothing of Ergon. Kubernetes' own kinds are validated against
the schemas of the versions named; custom resources against their models, and the pods within a JobSet as those of a
Job. A kind that nothing here knows is a fault.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule
from pydantic import ValidationError

MODELS = {
    ("keda.sh/v1alpha1", "ScaledObject"): ScaledObject,
    ("monitoring.coreos.com/v1", "PodMonitor"): PodMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PrometheusRule,
}
JOBSET_KEYS = {"network", "failurePolicy", "replicatedJobs", "successPolicy", "startupPolicy", "suspend"}


def faults(manifest: dict[str, Any], versions: list[str]) -> Iterator[str]:
    """What is wrong with a manifest."""
    kind = (manifest["apiVersion"], manifest["kind"])
    if kind in MODELS:
        yield from _model_faults(manifest, MODELS[kind])
    elif kind[1] == "JobSet":
        yield from _jobset_faults(manifest, versions)
    else:
        for version in versions:
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{version}: {error.message} at {'.'.join(map(str, error.path))}"
            except (
                kubernetes_validate.SchemaNotFoundError,
                kubernetes_validate.utils.VersionNotSupportedError,
            ) as error:
                yield f"{version}: {error}"


def _model_faults(manifest: dict[str, Any], model: Any) -> Iterator[str]:
    try:
        kept = json.loads(model.model_validate(manifest).model_dump_json(by_alias=True, exclude_none=True))
    except ValidationError as error:
        yield str(error)
        return
    # The models drop what they do not know; whatever is lost was no field.
    yield from (f"unknown field {path}" for path in _lost(manifest, kept, ""))


def _lost(given: Any, kept: Any, path: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key not in kept:
                yield f"{path}.{key}"
            else:
                yield from _lost(value, kept[key], f"{path}.{key}")
    elif isinstance(given, list) and isinstance(kept, list):
        for index, (left, right) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(left, right, f"{path}[{index}]")


def _jobset_faults(manifest: dict[str, Any], versions: list[str]) -> Iterator[str]:
    if unknown := set(manifest["spec"]) - JOBSET_KEYS:
        yield f"unknown fields of a JobSet: {unknown}"
    for each in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": each["name"]}, **each["template"]}
        yield from faults(job, versions)


def main() -> None:
    """Judge what comes in."""
    for manifest in json.load(sys.stdin):
        for fault in faults(manifest, sys.argv[1:]):
            print(f"{manifest['kind']} {manifest['metadata']['name']}: {fault}")


if __name__ == "__main__":
    main()
