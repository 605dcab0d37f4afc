"""What publishing costs a learner's step: real DeepSpeed steps on a batch like the quick start's, published by the
learner's own publisher. And the pause of sampling: a real engine that adopts real versions with requests in flight.

Both run in a process of their own, because DeepSpeed and vLLM each change torch in the process that imports them:
`python -m tests.bench.weightchannel.step learner|engine ...` prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from prometheus_client import REGISTRY

from broker.process.config import load_settings
from broker.protocol.trajectory import PolicyVersion, Sampling
from broker.protocol.weights import TensorSpec, describe, safetensors_header
from tests.bench.weight_versions import MODEL, MODEL_CACHE, read_snapshot, versions
from tests.ports import port_overrides

RUN_FILE = Path("deploy/runs/quickstart.toml")
TURN_TOKENS = 96
MARK = "RESULT "


class Step(NamedTuple):
    """Medians over steps after the first. `publish_s`: what Publisher.publish says it took, deltas only."""

    step_s: float
    publish_s: float
    num_sequences: int
    num_tokens: int
    learning_rate: float
    changed_fraction: float  # of the elements, by the last step

    @property
    def fraction(self) -> float:
        """Of a step that publishing takes."""
        return self.publish_s / self.step_s


class Pause(NamedTuple):
    """Sampling's pause at each adoption, milliseconds."""

    pauses_ms: list[float]
    adopt_s: float  # median, from the call until it returned
    in_flight: int
    mode: str

    @property
    def median_ms(self) -> float:
        """The middle one."""
        return statistics.median(self.pauses_ms)


def learner_step(num_steps: int) -> Step:
    """Measure it in a process of its own."""
    return Step(**_run("learner", str(num_steps)))


def engine_pause(directory: Path, learning_rate: float, num_versions: int, adoptions: int, mode: str) -> Pause:
    """Measure it in a process of its own."""
    return Pause(**_run("engine", str(directory), str(learning_rate), str(num_versions), str(adoptions), mode))


