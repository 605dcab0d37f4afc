"""The chart renders what it must, for every profile, and refuses nonsense in a sentence."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from broker.process.config import load_settings
from broker.process.settings import GIVE_BACK_S
from deploy.monitoring.dashboards import DIRECTORY, HERE
from tests.cluster.rendering import (
    CHART,
    MATRIX,
    NAMESPACE,
    RELEASE,
    ROOT,
    RUN,
    TOOLS,
    Manifest,
    golden,
    helm,
    of_kind,
    pods,
    profile,
    render,
)

VERSIONS = ("1.34", "1.35", "1.36", "1.37")
GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", MATRIX)
def test_what_is_rendered_is_what_was_looked_at(name: str) -> None:
    assert golden(render(*MATRIX[name])) == (GOLDEN / f"{name}.yaml").read_text(), (
        "run: make chart-golden; look at the diff"
    )


@pytest.mark.parametrize("name", MATRIX)
def test_lint_finds_nothing(name: str) -> None:
    done = helm("lint", "--strict", str(CHART), *MATRIX[name])
    assert done.returncode == 0, done.stdout
    assert "WARN" not in done.stdout


def test_every_manifest_of_every_profile_fits_the_schemas() -> None:
    """Each different one once: profiles have most of them in common."""
    different = {json.dumps(m, sort_keys=True): m for arguments in MATRIX.values() for m in render(*arguments)}
    command = [TOOLS / "python", Path(__file__).parent / "check_manifests.py", *VERSIONS]
    given = json.dumps(list(different.values()))
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=250, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_a_manifest_that_is_wrong_is_found() -> None:
    """The judge's word is worth something, of Kubernetes' own kinds and of others'."""
    manifests = json.loads(json.dumps(render(*MATRIX["many-nodes"])))
    for manifest in manifests:
        if manifest["kind"] in ("ScaledObject", "Deployment", "PodMonitor"):
            manifest["spec"]["colour"] = "red"
        if manifest["kind"] == "JobSet":
            manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0].pop("name")
    manifests.append({"apiVersion": "example.org/v1", "kind": "Unknown", "metadata": {"name": "x"}})
    command = [TOOLS / "python", Path(__file__).parent / "check_manifests.py", "1.37"]
    done = subprocess.run(command, input=json.dumps(manifests), capture_output=True, text=True, timeout=120, check=True)
    for kind in ("ScaledObject", "Deployment", "PodMonitor", "JobSet", "Unknown"):
        assert f"{kind} " in done.stdout


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([], "give the run's TOML with --set-file run.config=FILE"),
        (["run.existingConfigMap=x"], "a run has one TOML"),
        (["learner.nodes=2", "learner.gpus=8"], "learner.storage.accessMode must be ReadWriteMany, not ReadWriteOnce"),
        (["learner.nodes=2", "learner.storage.accessMode=ReadWriteMany"], "several nodes train with GPUs only"),
        (
            ["actors.scaling.mode=keda", "actors.scaling.min=9"],
            "actors.scaling.min = 9 is more than actors.scaling.max",
        ),
        (["actors.scaling.mode=hpa", "monitoring.interval=11s"], "too few samples, since they look back for 30 s"),
        (["actors.scaling.mode=keda", "monitoring.interval=1m"], "it must be 10s or less, or the mode fixed"),
        (["model.path=x"], "model.existingClaim names none"),
        (["actors.seccompProfile.type=Localhost"], "name the profile's file on the nodes"),
        (["sandboxes.runtimeClass.name=gvisor"], "has no handler"),
        (["sandboxes.actors=true"], "there is no namespace for them; set sandboxes.create=true"),
        (["actors.seccompProfile.type=Unconfined"], "actors/seccompProfile/type"),
        (["actors.replicas=-1"], "actors/replicas"),
        (["actor.replicas=1"], "actor"),
        (["broker.storage.size=large"], "broker/storage/size"),
        (["run.env.LEARNER__NUM_STEPS=1"], "run/env"),
        (["relays.levels={}"], "relays/levels"),
        (["learner.workload=Deployment"], "learner/workload"),
    ],
)
def test_nonsense_is_refused_with_the_value_s_name(values: list[str], sentence: str) -> None:
    sets = [argument for value in values for argument in ("--set", value)]
    done = helm("template", RELEASE, str(CHART), *(RUN if sets else ()), *sets)
    assert done.returncode != 0
    assert sentence in done.stderr.replace(".", "/") or sentence in done.stderr


def environment(spec: Manifest) -> dict[str, str]:
    (container,) = spec["containers"]
    return {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}


@pytest.mark.parametrize("name", ["cpu", "one-gpu", "eight-gpus", "many-nodes", "hpa", "pods"])
def test_the_processes_read_the_toml_of_a_laptop_and_find_each_other(name: str, tmp_path: Path) -> None:
    """What each pod's environment makes of the TOML, by the code that reads it there."""
    manifests = render(*MATRIX[name])
    (config,) = (m for m in of_kind(manifests, "ConfigMap") if "run.toml" in m["data"])
    given = ROOT / "deploy" / "runs" / "quickstart.toml"
    assert tomllib.loads(config["data"]["run.toml"]) == tomllib.loads(given.read_text())
    services = {m["metadata"]["name"] for m in of_kind(manifests, "Service")}
    for pod, labels, spec in pods(manifests):
        if labels["app.kubernetes.io/component"] in ("keys", "costs"):
            continue
        settings = load_settings(given, environ=environment(spec))
        assert settings.security.mode == "curve", pod
        assert settings.run.name == RELEASE
        hosts = {settings.broker.host, settings.weights.host, settings.weights.relay_host} - {"0.0.0.0", "127.0.0.1"}
        assert {host.rpartition(".")[2] for host in hosts} <= services, pod
        assert settings.sampling == load_settings(given, environ={}).sampling


