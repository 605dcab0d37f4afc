"""A delta that came unasked: one is kept, and it is believed no more than one that was asked for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY

from broker.protocol import weight_messages as messages
from broker.protocol.commands import parse_body
from broker.protocol.errors import ProtocolError
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weight_messages import Part, Pushed
from broker.protocol.weights import Manifest, describe, describe_delta, safetensors_header
from broker.weights.basefile import BaseFile
from broker.weights.chain import Payload
from broker.weights.pushed import PushSlot
from broker.weights.sinks import StoreSink
from broker.weights.store import WeightStore
from tests.unit.weights.harness import Harness, assert_holds_nothing, fill, run_to_end
from tests.unit.weights.samples import CHUNK, OLDER, VERSION, changed, snapshot

NEWER = PolicyVersion(3, 18)


def outcomes() -> tuple[float, float]:
    """Pushes taken and dropped so far."""
    name = "ergon_weights_pushes_received_total"
    taken, dropped = (REGISTRY.get_sample_value(name, {"outcome": outcome}) or 0.0 for outcome in ("taken", "dropped"))
    return taken, dropped


def delta(version: PolicyVersion = VERSION, num_changes: int = 100) -> Payload:
    manifest, payload, _ = changed(*snapshot(version=OLDER), version, seed=1, num_changes=num_changes)
    return Payload(manifest, payload)


def test_the_newest_is_kept_alone_and_taken_once() -> None:
    slot, older, newer = PushSlot(1 << 20), delta(VERSION), delta(NEWER)
    taken, dropped = outcomes()
    assert slot.put(whole(older))
    assert slot.put(whole(newer))
    assert not slot.put(whole(older))
    assert not slot.put(whole(newer))
    assert outcomes() == (taken, dropped + 3)
    assert slot.take(NEWER, OLDER).key == newer.key
    assert slot.take(NEWER, OLDER) is None
    assert outcomes() == (taken + 1, dropped + 3)


@pytest.mark.parametrize(("version", "have"), [(VERSION, None), (VERSION, PolicyVersion(3, 11)), (NEWER, OLDER)])
def test_what_does_not_fit_is_dropped(version: PolicyVersion, have: PolicyVersion | None) -> None:
    slot = PushSlot(1 << 20)
    slot.put(whole(delta()))
    taken, dropped = outcomes()
    assert slot.take(version, have) is None
    assert slot.take(VERSION, OLDER) is None
    assert outcomes() == (taken, dropped + 1)


def test_what_is_larger_than_allowed_is_dropped_and_what_is_held_stays() -> None:
    small, large = delta(VERSION), delta(NEWER, num_changes=3000)
    slot = PushSlot(small.data.size)
    assert slot.put(whole(small))
    assert not slot.put(whole(large))
    assert slot.take(VERSION, OLDER).key == small.key
    assert not PushSlot(0).put(whole(small))


CUTS = (0, 400, 1000, 1500)


def parts(payload: Payload) -> list[Part]:
    """The first 1500 bytes, in three parts."""
    version, parent = payload.key
    assert parent is not None
    return [Part(version, parent, start, payload.data[start:end]) for start, end in itertools.pairwise(CUTS)]


def test_what_came_in_parts_is_a_whole_with_the_push() -> None:
    slot, pushed = PushSlot(1 << 20), delta(num_changes=3000)
    taken, dropped = outcomes()
    assert all(slot.put_part(part) for part in parts(pushed))
    kept = slot.put(whole(pushed, 1500))
    assert kept is not None
    assert (kept.key, kept.data.tobytes()) == (pushed.key, pushed.data.tobytes())
    assert slot.take(VERSION, OLDER) is kept
    assert outcomes() == (taken + 1, dropped)
    assert slot.put(whole(pushed, 1500)) is None  # the parts are used up


@pytest.mark.parametrize("what", ["first lost", "one lost", "last lost", "twice", "another's", "another version's"])
def test_a_push_whose_parts_are_not_all_there_is_dropped(what: str) -> None:
    slot, pushed = PushSlot(1 << 20), delta(num_changes=3000)
    sent = parts(pushed)
    lost = {"first lost": 0, "one lost": 1, "last lost": 2}.get(what)
    if lost is not None:
        del sent[lost]
    elif what == "twice":
        sent.insert(2, sent[1])
    elif what == "another's":
        sent.insert(2, sent[1]._replace(parent=PolicyVersion(3, 11)))
    else:
        sent += parts(delta(NEWER, num_changes=3000))
    kept = [slot.put_part(part) for part in sent]
    assert all(kept) is (what in ("last lost", "another version's"))
    taken, dropped = outcomes()
    assert slot.put(whole(pushed, 1500)) is None
    assert slot.take(VERSION, OLDER) is None
    assert outcomes() == (taken, dropped + 1)
    for part in parts(pushed):
        slot.put_part(part)
    assert slot.put(whole(pushed, 1500)) is not None  # and the next one has all it takes


def test_parts_beyond_what_is_allowed_are_not_kept() -> None:
    slot, pushed = PushSlot(1200), delta(num_changes=3000)
    assert [slot.put_part(part) for part in parts(pushed)] == [True, True, False]
    assert slot.put(whole(pushed, 1500)) is None
    assert not PushSlot(0).put_part(parts(pushed)[0])


def whole(payload: Payload, sent_bytes: int = 0) -> Pushed:
    """A push of it, but for the bytes that were sent before."""
    return Pushed(payload.manifest, sent_bytes, payload.data[sent_bytes:])


class Case:
    """A base that holds the older version, a push to the newer one, and what that must become."""

    def __init__(self, path: Path, num_changes: int = 3000) -> None:
        self.old, self.old_data = snapshot(version=OLDER)
        self.delta, self.payload, self.data = changed(self.old, self.old_data, VERSION, seed=1, num_changes=num_changes)
        self.anchor = describe("run", VERSION, self.old.tensors, self.data, CHUNK, 1.75e9)
        self.base = BaseFile(path / "w.safetensors")
        fill(self.base, self.old, self.old_data)

    def begin(self, manifest: Manifest, payload: np.ndarray) -> Harness:
        """A fetch that begins with this push; what it asks for is caught."""
        harness = Harness(self.base)
        harness.take()  # Harness begins one by asking
        harness.fetch.start(Payload(manifest, payload))
        return harness

    def assert_arrived(self) -> None:
        assert self.base.version == VERSION
        assert self.base.path.read_bytes() == safetensors_header(self.anchor) + self.data.tobytes()


def test_a_push_is_enough(tmp_path: Path) -> None:
    case = Case(tmp_path)
    harness = case.begin(case.delta, case.payload)
    assert harness.take() == []
    assert harness.fetch.complete
    assert harness.fetch.finish() == case.delta
    case.assert_arrived()


def test_a_push_without_a_change_is_enough(tmp_path: Path) -> None:
    case = Case(tmp_path, num_changes=0)
    nothing = np.zeros(0, np.uint8)
    harness = case.begin(describe_delta(case.anchor, OLDER, nothing), nothing)
    assert harness.take() == []
    assert harness.fetch.finish() is not None
    case.assert_arrived()


def test_a_wrong_chunk_of_a_push_is_asked_for(tmp_path: Path) -> None:
    case = Case(tmp_path)
    assert case.delta.num_chunks == 2
    damaged = case.payload.copy()
    damaged[5] ^= 1
    harness = case.begin(case.delta, damaged)
    assert not harness.fetch.complete
    (request,) = harness.take()
    asked = parse_body(request, messages.ChunkRequest)
    assert (asked.policy_version, messages.policy_version(asked.parent), asked.index) == (VERSION, OLDER, 0)
    harness.fetch.handle(messages.chunk_reply(VERSION, OLDER, 0, case.payload[:CHUNK]))
    assert harness.fetch.finish() == case.delta
    case.assert_arrived()


def test_a_push_that_gives_other_bytes_is_followed_by_the_anchor(tmp_path: Path) -> None:
    for wrong in ("total", "bytes"):
        case = Case(tmp_path)
        manifest, payload = case.delta, case.payload
        if wrong == "total":
            manifest = replace(manifest, total_hash=bytes(16))
        else:
            payload = np.random.default_rng(0).integers(0, 256, payload.size, np.uint8)
            manifest = replace(describe_delta(case.anchor, OLDER, payload), total_hash=manifest.total_hash)
        harness = case.begin(manifest, payload)
        assert harness.fetch.complete
        assert harness.fetch.finish() is None
        assert_holds_nothing(case.base)
        (request,) = harness.take()
        assert parse_body(request, messages.ManifestRequest).have is None
        harness.fetch.handle(messages.manifest_reply(case.anchor))
        run_to_end(harness, case.anchor, case.data)
        case.assert_arrived()


def test_a_push_of_other_tensors_is_followed_by_the_anchor(tmp_path: Path) -> None:
    case = Case(tmp_path)
    other = changed(*snapshot(num_bytes=40_000, version=OLDER), VERSION, seed=1)
    harness = case.begin(other[0], other[1])
    (request,) = harness.take()
    assert parse_body(request, messages.ManifestRequest).have is None
    harness.fetch.handle(messages.manifest_reply(case.anchor))
    run_to_end(harness, case.anchor, case.data)
    case.assert_arrived()


def test_a_push_of_another_run_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path)
    with pytest.raises(ProtocolError, match="this is run 'run'"):
        case.begin(replace(case.delta, run_id="other"), case.payload)
    assert case.base.version == OLDER


def test_a_relay_takes_a_push_and_keeps_it() -> None:
    old, old_data = snapshot(version=OLDER)
    manifest, payload, data = changed(old, old_data, VERSION, seed=1)
    store = WeightStore(max_bytes=2 * data.size)
    run_to_end(Harness(StoreSink(store), version=OLDER), old, old_data)
    harness = Harness(StoreSink(store))
    harness.take()
    harness.fetch.start(Payload(manifest, payload))
    assert (harness.take(), harness.fetch.finish()) == ([], manifest)
    base, kept = store.base, store.delta(VERSION, OLDER)
    assert base is not None
    assert kept is not None
    assert (base.version, base.data.tobytes(), kept.data.tobytes()) == (VERSION, data.tobytes(), payload.tobytes())
