"""Fetching a delta: applied where the base lies, or refused, and then the anchor; in an actor and in a relay."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from broker.protocol import weight_messages as messages
from broker.protocol.commands import parse_body
from broker.protocol.weights import describe, describe_delta, safetensors_header
from broker.weights.basefile import BaseFile
from broker.weights.chain import Payload
from broker.weights.fetch import Announced, Reconnected
from broker.weights.sinks import DeltaRefusedError, StoreSink
from broker.weights.store import WeightStore
from tests.unit.weights.harness import NOT_HELD, Harness, assert_holds_nothing, fill, run_to_end
from tests.unit.weights.samples import CHUNK, OLDER, VERSION, changed, snapshot


def test_a_delta_is_applied_where_the_base_lies(tmp_path: Path) -> None:
    old, old_data = snapshot(version=OLDER)
    delta, payload, data = changed(old, old_data, VERSION, seed=1)
    base = BaseFile(tmp_path / "w.safetensors")
    fill(base, old, old_data)
    inode = base.path.stat().st_ino
    harness = Harness(base)
    (request,) = harness.take()
    assert parse_body(request, messages.ManifestRequest).have == OLDER
    harness.fetch.handle(messages.manifest_reply(delta))
    assert base.version == OLDER  # untouched until the delta is there whole
    run_to_end(harness, delta, payload)
    assert base.version == VERSION
    assert base.path.read_bytes() == safetensors_header(delta) + data.tobytes()
    assert base.path.stat().st_ino == inode


def test_an_unfinished_delta_leaves_the_base_and_an_unfinished_anchor_does_not(tmp_path: Path) -> None:
    old, old_data = snapshot(version=OLDER)
    delta, _, data = changed(old, old_data, VERSION, seed=1)
    base = BaseFile(tmp_path / "w.safetensors")
    fill(base, old, old_data)
    before = base.path.read_bytes()
    base.begin(delta)
    base.abort()
    assert (base.version, base.path.read_bytes()) == (OLDER, before)
    manifest = describe("run", VERSION, old.tensors, data, CHUNK, 1.75e9)
    base.begin(manifest)
    base.write(0, data[:CHUNK])
    base.abort()
    assert_holds_nothing(base)


def test_a_delta_that_gives_other_bytes_is_followed_by_the_anchor(tmp_path: Path) -> None:
    """Whatever is wrong with a delta whose chunks fit their hashes: the same fetch ends with the right bytes."""
    old, old_data = snapshot(version=OLDER)
    delta, payload, data = changed(old, old_data, VERSION, seed=1)
    manifest = describe("run", VERSION, old.tensors, data, CHUNK, 1.75e9)
    other_delta, other_payload, _ = changed(old, old_data, VERSION, seed=2)
    garbage = np.random.default_rng(3).integers(0, 256, payload.size, np.uint8)
    for wrong, wrong_payload in (
        (replace(other_delta, total_hash=delta.total_hash), other_payload),
        (replace(describe_delta(manifest, OLDER, garbage), total_hash=delta.total_hash), garbage),
    ):
        base = BaseFile(tmp_path / "w.safetensors")
        fill(base, old, old_data)
        harness = Harness(base)
        harness.fetch.handle(messages.manifest_reply(wrong))
        harness.take()
        for index in range(wrong.num_chunks):
            start, end = wrong.chunk_range(index)
            harness.fetch.handle(messages.chunk_reply(VERSION, OLDER, index, wrong_payload[start:end]))
        harness.take()
        assert harness.fetch.complete
        assert harness.fetch.finish() is None
        (request,) = harness.take()
        assert parse_body(request, messages.ManifestRequest).have is None
        assert not harness.fetch.complete
        assert_holds_nothing(base)
        harness.fetch.handle(messages.manifest_reply(wrong))  # once more, late: ignored
        assert harness.take() == []
        harness.fetch.handle(messages.manifest_reply(manifest))
        run_to_end(harness, manifest, data)
        assert base.path.read_bytes() == safetensors_header(manifest) + data.tobytes()


def test_a_delta_of_other_tensors_is_followed_by_the_anchor(tmp_path: Path) -> None:
    old, old_data = snapshot(num_bytes=40_000, version=OLDER)
    other, other_data = snapshot(version=OLDER)
    delta, _, data = changed(other, other_data, VERSION, seed=1)
    manifest = describe("run", VERSION, other.tensors, data, CHUNK, 1.75e9)
    base = BaseFile(tmp_path / "w.safetensors")
    fill(base, old, old_data)
    harness = Harness(base)
    harness.take()
    harness.fetch.handle(messages.manifest_reply(delta))
    (request,) = harness.take()
    assert parse_body(request, messages.ManifestRequest).have is None
    harness.fetch.handle(messages.manifest_reply(manifest))
    run_to_end(harness, manifest, data)
    assert base.path.read_bytes() == safetensors_header(manifest) + data.tobytes()


def test_a_delta_without_a_change_is_complete_at_once(tmp_path: Path) -> None:
    old, data = snapshot(version=OLDER)
    manifest = describe("run", VERSION, old.tensors, data, CHUNK, 1.75e9)
    delta = describe_delta(manifest, OLDER, np.zeros(0, np.uint8))
    base = BaseFile(tmp_path / "w.safetensors")
    fill(base, old, data)
    harness = Harness(base)
    harness.fetch.handle(messages.manifest_reply(delta))
    assert harness.fetch.complete
    assert harness.fetch.finish() == delta
    assert base.path.read_bytes() == safetensors_header(manifest) + data.tobytes()


def test_another_server_may_answer_with_another_parent_after_a_reconnection(tmp_path: Path) -> None:
    old, old_data = snapshot(version=OLDER)
    delta, payload, data = changed(old, old_data, VERSION, seed=1)
    manifest = describe("run", VERSION, old.tensors, data, CHUNK, 1.75e9)
    base = BaseFile(tmp_path / "w.safetensors")
    fill(base, old, old_data)
    harness = Harness(base, credit=1)
    harness.fetch.handle(messages.manifest_reply(delta))
    harness.take()
    harness.fetch.handle(Reconnected())
    harness.take()
    harness.fetch.handle(NOT_HELD)  # the relay that comes back holds the anchor only
    harness.fetch.handle(Announced(VERSION))
    harness.fetch.handle(messages.manifest_reply(manifest))
    harness.fetch.handle(messages.chunk_reply(VERSION, OLDER, 0, payload[:CHUNK]))  # late, of the delta
    harness.take()
    harness.fetch.handle(Reconnected())
    run_to_end(harness, manifest, data)
    assert base.path.read_bytes() == safetensors_header(manifest) + data.tobytes()


def test_a_delta_to_what_is_not_held_is_ignored(tmp_path: Path) -> None:
    """It may be the late answer to a fetch that was given up, before the base was lost."""
    old, old_data = snapshot(version=OLDER)
    delta, _, data = changed(old, old_data, VERSION, seed=1)
    manifest = describe("run", VERSION, old.tensors, data, CHUNK, 1.75e9)
    base = BaseFile(tmp_path / "w.safetensors")
    harness = Harness(base)
    harness.fetch.handle(messages.manifest_reply(delta))
    assert [message.command for message in harness.take()] == ["MANIFEST"]
    harness.fetch.handle(messages.manifest_reply(manifest))
    harness.fetch.handle(messages.manifest_reply(delta))
    run_to_end(harness, manifest, data)
    assert base.version == VERSION


def test_a_relay_applies_a_delta_in_place_and_keeps_it(tmp_path: Path) -> None:
    old, old_data = snapshot(version=OLDER)
    delta, payload, data = changed(old, old_data, VERSION, seed=1)
    store = WeightStore(max_bytes=2 * data.size)
    run_to_end(Harness(StoreSink(store), version=OLDER), old, old_data)
    run_to_end(Harness(StoreSink(store)), delta, payload)
    base = store.base
    assert base is not None
    assert (base.version, base.data.tobytes(), store.live_bytes) == (VERSION, data.tobytes(), data.size)
    assert base.manifest == describe("run", VERSION, old.tensors, data, CHUNK, 1.75e9)
    kept = store.find(VERSION, OLDER)
    assert isinstance(kept, Payload)
    assert (kept.manifest, kept.data.tobytes()) == (delta, payload.tobytes())


def test_a_relay_whose_delta_is_wrong_serves_neither_it_nor_what_it_became() -> None:
    old, old_data = snapshot(version=OLDER)
    delta, payload, data = changed(old, old_data, VERSION, seed=1)
    manifest = describe("run", VERSION, old.tensors, data, CHUNK, 1.75e9)
    store = WeightStore(max_bytes=2 * data.size)
    run_to_end(Harness(StoreSink(store), version=OLDER), old, old_data)
    sink = StoreSink(store)
    sink.begin(replace(delta, total_hash=bytes(16)))
    for index in range(delta.num_chunks):
        start, end = delta.chunk_range(index)
        sink.write(index, payload[start:end])
    with pytest.raises(DeltaRefusedError, match="other bytes"):
        sink.finish()
    assert (store.newest, store.find(VERSION, OLDER), store.find(OLDER, None)) == (None, None, None)
    del sink
    gc.collect()
    assert store.live_bytes == 0
    run_to_end(Harness(StoreSink(store)), manifest, data)
    assert store.newest == manifest
