"""A delta that is applied before it is whole: nobody believes it, and it can be taken back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from broker.protocol.errors import ProtocolError
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Bytes, Manifest, safetensors_header
from broker.weights.basefile import BaseFile
from broker.weights.begun import Begun
from tests.unit.weights.harness import Harness, assert_holds_nothing, fill, run_to_end
from tests.unit.weights.samples import OLDER, VERSION, changed, snapshot

OLD, OLD_DATA = snapshot(version=OLDER)
NEW, PAYLOAD, NEW_DATA = changed(OLD, OLD_DATA, VERSION, seed=1, num_changes=3000)
_, OTHER_PAYLOAD, _ = changed(OLD, OLD_DATA, VERSION, seed=2, num_changes=3000)


@pytest.fixture
def base(tmp_path: Path) -> Iterator[BaseFile]:
    found = BaseFile(tmp_path / "base.safetensors")
    fill(found, OLD, OLD_DATA)
    yield found
    found.close()


def assert_holds(base: BaseFile, manifest: Manifest, data: Bytes) -> None:
    assert base.version == base.have == manifest.version
    assert base.path.read_bytes() == safetensors_header(manifest) + data.tobytes()


def finish(base: BaseFile) -> None:
    """Fetch the new version as a delta to what the base has."""
    run_to_end(Harness(base), NEW, PAYLOAD)


@given(st.lists(st.integers(0, PAYLOAD.size), max_size=6), st.integers(0, PAYLOAD.size))
@settings(deadline=None)
def test_however_it_comes_it_is_applied_once_and_can_be_undone(cuts: list[int], end: int) -> None:
    target = OLD_DATA.copy()
    begun = Begun(OLD.tensors, target)
    places = sorted({0, end, *(cut for cut in cuts if cut < end)})
    for start, stop in itertools.pairwise(places):
        begun.add(PAYLOAD[start:stop])
    assert begun.num_bytes <= end
    assert begun.begins(PAYLOAD)
    if end == PAYLOAD.size:
        assert np.array_equal(target, NEW_DATA)
    begun.undo()
    assert np.array_equal(target, OLD_DATA)


@pytest.mark.parametrize("num_ahead", [1, PAYLOAD.size // 2, PAYLOAD.size])
def test_the_fetch_goes_on_where_it_was_begun(base: BaseFile, num_ahead: int) -> None:
    base.apply_ahead(PAYLOAD[: num_ahead // 3])
    base.apply_ahead(PAYLOAD[num_ahead // 3 : num_ahead])
    assert (base.version, base.manifest, base.have) == (None, None, OLDER)
    assert not any(base.path.read_bytes()[: len(safetensors_header(OLD))])  # nobody can load it
    finish(base)
    assert_holds(base, NEW, NEW_DATA)


def test_what_is_given_up_is_taken_back(base: BaseFile) -> None:
    base.apply_ahead(PAYLOAD[: PAYLOAD.size // 2])
    base.abort()
    assert_holds(base, OLD, OLD_DATA)
    base.abort()
    finish(base)
    assert_holds(base, NEW, NEW_DATA)


def test_what_was_begun_with_other_bytes_is_taken_back_first(base: BaseFile) -> None:
    base.apply_ahead(OTHER_PAYLOAD)
    finish(base)
    assert_holds(base, NEW, NEW_DATA)


def test_what_is_malformed_changes_nothing(base: BaseFile) -> None:
    damaged = PAYLOAD.copy()
    damaged[4] ^= 1  # how many elements the first record changes
    with pytest.raises(ProtocolError):
        base.apply_ahead(damaged)
    finish(base)
    assert_holds(base, NEW, NEW_DATA)


def test_an_anchor_is_written_over_what_was_begun(base: BaseFile) -> None:
    base.apply_ahead(PAYLOAD[: PAYLOAD.size // 2])
    anchor, data = snapshot(version=PolicyVersion(3, 18), seed=5)
    fill(base, anchor, data)
    assert_holds(base, anchor, data)


def test_a_base_that_was_damaged_meanwhile_is_held_no_more(base: BaseFile) -> None:
    name = "ergon_weights_verify_failures_total"
    failures = REGISTRY.get_sample_value(name) or 0
    base.apply_ahead(PAYLOAD[: PAYLOAD.size // 2])
    assert base._data is not None
    base._data[7] ^= 1
    base.abort()
    assert_holds_nothing(base)
    assert REGISTRY.get_sample_value(name) == failures + 1
    anchor, data = snapshot(version=VERSION, seed=5)
    fill(base, anchor, data)
    assert_holds(base, anchor, data)
