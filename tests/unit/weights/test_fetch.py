"""Chunk plan, fetch and sinks without a network: whatever the other side does, the bytes are right or refused."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.process.lifecycle import ErgonError
from broker.protocol import weight_messages as messages
from broker.protocol.commands import error_message, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Bytes, Manifest, describe, describe_delta, safetensors_header
from broker.weights.basefile import BaseFile
from broker.weights.chain import Payload
from broker.weights.fetch import Announced, ChunkPlan, Fetch, Reconnected, Verdict, WeightsSupersededError
from broker.weights.sinks import DeltaRefusedError, StoreSink, WeightsCorruptError
from broker.weights.store import OutOfBudgetError, WeightStore
from tests.unit.weights.samples import CHUNK, OLDER, VERSION, changed, snapshot

NEWER = PolicyVersion(3, 18)
NOT_HELD = error_message(ProtocolError(ErrorCode.NOT_FOUND, "gone"), messages.version_text(VERSION))


class Harness:
    """A fetch whose messages are caught, and which is answered by hand."""

    def __init__(self, sink: BaseFile | StoreSink, credit: int = 4, version: PolicyVersion = VERSION) -> None:
        self.sent: list[Message] = []
        self.fetch = Fetch(version, "run", sink, credit, self.sent.append)
        self.fetch.start()

    def take(self) -> list[Message]:
        sent, self.sent = self.sent, []
        self.fetch._send = self.sent.append
        return sent


def serve(message: Message, manifest: Manifest, data: Bytes) -> Message:
    if message.command == "MANIFEST":
        return messages.manifest_reply(manifest)
    assert message.command == "CHUNK"
    request = parse_body(message, messages.ChunkRequest)
    assert messages.policy_version(request.parent) == manifest.parent
    start, end = manifest.chunk_range(request.index)
    return messages.chunk_reply(manifest.version, manifest.parent, request.index, data[start:end])


def run_to_end(harness: Harness, manifest: Manifest, data: Bytes) -> None:
    while not harness.fetch.complete:
        sent = harness.take()
        assert sent, "the fetch waits although everything was answered"
        for message in sent:
            harness.fetch.handle(serve(message, manifest, data))
    assert harness.fetch.finish() is not None


def fill(base: BaseFile, manifest: Manifest, data: Bytes) -> None:
    """Make it hold this snapshot, as an anchor."""
    run_to_end(Harness(base, version=manifest.version), manifest, data)


def test_plan_keeps_to_its_credit() -> None:
    manifest, data = snapshot(num_bytes=10 * CHUNK)
    plan = ChunkPlan(manifest, credit=3)
    assert plan.next_requests() == [0, 1, 2]
    assert plan.next_requests() == []
    assert plan.accept(1, data[CHUNK : 2 * CHUNK]) is Verdict.STORE
    assert plan.next_requests() == [3]
    plan.forget_requests()
    assert plan.num_requested == 0
    assert plan.next_requests() == [0, 2, 3]


def test_plan_takes_a_late_answer_to_a_forgotten_request() -> None:
    manifest, data = snapshot(num_bytes=2 * CHUNK)
    plan = ChunkPlan(manifest, credit=1)
    assert plan.next_requests() == [0]
    plan.forget_requests()
    assert plan.accept(0, data[:CHUNK]) is Verdict.STORE
    assert plan.accept(0, data[:CHUNK]) is Verdict.DUPLICATE
    assert plan.accept(9, data[:CHUNK]) is Verdict.DUPLICATE
    assert plan.next_requests() == [1]


@given(data=st.data(), num_bytes=st.integers(1, 12 * CHUNK), credit=st.integers(1, 5))
@settings(max_examples=120, deadline=None)
def test_corrupted_truncated_reordered_duplicated_chunks(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, num_bytes: int, credit: int
) -> None:
    """The network misbehaves at will: the file is bit-identical, or the fetch is refused and it holds nothing."""
    manifest, weights = snapshot(num_bytes=num_bytes)
    sink = BaseFile(tmp_path_factory.mktemp("fetch") / "w.safetensors")
    harness = Harness(sink, credit)
    in_flight: list[Message] = []
    try:
        while not harness.fetch.complete:
            in_flight += [serve(message, manifest, weights) for message in harness.take()]
            if not in_flight:
                harness.fetch.handle(Reconnected())
                continue
            position = data.draw(st.integers(0, len(in_flight) - 1))
            what = data.draw(st.sampled_from(["deliver", "deliver", "deliver", "duplicate", "lose", "flip", "cut"]))
            message = in_flight[position] if what == "duplicate" else in_flight.pop(position)
            if message.command == "CHUNK_REPLY" and what in ("flip", "cut"):
                body = message.arrays[0].copy()
                if what == "flip":
                    body[data.draw(st.integers(0, body.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
                else:
                    body = body[: data.draw(st.integers(0, body.size - 1))]
                message = replace(message, arrays=(body,))
            if what != "lose":
                harness.fetch.handle(message)
        harness.fetch.finish()
    except WeightsCorruptError:
        sink.abort()
        assert_holds_nothing(sink)
        return
    assert sink.version == VERSION
    assert sink.path.read_bytes() == safetensors_header(manifest) + weights.tobytes()


def assert_holds_nothing(base: BaseFile) -> None:
    """It says so, and nobody could load the file either."""
    assert (base.version, base.have) == (None, None)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(base.path.read_bytes())


def test_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    manifest, data = snapshot()
    destination = tmp_path / "w.safetensors"
    run_to_end(Harness(BaseFile(destination)), manifest, data)
    tensors = dict(safetensors.deserialize(destination.read_bytes()))
    assert tensors["layers.0.weight"]["dtype"] == "BF16"
    for spec in manifest.tensors:
        assert bytes(tensors[spec.name]["data"]) == data[spec.offset : spec.offset + spec.num_bytes].tobytes()


def test_the_third_wrong_answer_ends_the_fetch(tmp_path: Path) -> None:
    manifest, data = snapshot()
    harness = Harness(BaseFile(tmp_path / "w.safetensors"), credit=1)
    harness.fetch.handle(serve(harness.take()[0], manifest, data))
    wrong = messages.chunk_reply(VERSION, None, 0, np.zeros(CHUNK, np.uint8))
    for _ in range(2):
        assert [parse_body(message, messages.ChunkRequest).index for message in harness.take()] == [0]
        harness.fetch.handle(wrong)
    with pytest.raises(WeightsCorruptError, match="chunk 0 of version"):
        harness.fetch.handle(wrong)


def test_a_manifest_that_contradicts_itself_is_refused_at_the_end(tmp_path: Path) -> None:
    manifest, data = snapshot()
    manifest = replace(manifest, total_hash=bytes(16))
    base = BaseFile(tmp_path / "w.safetensors")
    with pytest.raises(WeightsCorruptError, match="contradicts itself"):
        run_to_end(Harness(base), manifest, data)
    base.abort()
    assert_holds_nothing(base)


def test_a_restarted_relay_is_waited_for_and_held_chunks_count(tmp_path: Path) -> None:
    manifest, data = snapshot(num_bytes=6 * CHUNK)
    harness = Harness(BaseFile(tmp_path / "w.safetensors"), credit=2)
    harness.fetch.handle(serve(harness.take()[0], manifest, data))
    for message in harness.take():
        harness.fetch.handle(serve(message, manifest, data))  # chunks 0 and 1 are held, 2 and 3 requested
    harness.take()
    harness.fetch.handle(Reconnected())
    harness.take()
    harness.fetch.handle(NOT_HELD)
    harness.fetch.handle(Announced(None))
    assert harness.take() == []
    harness.fetch.handle(Announced(VERSION))
    assert [message.command for message in harness.take()] == ["MANIFEST"]
    harness.fetch.handle(messages.manifest_reply(manifest))
    assert [parse_body(message, messages.ChunkRequest).index for message in harness.sent] == [2, 3]
    run_to_end(harness, manifest, data)


def test_other_bytes_under_the_same_version_begin_anew(tmp_path: Path) -> None:
    first, data = snapshot(num_bytes=6 * CHUNK)
    second, other = snapshot(num_bytes=6 * CHUNK, seed=1)
    destination = tmp_path / "w.safetensors"
    harness = Harness(BaseFile(destination), credit=2)
    harness.fetch.handle(serve(harness.take()[0], first, data))
    harness.fetch.handle(serve(harness.take()[0], first, data))
    harness.take()
    harness.fetch.handle(NOT_HELD)
    harness.fetch.handle(Announced(VERSION))
    run_to_end(harness, second, other)
    assert destination.read_bytes().endswith(other.tobytes())


def test_superseded_only_when_something_newer_is_announced(tmp_path: Path) -> None:
    harness = Harness(BaseFile(tmp_path / "w.safetensors"))
    harness.fetch.handle(Announced(PolicyVersion(3, 16)))
    harness.fetch.handle(NOT_HELD)
    with pytest.raises(WeightsSupersededError) as caught:
        harness.fetch.handle(Announced(NEWER))
    assert caught.value.newest == NEWER
    harness = Harness(BaseFile(tmp_path / "w.safetensors"))
    harness.fetch.handle(Announced(NEWER))
    with pytest.raises(WeightsSupersededError):
        harness.fetch.handle(NOT_HELD)


def test_answers_to_another_fetch_are_ignored(tmp_path: Path) -> None:
    manifest, data = snapshot()
    other, other_data = snapshot(version=NEWER)
    harness = Harness(BaseFile(tmp_path / "w.safetensors"))
    harness.fetch.handle(messages.manifest_reply(other))
    harness.fetch.handle(messages.chunk_reply(NEWER, None, 0, other_data[:CHUNK]))
    harness.fetch.handle(messages.chunk_reply(VERSION, OLDER, 0, other_data[:CHUNK]))
    harness.fetch.handle(error_message(ProtocolError(ErrorCode.NOT_FOUND, "gone"), messages.version_text(NEWER)))
    harness.fetch.handle(Announced(NEWER))
    run_to_end(harness, manifest, data)


def test_a_manifest_of_another_run_is_refused(tmp_path: Path) -> None:
    manifest, _ = snapshot()
    harness = Harness(BaseFile(tmp_path / "w.safetensors"))
    with pytest.raises(ProtocolError, match="this is run 'run'"):
        harness.fetch.handle(messages.manifest_reply(replace(manifest, run_id="other")))


def test_other_refusals_are_raised(tmp_path: Path) -> None:
    harness = Harness(BaseFile(tmp_path / "w.safetensors"))
    with pytest.raises(ProtocolError, match="too many"):
        harness.fetch.handle(error_message(ProtocolError(ErrorCode.BAD_STATE, "too many"), "CHUNK"))


def test_a_directory_that_cannot_take_it_is_named(tmp_path: Path) -> None:
    manifest, _ = snapshot()
    with pytest.raises(ErgonError, match=r"nowhere/w\.safetensors.*actor\.staging"):
        BaseFile(tmp_path / "nowhere" / "w.safetensors").begin(manifest)


def test_a_stores_sink_accounts_for_its_bytes_and_gives_them_back() -> None:
    manifest, data = snapshot()
    store = WeightStore(max_bytes=2 * data.size)
    run_to_end(Harness(StoreSink(store)), manifest, data)
    base = store.base
    assert base is not None
    assert (base.version, store.newest) == (VERSION, manifest)
    assert base.data.tobytes() == data.tobytes()
    assert not base.data.flags.writeable
    assert store.live_bytes == data.size
    second = StoreSink(store)
    second.begin(manifest)
    with pytest.raises(OutOfBudgetError):
        StoreSink(store).begin(manifest)
    second.abort()
    assert store.live_bytes == data.size


# --- deltas -------------------------------------------------------------------------------------------------------


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