def _run(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.weightchannel.step", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return answer


# --- the learner ----------------------------------------------------------------------------------------------------


def play_learner(num_steps: int) -> Step:
    """Steps and publications in turn. The loss is the warm start's: nobody sampled these episodes, so the policy loss
    would mask them. It costs the same, but for a few operations a token."""
    from learner.losses.policy import supervised_loss
    from learner.model import prepare_model
    from learner.publisher import Publisher
    from learner.training.deepspeed_engine import DeepSpeedEngine

    settings = load_settings(RUN_FILE, port_overrides())
    model = prepare_model(settings.model.path, settings.model.cache)
    settings = load_settings(RUN_FILE, [*port_overrides(), f"model.path={model}"])
    section = settings.learner
    batch = _batch(model, section.groups_per_step, section.group_size)
    engine, publisher = DeepSpeedEngine(settings), Publisher(settings)
    steps, publications = [], []
    publisher.publish(1, engine)
    for number in range(num_steps + 1):
        started = time.monotonic()
        engine.step(batch, supervised_loss, section.learning_rate)
        if number:
            steps.append(time.monotonic() - started)
            publications.append(publisher.publish(1, engine))
        else:
            publisher.publish(1, engine)
    publisher.close()
    engine.close()
    num_tokens = sum(sequence.token_ids_T.size for sequence in batch)
    changed = REGISTRY.get_sample_value("ergon_weights_changed_fraction")
    if not changed:
        raise RuntimeError("the steps changed nothing, so publishing them says nothing")
    return Step(
        statistics.median(steps),
        statistics.median(publications),
        len(batch),
        num_tokens,
        section.learning_rate,
        changed,
    )


def _batch(model: Path, num_groups: int, group_size: int) -> list[Any]:
    """Episodes of the quick start's shape: a real question, two calls of a tool with their answers, and the answer;
    the turns are those of the example in the README, and differ between the members of a group by their last tokens."""
    from actors.renderer import Renderer
    from envs.interface import Message
    from envs.registry import create_environment
    from learner.engine import TrainSequence

    renderer, shop, rng = Renderer.load(model), create_environment("shop"), np.random.default_rng(0)
    batch = []
    for group in range(num_groups):
        prompt = list(shop.task("train", group).prompt)
        for member in range(group_size):
            price = int(rng.integers(10, 99))
            messages = [
                *prompt,
                Message("assistant", "<tool>price plate</tool>"),
                Message("tool", str(price)),
                Message("assistant", f"<tool>calc {member + 2}*{price}-12</tool>"),
                Message("tool", str((member + 2) * price - 12)),
                Message("assistant", f"<answer>{(member + 2) * price - 12}</answer>"),
            ]
            segment = renderer.render_reference(messages)
            logprobs_T = np.where(segment.loss_mask_T, -0.5, 0.0).astype(np.float32)
            staleness_T = np.zeros(segment.token_ids_T.size, np.int32)
            advantage = 1.0 if member % 2 else -1.0
            batch.append(TrainSequence(segment.token_ids_T, segment.loss_mask_T, logprobs_T, advantage, staleness_T))
    return batch


# --- the engine -----------------------------------------------------------------------------------------------------


def play_engine(directory: Path, learning_rate: float, num_versions: int, adoptions: int, mode: str) -> Pause:
    """Adopt one version after the other while requests are in flight, on one core."""
    from actors.renderer import Renderer
    from actors.vllm_engine import VllmEngine
    from broker.process.settings import ActorSection
    from envs.interface import Message
    from learner.model import prepare_model
    from tests.bench.exactness import SETTINGS, questions

    specs, files = versions(directory, learning_rate, num_versions)
    model = prepare_model(MODEL, Path(MODEL_CACHE))
    section = ActorSection.model_validate({**SETTINGS, "adopt_mode": mode})
    engine = VllmEngine.start(model, section, seed=1)
    renderer = Renderer.load(model)
    prompts = [renderer.open([Message("user", text)]) for text in questions()]

    async def scenes() -> tuple[list[float], list[float]]:
        pauses, totals = [], []
        for number in range(1, adoptions + 1):
            path, digest = _stage(specs, files[number % len(files)], number)
            flying = [
                asyncio.create_task(engine.generate(prompt, Sampling(), TURN_TOKENS, (), f"{number}-{i}"))
                for i, prompt in enumerate(prompts)
            ]
            await asyncio.sleep(0.5)
            started = time.monotonic()
            pauses.append(1000 * await engine.adopt(PolicyVersion(1, number), path, digest))
            totals.append(time.monotonic() - started)
            await asyncio.gather(*flying)
            path.unlink()
        return pauses, totals

    try:
        pauses, totals = asyncio.run(scenes())
    finally:
        engine.shutdown()
    return Pause(pauses, statistics.median(totals), len(prompts), mode)


def _stage(specs: Sequence[TensorSpec], file: Path, number: int) -> tuple[Path, str]:
    """The version as the base file of an actor holds it, and its hash."""
    snapshot = read_snapshot(file)
    manifest = describe("bench-weights", PolicyVersion(1, number), tuple(specs), snapshot, 4 << 20, time.time())
    fd, name = tempfile.mkstemp(suffix=".safetensors", dir="/dev/shm")
    with os.fdopen(fd, "wb") as out:
        out.write(safetensors_header(manifest))
        out.write(snapshot.data)
    return Path(name), manifest.total_hash.hex()


def main() -> None:
    """Play one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("learner", "engine"))
    parser.add_argument("arguments", nargs="*")
    arguments = parser.parse_args()
    if arguments.role == "learner":
        figures: Step | Pause = play_learner(int(arguments.arguments[0]))
    else:
        directory, rate, num_versions, adoptions, mode = arguments.arguments
        figures = play_engine(Path(directory), float(rate), int(num_versions), int(adoptions), mode)
    print(MARK + json.dumps(figures._asdict()))


if __name__ == "__main__":
    main()
