"""What deltas cost a server: all are counted, and one on its way to a slow peer takes the others' room."""

from __future__ import annotations

import numpy as np

from broker.protocol import weight_messages as messages
from broker.protocol.frames import Frame, encode
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Bytes, Manifest, describe, describe_delta, lay_out
from broker.weights.chain import KEPT_SHARE, DeltaChain, FoldJob, Payload

LAYOUT = lay_out([("w", "uint8", (100_000,))])
SIZE = 1000


def version(number: int) -> PolicyVersion:
    return PolicyVersion(1, number)


def manifest(number: int, data: Bytes) -> Manifest:
    anchor = describe("run", version(number), LAYOUT, np.zeros(100_000, np.uint8), 4096, 1.75e9)
    return describe_delta(anchor, version(number - 1), data)


def link(number: int, size: int = SIZE) -> Payload:
    data = np.full(size, number, np.uint8)
    return Payload(manifest(number, data), data)


def on_its_way(delta: Payload) -> list[Frame]:
    """As ZeroMQ holds it for a peer that does not read: memory, and nothing of ours."""
    key = delta.version, delta.manifest.parent
    return encode(messages.chunk_reply(*key, 0, delta.chunk(0)))


def held(chain: DeltaChain) -> list[int]:
    return [number for number in range(40) if chain.held((version(number), version(number - 1))) is not None]


def test_what_is_forgotten_and_on_its_way_counts_until_it_is_gone() -> None:
    chain = DeltaChain(3 * SIZE)
    slow: list[list[Frame]] = []
    for number in range(1, 4):
        delta = link(number)
        slow.append(on_its_way(delta))
        chain.append(delta, ())
        del delta
    assert (held(chain), chain.num_bytes) == ([1, 2, 3], 3 * SIZE)
    chain.append(link(4), ())  # the oldest is forgotten, and frees nothing; so do the others
    assert (held(chain), chain.num_bytes) == ([], 3 * SIZE)
    assert bytes(slow[0][2]) == bytes([1]) * SIZE
    slow.pop()
    assert chain.num_bytes == 2 * SIZE
    chain.append(link(5), ())
    assert (held(chain), chain.num_bytes) == ([5], 3 * SIZE)
    slow.clear()
    assert chain.num_bytes == SIZE
    chain.append(link(6), ())
    chain.append(link(7), ())
    assert (held(chain), chain.num_bytes) == ([5, 6, 7], 3 * SIZE)


def test_deltas_and_folds_have_a_share_of_the_snapshot_but_for_the_newest() -> None:
    """What is beyond that costs more memory than it is likely to save; the newest is what everybody wants."""
    share = 100_000 // KEPT_SHARE
    deltas = DeltaChain(1 << 30)
    for number in range(1, 40):
        deltas.append(link(number, share // 3), ())
    assert held(deltas) == [37, 38, 39]
    deltas.append(link(40, 2 * share), ())
    assert held(deltas) == []
    assert deltas.held((version(40), version(39))) is not None
    deltas = DeltaChain(1 << 30)
    for number in range(1, 4):
        deltas.append(link(number, 10), ())
    for have, size in ((0, share // 2), (1, share // 2 + 1)):
        deltas.add_fold((version(3), version(have)), link(9, size), ())
    assert deltas.held((version(3), version(0))) is None
    assert deltas.held((version(3), version(1))) is not None
    deltas.add_fold((version(3), version(0)), link(9, 2 * share), {(version(3), version(1))})
    assert deltas.held((version(3), version(0))) is not None
    assert deltas.held((version(3), version(1))) is not None  # it is being fetched


def test_one_payload_on_its_way_to_many_counts_once() -> None:
    chain = DeltaChain(2 * SIZE)
    delta = link(1)
    slow = [on_its_way(delta) for _ in range(5)]
    chain.append(delta, ())
    del delta
    chain.clear()
    assert chain.num_bytes == SIZE
    slow.pop()
    assert chain.num_bytes == SIZE
    slow.clear()
    assert chain.num_bytes == 0


def test_a_payload_that_is_a_view_counts_as_what_it_keeps_alive() -> None:
    chain = DeltaChain(10 * SIZE)
    memory = np.zeros(4 * SIZE, np.uint8)
    data = memory[:SIZE]
    delta = Payload(manifest(1, data), data)
    slow = on_its_way(delta)
    chain.append(delta, ())
    del memory, data, delta
    chain.clear()
    assert chain.num_bytes == 4 * SIZE
    del slow
    assert chain.num_bytes == 0


def test_a_forgotten_fold_on_its_way_counts_too() -> None:
    chain = DeltaChain(10 * SIZE)
    for number in range(1, 4):
        chain.append(link(number), ())
    fold = link(9, 700)
    key = version(3), version(0)
    slow = on_its_way(fold)
    chain.add_fold(key, fold, ())
    del fold
    assert chain.num_bytes == 3 * SIZE + 700
    chain.append(link(4), ())
    assert chain.held(key) is None
    assert chain.num_bytes == 4 * SIZE + 700
    del slow
    assert chain.num_bytes == 4 * SIZE


def test_deltas_in_a_fold_that_is_being_made_are_counted() -> None:
    chain = DeltaChain(4 * SIZE)
    for number in range(1, 4):
        chain.append(link(number), ())
    job = chain.find(version(3), version(0))
    assert isinstance(job, FoldJob)
    chain.clear()
    assert chain.num_bytes == 3 * SIZE
    del job
    assert chain.num_bytes == 0
