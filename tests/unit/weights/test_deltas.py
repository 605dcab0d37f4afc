"""Deltas: bit-identical whatever the bits and the threads, folded without loss."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.protocol import delta_loops, delta_records, deltas, hashes
from broker.protocol.delta_loops import ELEMENT, PASS, Piece, Planes, find
from broker.protocol.delta_records import BLOCK_BYTES, Blocks, pack
from broker.protocol.deltas import DeltaEncoder, apply_delta, fold, undo_delta
from broker.protocol.hashes import LEAF_BYTES, Following, Leaves
from broker.protocol.weights import DTYPES, Bytes, digest, flat, lay_out
from tests.unit.weights.delta_samples import NUM_BYTES, SPECS, applied, encode, itemsize_of, loops, read_records

__all__ = ["loops"]

# Quiet and signalling NaNs with payloads, infinities, both zeros, the smallest and largest numbers.
BITS = {
    1: (0x00, 0x01, 0x7F, 0x80, 0xFF),
    2: (0x0000, 0x8000, 0x7FC1, 0xFF81, 0x7F81, 0x7E55, 0x7F80, 0xFF80, 0x0001, 0xFFFF),
    4: (0x00000000, 0x80000000, 0x7FC12345, 0xFF800001, 0x7F800000, 0x00000001, 0xFFFFFFFF),
    8: (0, 1 << 63, 0x7FF8000000001234, 0xFFF0000000000001, 0x7FF0000000000000, 1, (1 << 64) - 1),
}


@st.composite
def snapshots(draw: st.DrawFn, num: int) -> list[Bytes]:
    """Consecutive versions: of each tensor nothing, everything, or some elements change, often to special values."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    versions = [rng.integers(0, 256, NUM_BYTES, np.uint8)]
    while len(versions) < num:
        new = versions[-1].copy()
        for spec in SPECS:
            elements = new[spec.offset : spec.offset + spec.num_bytes].view(ELEMENT[itemsize_of(spec)])
            fraction = draw(st.sampled_from((0.0, 0.02, 0.3, 0.74, 0.9, 1.0)))
            chosen = np.flatnonzero(rng.random(elements.size) < fraction)
            special = np.array(BITS[itemsize_of(spec)], elements.dtype)
            elements[chosen] = special[rng.integers(0, special.size, chosen.size)]
            if draw(st.booleans()):
                elements[chosen] = rng.integers(0, 256, chosen.size * elements.itemsize, np.uint8).view(elements.dtype)
        versions.append(new)
    return versions


@given(snapshots(2))
@settings(deadline=None)
def test_any_two_versions_come_out_bit_identical(versions: list[Bytes]) -> None:
    old, new = versions
    assert np.array_equal(applied(encode(old, new), old), new)


@given(snapshots(2))
@settings(deadline=None)
def test_what_was_applied_can_be_taken_back_to_the_bit(versions: list[Bytes]) -> None:
    old, new = versions
    payload, target = encode(old, new), old.copy()
    apply_delta(payload, SPECS, target)
    undo_delta(payload, SPECS, target)
    assert np.array_equal(target, old)


@given(snapshots(3), st.integers(0, NUM_BYTES - 1), st.integers(1, 255))
@settings(deadline=None)
def test_on_any_other_base_the_result_is_told_by_its_hash(versions: list[Bytes], place: int, by: int) -> None:
    """Adding a constant is one to one: a wrong base never comes out right, be it another version or the result."""
    old, new, other = versions
    payload = encode(old, new)
    damaged = old.copy()
    damaged[place] ^= by
    for base in (damaged, new, other):
        if not np.array_equal(base, old):
            assert digest(applied(payload, base)) != digest(new)


@given(snapshots(5), st.data())
@settings(deadline=None)
def test_any_way_from_one_version_to_another_by_deltas_and_folds_is_the_same(
    versions: list[Bytes], data: st.DataObject
) -> None:
    payloads = [encode(old, new) for old, new in itertools.pairwise(versions)]
    start, cut = 0, sorted(data.draw(st.sets(st.integers(1, 4))) | {4})
    target, folds = versions[0].copy(), []
    for end in cut:
        folds.append(fold(payloads[start:end], SPECS))
        apply_delta(folds[-1], SPECS, target)
        assert np.array_equal(target, versions[end])
        start = end
    of_folds = fold(folds, SPECS)
    assert np.array_equal(applied(of_folds, versions[0]), versions[-1])
    # What differs between the ends is what the fold names, and nothing else.
    assert sum(r.num_values for r in read_records(of_folds, SPECS)) == sum(
        r.num_values for r in read_records(encode(versions[0], versions[-1]), SPECS)
    )


