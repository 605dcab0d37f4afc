"""The weight channel's nouns: snapshot layout, manifest, chunks, hashes. Pure: no socket, no file, no thread.

A snapshot is every tensor of one policy version laid out without gaps, widest element type first, in one run of bytes;
that is also the data section of a safetensors file. A version travels as an anchor, which is the snapshot itself, or as
a delta to an older version of its lineage (`deltas.py`). The bytes that travel are the payload, and chunk `i` is the
bytes [i * chunk_bytes, (i + 1) * chunk_bytes) of it. Hashes are those of `hashes.py`. How all this travels is in
`weight_messages.py`.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from broker.protocol import hashes
from broker.protocol.hashes import LEAF_BYTES, Leaves, Run
from broker.protocol.proofs import Proof
from broker.protocol.trajectory import PolicyVersion

HASH_BYTES = 16
MIN_CHUNK_BYTES = 4096
MAX_CHUNK_BYTES = 64 << 20
MAX_NAME_CHARS = 1024
MAX_DIMS = 8
MAX_INT = 2**63 - 1

Integer = Annotated[int, Meta(ge=0, le=MAX_INT)]

Bytes = npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview | Bytes

DTYPES: Mapping[str, tuple[str, int]] = {
    # name on the wire (torch's): name in a safetensors header, bytes of one element
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


class TensorSpec(NamedTuple):
    """Where one tensor lies in the snapshot. `offset` and `num_bytes` count bytes; `dtype` is a key of `DTYPES`."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    dtype: str
    shape: Annotated[tuple[Integer, ...], Meta(max_length=MAX_DIMS)]
    offset: Integer
    num_bytes: Integer


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a receiver must know before the first chunk. `parent` is None for an anchor.

    `chunk_hashes` has one digest per chunk of the payload, in order; `total_hash` covers the snapshot, which for a
    delta is what applying it to the parent's gives. `created_at` is Unix time in seconds. `proof` is None where nothing
    is signed, and not part of what it proves.
    """

    run_id: str
    version: PolicyVersion
    parent: PolicyVersion | None
    tensors: tuple[TensorSpec, ...]
    payload_bytes: int
    chunk_bytes: int
    chunk_hashes: tuple[bytes, ...]
    total_hash: bytes
    created_at: float
    proof: Proof | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of the snapshot."""
        return self.tensors[-1].offset + self.tensors[-1].num_bytes

    @property
    def num_chunks(self) -> int:
        """Chunks of the payload; 0 for a delta without a change."""
        return len(self.chunk_hashes)

    def chunk_range(self, index: int) -> tuple[int, int]:
        """First byte and end of chunk `index` in the payload. Raises IndexError outside [0, num_chunks)."""
        if not 0 <= index < self.num_chunks:
            raise IndexError(f"chunk {index} of {self.num_chunks}")
        start = index * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.payload_bytes)

    def chunk_fits(self, index: int, data: Buffer) -> bool:
        """Whether these bytes are chunk `index`: its length and its hash."""
        start, end = self.chunk_range(index)
        return flat(data).nbytes == end - start and digest(data) == self.chunk_hashes[index]


