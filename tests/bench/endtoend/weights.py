"""Snapshots of either side as Hugging Face weights: what the evaluator's engine adopts, what training starts from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_PREFIX = "causal_lm."
_HEAD = "lm_head.weight"


def served(named: Any) -> dict[str, torch.Tensor]:
    """A state dict's tensors as the engine serves them: bf16, under their Hugging Face names, the tied head once."""
    tied = {name.removeprefix(_PREFIX): tensor for name, tensor in named}
    if torch.equal(tied[_HEAD], tied["model.embed_tokens.weight"]):
        del tied[_HEAD]
    return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tied.items()}


def as_safetensors(snapshot: Path) -> Path:
    """A snapshot's weights as safetensors, beside it; DeepSpeed's module states are converted, once."""
    if snapshot.suffix == ".safetensors":
        return snapshot
    target = snapshot.with_suffix(".safetensors")
    if not target.exists():
        # DeepSpeed writes its file with pickle; it is our own of a minute ago.
        states = torch.load(snapshot, map_location="cpu", weights_only=False)
        write(states["module"].items(), target)
    return target


def write(named: Any, target: Path) -> None:
    """Write a state dict's weights; the file is there when it is whole."""
    draft = target.with_suffix(".unfinished")
    save_file(served(named), draft, metadata={"format": "pt"})
    draft.replace(target)


def as_model(snapshot: Path, model: Path, target: Path) -> Path:
    """A Hugging Face directory: configuration and tokenizer of `model`, the weights of a snapshot."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not path.name.startswith("ergon-"):
            shutil.copy(path, target)
    shutil.copy(as_safetensors(snapshot), target / "model.safetensors")
    return target
