"""A snapshot with a tensor of every kind, its deltas made and applied: for the tests of deltas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np
import pytest

from broker.protocol import delta_loops, delta_records
from broker.protocol.delta_loops import ELEMENT
from broker.protocol.delta_records import Blocks
from broker.protocol.deltas import DeltaEncoder, apply_delta
from broker.protocol.hashes import Start, at_once
from broker.protocol.weights import DTYPES, Bytes, TensorSpec, lay_out

# One tensor for each size of an element, an empty one, and one after which nothing is aligned to a word any more.
SPECS = lay_out(
    [
        ("a", "float64", (9,)),
        ("b", "float32", (3, 5)),
        ("c", "bfloat16", (101,)),
        ("d", "float16", (40, 4)),
        ("empty", "bfloat16", (0, 7)),
        ("e", "uint8", (67,)),
        ("f", "bool", (5,)),
    ]
)
NUM_BYTES = SPECS[-1].offset + SPECS[-1].num_bytes


@pytest.fixture(scope="module", autouse=True, params=["compiled", "numpy"])
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Imported by a test module, this lets each of its tests run on either kind of inner loops."""
    assert delta_loops.compiled, "the inner loops of deltas are not compiled: run `make setup` (it needs a C compiler)"
    library = delta_loops._library if request.param == "compiled" else None
    with mock.patch.object(delta_loops, "_library", library):
        yield


def read_records(payload: bytes | Bytes, specs: Sequence[TensorSpec]) -> list[delta_records.Record]:
    return delta_records.read_records(payload, Blocks(specs))


def itemsize_of(spec: TensorSpec) -> int:
    return DTYPES[spec.dtype][1]


def encode(old: Bytes, new: Bytes, specs: Sequence[TensorSpec] = SPECS, start: Start = at_once) -> Bytes:
    base, encoder, num_changed = old.copy(), DeltaEncoder(specs, start), 0
    for spec in specs:
        part = slice(spec.offset, spec.offset + spec.num_bytes)
        bits = ELEMENT[itemsize_of(spec)]
        encoder.add(base[part], new[part])
        num_changed += int(np.count_nonzero(old[part].view(bits) != new[part].view(bits)))
    payload = encoder.finish()
    assert np.array_equal(base, new)
    assert payload.size == encoder.num_bytes
    assert encoder.num_changed == num_changed
    assert (payload.size == 0) == (num_changed == 0)
    assert not payload.flags.writeable
    return payload


def applied(payload: bytes | Bytes, old: Bytes, specs: Sequence[TensorSpec] = SPECS) -> Bytes:
    target = old.copy()
    apply_delta(payload, specs, target)
    return target
