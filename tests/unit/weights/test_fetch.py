"""Chunk plan, fetch and sinks without a network: whatever the other side does, the bytes are right or refused."""

from __future__ import annotations

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
from broker.protocol.weights import safetensors_header
from broker.weights.basefile import BaseFile
from broker.weights.fetch import Announced, ChunkPlan, Reconnected, Verdict, WeightsSupersededError
from broker.weights.sinks import StoreSink
from broker.weights.store import OutOfBudgetError, WeightStore
from broker.weights.vouching import WeightsCorruptError
from tests.unit.weights.harness import NEWER, NOT_HELD, Harness, assert_holds_nothing, run_to_end, serve
from tests.unit.weights.samples import CHUNK, OLDER, VERSION, snapshot


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