LAYOUTS = st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.integers(0, 70)), min_size=1, max_size=8)


@given(LAYOUTS, st.integers(0, 2**32 - 1), st.sampled_from((8, 64, 256)))
@settings(deadline=None)
def test_blocks_tile_any_snapshot_and_carry_any_two_changes(
    layout: list[tuple[str, int]], seed: int, block_bytes: int
) -> None:
    """Small blocks here, so that many tensors share one and many lie in several."""
    specs = lay_out([*((f"{i}", dtype, (num,)) for i, (dtype, num) in enumerate(layout)), ("last", "bool", (3,))])
    size = specs[-1].offset + specs[-1].num_bytes
    rng = np.random.default_rng(seed)
    versions = [rng.integers(0, 256, size, np.uint8)]
    for _ in range(2):
        versions.append(np.where(rng.random(size) < rng.random(), rng.integers(0, 256, size), versions[-1]))
        versions[-1] = versions[-1].astype(np.uint8)
    with mock.patch.object(delta_records, "BLOCK_BYTES", block_bytes):
        table = Blocks(specs)
        blocks = [table[index] for index in range(table.num_blocks)]
        ends = [block.offset + block.num_bytes for block in blocks]
        assert [block.offset for block in blocks] == [0, *ends[:-1]]
        assert ends[-1] == size
        for spec in specs:
            for offset in range(spec.offset, spec.offset + spec.num_bytes):
                block = table.around(offset)
                assert block == blocks[block.number]
                assert block.offset <= offset < block.offset + block.num_bytes <= block.offset + block_bytes
                assert block.itemsize == itemsize_of(spec)
        payloads = [encode(old, new, specs) for old, new in itertools.pairwise(versions)]
        assert np.array_equal(applied(payloads[0], versions[0], specs), versions[1])
        assert np.array_equal(applied(fold(payloads, specs), versions[0], specs), versions[2])


@given(snapshots(2))
@settings(deadline=None)
def test_there_and_back_folds_to_nothing(versions: list[Bytes]) -> None:
    old, new = versions
    assert fold([encode(old, new), encode(new, old)], SPECS).size == 0


