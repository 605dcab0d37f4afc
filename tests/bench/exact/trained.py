"""Consecutive versions of the model as training makes them, each a Hugging Face directory of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEARNING_RATE = 5e-5
BATCH = 4


def train(model: Path, directory: Path, num_versions: int, texts: Sequence[str]) -> list[Path]:
    """Version 0 is the model itself in bf16; each other one is a real optimiser step further. Directories, in order."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), _tokenizer(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    made = []
    for number in range(num_versions):
        if number:
            start = number * BATCH % len(texts)
            batch = tokenizer(list(texts[start : start + BATCH]), return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            policy(**batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in policy.state_dict().items()}
        state.pop("lm_head.weight", None)  # tied
        place = directory / f"version-{number}"
        place.mkdir()
        shutil.copy(model / "config.json", place)
        save_file(state, place / "model.safetensors", metadata={"format": "pt"})
        made.append(place)
    return made


def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer
