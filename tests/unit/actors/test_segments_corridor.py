"""Trajectories of several segments on their whole way: episode, wire, batch, micro-batch, recording, audit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from broker.process.loss_settings import LossSection
from broker.protocol.codec import pack_trajectories, unpack_trajectories
from broker.protocol.frames import decode, encode
from broker.protocol.trajectory import Segment, Trajectory
from envs.interface import Message, Observation
from learner.audit import audit_lines
from learner.batching import Batcher
from learner.losses.aggregation import token_weights
from learner.recording import Recorder, find_recordings, read_trajectories
from learner.training.packing import pack
from tests.unit.actors.support import make_ticket
from tests.unit.actors.test_segments import SUMMARY, TOLD, Edited, look

SAMPLING = {"max_turns": 9}


async def group() -> list[Trajectory]:
    """One episode of three segments and a reward, one of a single segment and none."""
    edits = {1: Observation(history=(TOLD,)), 2: Observation((Message("tool", "w3"),), history=SUMMARY)}
    tickets = [structs.replace(make_ticket(f"t{number}", sampling=SAMPLING), group_size=2) for number in (1, 2)]
    return [
        await Edited([look(), look(), look(), "w3"], edits, tickets[0])(),
        await Edited([look(), "no"], {}, tickets[1])(),
    ]


def same(one: Segment, other: Segment) -> bool:
    return (
        np.array_equal(one.token_ids_T, other.token_ids_T)
        and np.array_equal(one.loss_mask_T, other.loss_mask_T)
        and np.array_equal(one.logprobs_T, other.logprobs_T)
        and one.version_runs == other.version_runs
    )


async def test_every_sampled_token_of_every_segment_is_trained_on_once(tmp_path: Path) -> None:
    made = await group()
    assert [len(trajectory.segments) for trajectory in made] == [3, 1]
    received = unpack_trajectories(decode([bytes(frame) for frame in encode(pack_trajectories(made))]))
    for sent, got in zip(made, received, strict=True):
        assert all(same(a, b) for a, b in zip(sent.segments, got.segments, strict=True))

    batcher = Batcher(groups_per_step=1, max_groups_per_step=1, group_size=2, max_staleness=9, loss=LossSection())
    assert all(batcher.add(trajectory) for trajectory in received)
    batch = batcher.next(9)
    assert batch is not None
    assert len(batch.sequences) == 4
    assert [s.advantage for s in batch.sequences[:3]] == [batch.sequences[0].advantage] * 3

    weights = token_weights(batch.sequences, "sequence")
    micros = pack(batch.sequences, 40, weights)
    assert len(micros) > 1
    sampled = [t for trajectory in made for s in trajectory.segments for t in s.token_ids_T[s.loss_mask_T].tolist()]
    trained = [t for micro in micros for t in micro.targets_U[micro.index_N].tolist()]
    assert sorted(trained) == sorted(sampled)
    total = {sign: sum(float(m.weights_N[m.advantages_N * sign > 0].sum()) for m in micros) for sign in (1, -1)}
    assert total == pytest.approx({1: 0.5, -1: 0.5})  # of each episode, whatever its segments

    Recorder(tmp_path / "recorded", "all", 1.0, 0).add(batch.consumed, 2)
    recorded = [t for path in find_recordings([tmp_path / "recorded"]) for t in read_trajectories(path)]
    assert [len(trajectory.segments) for trajectory in recorded] == [3, 1]
    for sent, kept in zip(made, recorded, strict=True):
        assert all(same(a, b) for a, b in zip(sent.segments, kept.segments, strict=True))
    lines = list(audit_lines(batch.consumed, 1))
    assert [(line["ticket_id"], line["fate"]) for line in lines] == [("t1", "trained"), ("t2", "trained")]