@pytest.mark.parametrize("name", MATRIX)
def test_an_actor_has_time_to_drain(name: str) -> None:
    (spec,) = (
        spec for _, labels, spec in pods(render(*MATRIX[name])) if labels["app.kubernetes.io/component"] == "actor"
    )
    drain_s = float(environment(spec)["ERGON__ACTOR__DRAIN_S"])
    assert spec["terminationGracePeriodSeconds"] >= drain_s + GIVE_BACK_S + 5


def test_actors_make_room_and_what_holds_the_state_does_not() -> None:
    manifests = render(*MATRIX["many-nodes"])
    made = {m["metadata"]["name"]: m["value"] for m in of_kind(manifests, "PriorityClass")}
    for _, labels, spec in pods(manifests):
        component = labels["app.kubernetes.io/component"]
        if component in ("broker", "relay", "learner"):
            assert made[spec["priorityClassName"]] > 0
        elif component == "actor":
            assert made[spec["priorityClassName"]] < 0


def test_actors_are_scaled_by_one_thing_alone() -> None:
    for name, scaler in (("cpu", None), ("many-nodes", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler")):
        manifests = render(*MATRIX[name])
        found = of_kind(manifests, "ScaledObject") + of_kind(manifests, "HorizontalPodAutoscaler")
        assert [m["kind"] for m in found] == ([scaler] if scaler else [])
        (actors,) = (m for m in of_kind(manifests, "Deployment") if m["metadata"]["name"] == f"{RELEASE}-actor")
        assert ("replicas" in actors["spec"]) == (scaler is None)


def test_the_query_of_the_scaler_is_a_recording_rule() -> None:
    (scaler,) = of_kind(render(*MATRIX["many-nodes"]), "ScaledObject")
    query = scaler["spec"]["triggers"][0]["metadata"]["query"]
    groups = yaml.safe_load((HERE / "rules" / "recording.yml").read_text())["groups"]
    recorded = {rule["record"] for group in groups for rule in group["rules"]}
    assert query.removeprefix("max(").partition("{")[0] in recorded
    assert f'namespace="{NAMESPACE}",run="{RELEASE}"' in query


def test_rules_and_dashboards_are_those_of_the_repository() -> None:
    manifests = render(*MATRIX["eight-gpus"])
    (rule,) = of_kind(manifests, "PrometheusRule")
    groups = [yaml.safe_load(path.read_text())["groups"] for path in sorted((HERE / "rules").glob("*.yml"))]
    assert rule["spec"]["groups"] == [group for each in groups for group in each]
    boards = {
        name: text for m in of_kind(manifests, "ConfigMap") for name, text in m["data"].items() if name.endswith("json")
    }
    assert {name: json.loads(text) for name, text in boards.items()} == {
        path.name: json.loads(path.read_text()) for path in DIRECTORY.glob("*.json")
    }


@pytest.mark.parametrize("name", ["cpu", "many-nodes"])
def test_an_upgrade_changes_nothing_that_cannot_be_changed(name: str) -> None:
    """Selectors, volume claims and services' names stay, whatever an upgrade brings; so a rollback finds them, too."""

    def fixed(manifests: tuple[Manifest, ...]) -> dict[str, object]:
        kept: dict[str, object] = {}
        for m in manifests:
            key = f"{m['kind']}/{m['metadata']['name']}"
            if m["kind"] == "StatefulSet":
                kept[key] = [
                    m["spec"][part] for part in ("selector", "serviceName", "podManagementPolicy") if part in m["spec"]
                ]
                kept[f"{key}/claims"] = m["spec"].get("volumeClaimTemplates")
            elif m["kind"] == "Deployment":
                kept[key] = m["spec"]["selector"]
            elif m["kind"] == "PersistentVolumeClaim":
                kept[key] = [m["spec"]["accessModes"], m["metadata"]["annotations"]["helm.sh/resource-policy"]]
        return kept

    later = (
        "--is-upgrade",
        "--set",
        "images.tag=9.9.9",
        "--set",
        "actors.drainSeconds=33",
        "--set",
        "relays.levels={3}",
    )
    other = ("--set-file", f"run.config={ROOT / 'deploy' / 'runs' / 'thinking.toml'}")
    before, after = render(*MATRIX[name]), render(*RUN, *profile(name), *other, *later)
    assert {key: fixed(before)[key] for key in fixed(after)} == fixed(after)
    restarted = [
        a["metadata"]["name"]
        for kind in ("StatefulSet", "Deployment")
        for b, a in zip(of_kind(before, kind), of_kind(after, kind), strict=False)
        if b["spec"]["template"] != a["spec"]["template"]
    ]
    assert f"{RELEASE}-actor" in restarted