def flat(data: Buffer) -> memoryview:
    """The bytes of a contiguous buffer as a one-dimensional view. Raises TypeError where it is not contiguous."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    # An empty array of several dimensions cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")


def digest(data: Buffer, run: Run = map) -> bytes:
    """The hash of contiguous bytes, be they a chunk or a snapshot."""
    return hashes.digest(flat(data), run)


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorSpec, ...]:
    """Where tensors given as (name, dtype, shape) go: widest element first, so that each is aligned, then by name.

    Raises ValueError for an empty list, a name twice, an unknown dtype or a shape that is none.
    """
    specs: list[TensorSpec] = []
    offset = 0
    named = sorted(tensors, key=lambda item: (-DTYPES[item[1]][1] if item[1] in DTYPES else 0, item[0]))
    for name, dtype, shape in named:
        if problem := tensor_problem(name, dtype, shape):
            raise ValueError(problem)
        num_bytes = math.prod(shape) * DTYPES[dtype][1]
        specs.append(TensorSpec(name, dtype, tuple(shape), offset, num_bytes))
        offset += num_bytes
    if offset == 0:
        raise ValueError("a snapshot without a byte; publish at least one tensor that is not empty")
    if len({spec.name for spec in specs}) != len(specs):
        twice = Counter(spec.name for spec in specs).most_common(1)[0][0]
        raise ValueError(f"tensor {twice!r} is given twice; tied tensors are published once, under one name")
    return tuple(specs)


def describe(
    run_id: str,
    version: PolicyVersion,
    tensors: tuple[TensorSpec, ...],
    snapshot: Bytes,
    chunk_bytes: int,
    created_at: float,
    run: Run = map,
    leaves: Leaves | None = None,
) -> Manifest:
    """The manifest of a complete snapshot (uint8, one dimension) as an anchor, with the hashes of its chunks and of
    the whole. Every byte is read once where chunks are whole leaves, else twice; what `leaves` has hashed is not."""
    digests = (leaves or Leaves(flat(snapshot))).finish(run)
    starts = range(0, snapshot.size, chunk_bytes)
    if chunk_bytes % LEAF_BYTES:
        chunk_hashes = [digest(snapshot[start : start + chunk_bytes]) for start in starts]
    else:
        step = chunk_bytes // LEAF_BYTES
        chunk_hashes = [hashes.join(digests[i : i + step]) for i in range(0, len(digests), step)]
    total = hashes.join(digests)
    return Manifest(run_id, version, None, tensors, snapshot.size, chunk_bytes, tuple(chunk_hashes), total, created_at)


def describe_delta(anchor: Manifest, parent: PolicyVersion, payload: Bytes) -> Manifest:
    """The manifest of the delta that makes `parent` the version which `anchor` describes."""
    step = anchor.chunk_bytes
    hashes = tuple(digest(payload[start : start + step]) for start in range(0, payload.size, step))
    return replace(anchor, parent=parent, payload_bytes=payload.size, chunk_hashes=hashes, proof=None)


def safetensors_header(manifest: Manifest) -> bytes:
    """The bytes of a safetensors file before its data: length (u64, little-endian) and JSON, padded to 8 bytes.

    Its size depends on the run and the tensors only, so the data of the next version begins at the same place.
    """
    header: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "run_id": manifest.run_id,
            "lineage": str(manifest.version.lineage),
            "version": str(manifest.version.version),
        }
    }
    for spec in manifest.tensors:
        header[spec.name] = {
            "dtype": DTYPES[spec.dtype][0],
            "shape": list(spec.shape),
            "data_offsets": [spec.offset, spec.offset + spec.num_bytes],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * sum(len(str(MAX_INT)) - len(str(number)) for number in manifest.version)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def check_layout(specs: Iterable[TensorSpec]) -> int:
    """Bytes of the snapshot. Raises ValueError unless each tensor is one, and begins where the one before ends."""
    names: set[str] = set()
    end = 0
    for i, (name, dtype, shape, offset, num_bytes) in enumerate(specs):
        if dtype not in DTYPES or name == "__metadata__":  # what else a tensor may not be, its type has refused
            raise ValueError(f"tensors[{i}]: {tensor_problem(name, dtype, shape)}")
        size = math.prod(shape) * DTYPES[dtype][1]
        if offset != end or num_bytes != size:
            raise ValueError(
                f"tensors[{i}]: tensor {name!r:.80} has offset {offset} and num_bytes {num_bytes}; allowed: offset "
                f"{end} and num_bytes {size} (no gap, no overlap)"
            )
        if name in names:
            raise ValueError(f"tensors[{i}]: tensor {name!r:.80} is there twice; allowed: each name once")
        names.add(name)
        end += size
        if end > MAX_INT:
            raise ValueError(f"tensors[{i}]: {name!r:.80} ends at byte {end}; allowed: a snapshot below 2^63 bytes")
    if end == 0:
        raise ValueError("a snapshot without a byte; allowed: at least one tensor that is not empty")
    return end


def tensor_problem(name: Any, dtype: Any, shape: Any) -> str | None:
    """What is wrong with a tensor's description, as a sentence, or None."""
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARS or name == "__metadata__":
        return f"tensor name {name!r:.80}; allowed: text of 1 to {MAX_NAME_CHARS} characters, not __metadata__"
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"tensor name {name!r:.80} is not valid Unicode"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"tensor {name!r:.80} has dtype {dtype!r:.40}; allowed: {', '.join(DTYPES)}"
    if not isinstance(shape, (list, tuple)) or len(shape) > MAX_DIMS or any(type(n) is not int or n < 0 for n in shape):
        return f"tensor {name!r:.80} has shape {shape!r:.80}; allowed: at most {MAX_DIMS} sizes, none negative"
    return None
