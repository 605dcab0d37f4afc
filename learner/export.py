"""A checkpoint as a Hugging Face directory: config, safetensors, tokenizer, generation config and a model card.

    python -m learner.export --config runs/NAME/config.toml --checkpoint best DIRECTORY

Owns the directory until it is whole: it is written beside its place and renamed. The weights are those that actors were
served at that version, adapters merged. Needs no broker, no DeepSpeed process group and no GPU, and reads checkpoints
of any number of ranks.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broker.process.config import load_settings
from broker.process.lifecycle import ErgonError, run_main
from broker.process.settings import Settings
from learner.checkpoint import Checkpoint, checkpoint_directories, find_problem, read_checkpoint
from learner.evaluation import STYLES
from learner.model import prepare_model
from learner.state import TrainerState

logger = logging.getLogger(__name__)


def choose(directory: Path, which: str) -> Checkpoint:
    """The checkpoint that `best`, `last` or a number names, its hashes verified; raises ErgonError if there is none."""
    checkpoints = [read_checkpoint(path) for path in checkpoint_directories(directory)]
    if not checkpoints:
        raise ErgonError(f"{directory} holds no complete checkpoint yet; wait for one (learner.checkpoint_every)")
    chosen: Checkpoint | None
    if which == "last":
        chosen = checkpoints[-1]
    elif which == "best":
        label = checkpoints[-1].state["best"]
        chosen = next((c for c in reversed(checkpoints) if label and c.label == label), None)
        if chosen is None:
            raise ErgonError(
                f"{directory} knows no best checkpoint: no held-out evaluation of one is complete (eval.tasks, "
                "eval.every, learner.keep_best); name `last` or one of " + _numbers(checkpoints)
            )
    else:
        chosen = next((c for c in checkpoints if str(c.number) == which.lstrip("0")), None)
        if chosen is None:
            raise ErgonError(f"--checkpoint {which!r} is not `best`, `last` or one of {_numbers(checkpoints)}")
    if problem := find_problem(chosen.directory):
        raise ErgonError(f"the checkpoint {chosen.directory} cannot be used ({problem}); name another one")
    return chosen


def export(settings: Settings, which: str, target: Path) -> Path:
    """Write the directory, which must not exist or be empty; it is complete or not there. Raises ErgonError."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ErgonError(f"{target} exists and is not an empty directory; name another one")
    checkpoint = choose(settings.run_dir / "checkpoints", which)
    model_path = prepare_model(settings.model.path, settings.model.cache)
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"path": str(model_path)})})
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        draft.chmod(0o755)  # mkdtemp makes it private
        _write_model(settings, checkpoint, model_path, draft)
        (draft / "README.md").write_text(model_card(settings, checkpoint), encoding="utf-8")
        for path in draft.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _write_model(settings: Settings, checkpoint: Checkpoint, model_path: Path, directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from learner.training.deepspeed_config import deepspeed_config
    from learner.training.policy_model import load_policy
    from learner.training.saved import read_weights
    from learner.training.served import ServedWeights

    # All of the model is here, whatever was divided among the ranks.
    learner = settings.learner.model_copy(update={"zero_stage": min(2, settings.learner.zero_stage)})
    whole = settings.model_copy(update={"learner": learner})
    policy = load_policy(whole, deepspeed_config(learner))
    if checkpoint.engine_directory is not None:  # none: a checkpoint from before the first step
        read_weights(policy, checkpoint.engine_directory)
    served = ServedWeights(policy.causal_lm)
    weights = {spec.name: served.local(spec.name) for spec in served.layout}
    config = AutoConfig.from_pretrained(model_path)
    config.dtype = getattr(torch, settings.learner.dtype)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    empty.save_pretrained(directory, state_dict=weights)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(directory)
    if (model_path / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(model_path).save_pretrained(directory)


def model_card(settings: Settings, checkpoint: Checkpoint) -> str:
    """README.md: where the model comes from and how good it was found to be."""
    state = TrainerState.from_json(checkpoint.state)
    environments = ", ".join(f"`{environment.name}`" for environment in settings.environments)
    rows = "\n".join(_row(phase, state) for phase, evaluation in state.evaluations.items() if evaluation.complete)
    best = f"The best one of the run by its held-out reward (`{state.best}`)." if checkpoint.label == state.best else ""
    facts: Mapping[str, Any] = {
        "run": settings.run.name,
        "seed": settings.run.seed,
        "base model": f"`{settings.model.path}`",
        "environments": environments,
        "checkpoint": checkpoint.number,
        "supervised steps": state.first_version or state.warm_start_step,
        "reinforcement-learning steps": state.step,
        "tokens trained on": state.counters["tokens_trained"],
        "learning rate": settings.learner.learning_rate,
        "group size": settings.learner.group_size,
        "temperature": settings.sampling.temperature,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [reinforcement-learning, agent, ergon]
---

# {settings.run.name}

Trained with Ergon by reinforcement learning. {best}

| | |
| --- | --- |
{table}

Held-out evaluations up to this checkpoint, mean reward:

| evaluation | tasks | at the training temperature | greedy |
| --- | --- | --- | --- |
{rows}
"""


def _row(phase: str, state: TrainerState) -> str:
    evaluation = state.evaluations[phase]
    means = [evaluation.mean(style) for style in STYLES]
    shown = " | ".join("" if mean is None else f"{mean:.3f}" for mean in means)
    return f"| {phase} | {evaluation.num_tasks} | {shown} |"


def _numbers(checkpoints: list[Checkpoint]) -> str:
    return ", ".join(str(checkpoint.number) for checkpoint in checkpoints)


def main() -> None:
    """Export, and print a line about what was."""
    parser = argparse.ArgumentParser(prog="python -m learner.export", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    parser.add_argument("--checkpoint", default="best", help="best, last or a number")
    parser.add_argument("directory", type=Path, help="where to, a new directory")
    arguments = parser.parse_args()
    settings = load_settings(arguments.config, environ={})
    target = export(settings, arguments.checkpoint, arguments.directory)
    size = sum(path.stat().st_size for path in target.iterdir())
    print(json.dumps({"directory": str(target), "bytes": size}))  # noqa: T201  the command's result


if __name__ == "__main__":
    run_main("export", main)
