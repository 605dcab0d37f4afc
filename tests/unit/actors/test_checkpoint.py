"""What the actor reads of a safetensors file before the engine may have it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from actors.checkpoint import check_fit, stored_tensors
from actors.engine import AdoptionError
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import describe, lay_out, safetensors_header
from tests.digest import data_digest

SHAPES = {"b.weight": (3, 5), "a.weight": (7,), "empty": (0, 4)}


@pytest.fixture
def snapshot(tmp_path: Path) -> tuple[Path, bytes]:
    """A file as the weight channel writes it, and the hash of its manifest."""
    tensors = lay_out([("b.weight", "bfloat16", (3, 5)), ("a.weight", "float32", (7,)), ("empty", "float16", (0, 4))])
    data = np.random.default_rng(1).integers(0, 256, tensors[-1].offset + tensors[-1].num_bytes, np.uint8)
    manifest = describe("r1", PolicyVersion(1, 2), tensors, data, 4096, 0.0)
    path = tmp_path / "1.2.safetensors"
    path.write_bytes(safetensors_header(manifest) + data.tobytes())
    return path, manifest.total_hash


def test_the_hash_of_a_file_is_the_total_hash_of_its_manifest(snapshot: tuple[Path, bytes]) -> None:
    path, total_hash = snapshot
    check_fit(SHAPES, path)
    assert data_digest(path) == total_hash.hex()


def test_every_bit_counts_and_the_header_does_not(snapshot: tuple[Path, bytes]) -> None:
    path, total_hash = snapshot
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert data_digest(path) != total_hash.hex()
    raw[-1] ^= 1
    path.write_bytes(raw.replace(b'"version":"2"', b'"version":"3"'))
    assert data_digest(path) == total_hash.hex()


def test_tensors_come_in_the_order_of_their_bytes_and_cover_the_file(tmp_path: Path) -> None:
    arrays = {f"t{i}": np.full((i, 3), i, np.float32 if i % 2 else np.float16) for i in range(1, 9)}
    save_file(arrays, tmp_path / "w.safetensors")
    raw = (tmp_path / "w.safetensors").read_bytes()
    stored = stored_tensors(tmp_path / "w.safetensors")
    assert {tensor.name for tensor in stored} == arrays.keys()
    for tensor, following in pairwise(stored):
        assert tensor.offset + tensor.num_bytes == following.offset
    assert stored[-1].offset + stored[-1].num_bytes == len(raw)
    for tensor in stored:
        assert raw[tensor.offset :][: tensor.num_bytes] == arrays[tensor.name].tobytes()
        assert tensor.shape == arrays[tensor.name].shape


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({**SHAPES, "more": (1,)}, "1 missing"),
        ({k: v for k, v in SHAPES.items() if k != "empty"}, "1 unknown"),
        ({**SHAPES, "a.weight": (8,)}, r"shape \[7\]; the model's is \[8\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    snapshot: tuple[Path, bytes], shapes: dict[str, tuple[int, ...]], reason: str
) -> None:
    with pytest.raises(AdoptionError, match=reason):
        check_fit(shapes, snapshot[0])