def test_steps_that_wrap_around_add_up() -> None:
    """The largest number and the smallest are neighbours, in every width and over several steps."""
    specs = lay_out([(dtype, dtype, (3,)) for dtype in ("int8", "bfloat16", "float32", "float64")])
    size = specs[-1].offset + specs[-1].num_bytes
    steps = [np.full(size, fill, np.uint8) for fill in (0xFF, 0x00, 0x80, 0x7F, 0xFF)]
    payloads = [encode(old, new, specs) for old, new in itertools.pairwise(steps)]
    assert np.array_equal(applied(payloads[0], steps[0], specs), steps[1])
    assert np.array_equal(applied(fold(payloads[:3], specs), steps[0], specs), steps[3])
    assert fold(payloads, specs).size == 0


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_threads_make_the_same_bytes(threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and tensors, small ones among them; opened records beyond the limit are opened again."""
    monkeypatch.setattr(deltas, "KEPT_BYTES", 100_000)
    monkeypatch.setattr(deltas, "MAX_BEGUN", 2)
    size = BLOCK_BYTES // 2
    specs = lay_out([("a", "bfloat16", (5 * size + 3,)), ("b", "bfloat16", (7,)), ("c", "bfloat16", (size,))])
    rng = np.random.default_rng(3)
    old = rng.integers(0, 256, specs[-1].offset + specs[-1].num_bytes, np.uint8)
    mid, new = old.copy(), old.copy()
    mid[rng.integers(0, old.size, 90_000)] += 1
    new[rng.integers(0, old.size, 90_000)] -= 1
    payloads = [encode(old, mid, specs), encode(mid, new, specs)]
    assert [p.tobytes() for p in payloads] == [
        encode(*pair, specs, threads.submit).tobytes() for pair in ((old, mid), (mid, new))
    ]
    target = old.copy()
    for payload, version in zip(payloads, (mid, new), strict=True):
        apply_delta(payload, specs, target, threads.map)
        assert np.array_equal(target, version)
    assert fold(payloads, specs, threads.map).tobytes() == fold(payloads, specs).tobytes()


@given(snapshots(2), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_both_kinds_of_loops_find_the_same_in_pieces_of_any_alignment(versions: list[Bytes], seed: int) -> None:
    """And leave the same behind. Here one block has all the bytes, and their tensors are pieces of any size."""
    rng, block_bytes = np.random.default_rng(seed), NUM_BYTES // 8 * 8
    for itemsize in ELEMENT:
        cuts = np.unique(rng.integers(0, block_bytes // itemsize, 5)) * itemsize
        found: list[tuple[int, int, bytes, bytes]] = []
        for library in (delta_loops._load(), None):
            # At any address: the base and what is new begin where they like.
            old, new = (np.pad(version, (at, 0))[at:] for at, version in zip((1, 3), versions, strict=True))
            parts = itertools.pairwise([0, *cuts.tolist(), block_bytes])
            pieces = [Piece(start, old[start:end], new[start:end]) for start, end in parts if start < end]
            with mock.patch.object(delta_loops, "_library", library):
                planes = find(pieces, itemsize, block_bytes // itemsize) or Planes(0, 0, ())
                content = b"".join(plane.tobytes() for plane in planes.planes)
            found.append((planes.num_gaps, planes.num_values, content, old[:block_bytes].tobytes()))
            assert np.array_equal(old[:block_bytes], new[:block_bytes])
        assert found[0] == found[1]


@pytest.mark.parametrize("num_first", [BLOCK_BYTES, LEAF_BYTES // 2 + 3, 7])
@pytest.mark.parametrize("changed", [True, False])
def test_what_is_compared_or_applied_is_hashed_on_the_way(num_first: int, changed: bool) -> None:
    """Whatever is a whole leaf of one block: also where blocks do not begin with leaves."""
    specs = lay_out([("a", "bfloat16", (num_first,)), ("b", "uint8", (3 * LEAF_BYTES + 11,)), ("c", "uint8", (5,))])
    old = np.random.default_rng(0).integers(0, 256, specs[-1].offset + specs[-1].num_bytes, np.uint8)
    new = old.copy()
    if changed:
        new[:: LEAF_BYTES // 3] += 1
    base, target = old.copy(), old.copy()
    leaves = Leaves(flat(base))
    encoder = DeltaEncoder(specs, leaves=leaves)
    for spec in specs:
        encoder.add(base[spec.offset :][: spec.num_bytes], new[spec.offset :][: spec.num_bytes])
    payload = encoder.finish()
    of_new = hashes.leaves(flat(new))
    on_the_way = list(leaves._digests)
    assert on_the_way.count(None) <= 1  # the one that belongs to two blocks
    assert all(digest in (None, right) for digest, right in zip(on_the_way, of_new, strict=True))
    assert leaves.finish() == of_new
    applied_to = Leaves(flat(target))
    apply_delta(payload, specs, target, leaves=applied_to)
    if changed:
        assert applied_to._digests.count(None) <= 1
    assert applied_to.finish() == of_new


def test_an_encoder_that_is_abandoned_has_brought_its_bases_up_to_date() -> None:
    """The block that the tensor lies in is not complete yet, and what comes behind it is not aligned to words."""
    specs = lay_out([("a", "uint8", (100,)), ("b", "uint8", (101,)), ("c", "uint8", (64,))])
    base, new = np.zeros(265, np.uint8), np.arange(265, dtype=np.uint8)
    encoder = DeltaEncoder(specs)
    for spec in specs[:2]:
        part = slice(spec.offset, spec.offset + spec.num_bytes)
        encoder.add(base[part], new[part])
    encoder.abandon()
    assert np.array_equal(base[:201], new[:201])
    assert not base[201:].any()
    with pytest.raises(ValueError, match="all of them were given"):
        encoder.add(base[201:], new[201:])


def test_a_block_that_fails_is_said_and_nothing_is_left_at_work(threads: ThreadPoolExecutor) -> None:
    specs = lay_out([("a", "uint8", (3 * BLOCK_BYTES,))])
    new = np.ones(specs[0].num_bytes, np.uint8)
    failed, ended = threading.Event(), list[int]()

    class Failing(Leaves):
        def follow(self, start: int) -> Following:
            if start == 0:
                failed.set()
                raise MemoryError
            assert failed.wait(30)
            ended.append(start // BLOCK_BYTES)
            return super().follow(start)

    base = np.zeros_like(new)
    encoder = DeltaEncoder(specs, threads.submit, Failing(flat(base)))
    encoder.add(base, new)
    with pytest.raises(MemoryError):
        encoder.finish()
    encoder.wait()
    assert sorted(ended) == [1, 2]


def test_nothing_changed_is_an_empty_payload_and_folds_away() -> None:
    old = np.zeros(NUM_BYTES, np.uint8)
    payload = encode(old, old)
    assert payload.size == 0
    assert apply_delta(payload, SPECS, old) == 0
    assert fold([], SPECS).size == fold([payload, b""], SPECS).size == 0


def test_a_negative_zero_and_a_nan_of_other_bits_are_changes() -> None:
    specs = lay_out([("w", "float32", (4,))])
    old = np.array([0.0, 1.0, np.nan, 2.0], np.float32)
    new = np.array([-0.0, 1.0, np.nan, 2.0], np.float32)
    new.view(np.uint32)[2] ^= 1
    payload = encode(old.view(np.uint8), new.view(np.uint8), specs)
    assert read_records(payload, specs)[0].num_values == 2
    assert np.array_equal(applied(payload, old.view(np.uint8), specs).view(np.uint32), new.view(np.uint32))


@pytest.mark.parametrize(
    "changed",
    [
        [0],
        [BLOCK_BYTES],
        [PASS - 1, 2 * PASS],  # gaps of PASS - 1 and PASS
        [0, BLOCK_BYTES // 2 - 1, BLOCK_BYTES // 2, BLOCK_BYTES - 1],  # around the blocks' borders
        [PASS, 2 * PASS + 1, 3 * PASS + 1],
    ],
)
def test_gaps_wider_than_sixteen_bits_and_across_blocks(changed: list[int]) -> None:
    specs = lay_out([("w", "bfloat16", (BLOCK_BYTES + 1,))])
    old = np.zeros(specs[0].num_bytes, np.uint8)
    new = old.copy()
    new.view(np.uint16)[changed] = 0x7FC1
    payload = encode(old, new, specs)
    assert np.array_equal(applied(payload, old, specs), new)
    assert sum(record.num_values for record in read_records(payload, specs)) == len(changed)
    assert payload.size < 200


def test_where_nearly_everything_changed_places_cost_next_to_nothing() -> None:
    specs = lay_out([("v", "bfloat16", (2,)), ("w", "bfloat16", (BLOCK_BYTES + 5,))])
    num_bytes = specs[-1].offset + specs[-1].num_bytes
    old, new = (np.random.default_rng(i).integers(0, 256, num_bytes, np.uint8) for i in range(2))
    payload = encode(old, new, specs)
    assert len(read_records(payload, specs)) == 3
    assert payload.size < new.size * 1.01
    assert np.array_equal(applied(payload, old, specs), new)


def test_an_encoder_refuses_what_does_not_fit_and_leaves_the_base() -> None:
    base = np.zeros(8, np.uint8)
    encoder = DeltaEncoder(lay_out([("a", "bfloat16", (4,)), ("b", "bfloat16", (4,))]))
    frozen = base.copy()
    frozen.flags.writeable = False
    for target, new in (
        (base, b"1" * 6),
        (base[:6], b"1" * 6),
        (base[::2], b"1" * 4),
        (base.reshape(2, 4), b"1" * 8),
        (base.view(np.int8), b"1" * 8),
        (frozen, b"1" * 8),
    ):
        with pytest.raises(ValueError, match="tensor 'a'"):
            encoder.add(target, new)  # type: ignore[arg-type]
    assert not base.any()
    assert encoder.num_bytes == 0


def test_a_target_that_is_no_such_snapshot_is_refused() -> None:
    for target in (np.zeros(NUM_BYTES - 1, np.uint8), np.zeros(NUM_BYTES, np.int8)):
        with pytest.raises(ValueError, match="target"):
            apply_delta(b"", SPECS, target)
    whole = np.zeros(NUM_BYTES, np.uint8)
    whole.flags.writeable = False
    with pytest.raises(ValueError, match="target"):
        apply_delta(b"", SPECS, whole)


def test_a_difference_of_nothing_is_harmless_and_folds_away() -> None:
    specs = lay_out([("w", "uint8", (6,))])
    nothing = pack(0, Planes(2, 2, [np.array(plane, np.uint8) for plane in ((1, 1), (0, 0), (0, 0))]))
    assert not applied(nothing, np.zeros(6, np.uint8), specs).any()
    assert fold([nothing, nothing], specs).size == 0
