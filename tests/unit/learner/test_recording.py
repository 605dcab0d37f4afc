"""Files of trajectories: what was written comes back, what is damaged is said to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from broker.process.learner_settings import WarmStartSection
from broker.process.lifecycle import ErgonError
from broker.protocol.trajectory import Segment, Trajectory
from learner.batching import Consumed, Reason
from learner.recording import Recorder, find_recordings, read_trajectories, write_trajectories
from learner.warm_start import demonstrations
from tests.unit.learner.make import make_segment, make_ticket, make_trajectory


def same(one: Trajectory, other: Trajectory) -> bool:
    return one.head == other.head and all(
        np.array_equal(a.token_ids_T, b.token_ids_T)
        and np.array_equal(a.loss_mask_T, b.loss_mask_T)
        and np.array_equal(a.logprobs_T, b.logprobs_T, equal_nan=True)
        and a.version_runs == b.version_runs
        for a, b in zip(one.segments, other.segments, strict=True)
    )


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    two = Trajectory(make_trajectory(make_ticket(1)).head, (make_segment((1,), (2,)), make_segment((3, 4), (5, 6))))
    written = [make_trajectory(make_ticket(0), 0.5), two]
    assert write_trajectories(tmp_path / "t.msgpack", written) == 2
    read = list(read_trajectories(tmp_path / "t.msgpack"))
    assert len(read) == 2
    assert all(same(a, b) for a, b in zip(written, read, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["t.msgpack"]


def test_a_poisoned_trajectory_is_kept_and_refused_by_who_checks(tmp_path: Path) -> None:
    good = make_segment()
    poison = Segment(good.token_ids_T, good.loss_mask_T, good.logprobs_T * np.float32(np.nan), good.version_runs)
    written = make_trajectory(segment=poison)
    write_trajectories(tmp_path / "t.msgpack", [written])
    (read,) = read_trajectories(tmp_path / "t.msgpack", checked=False)
    assert same(written, read)
    with pytest.raises(ErgonError, match="log-prob nan"):
        list(read_trajectories(tmp_path / "t.msgpack"))


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "t.msgpack"
    write_trajectories(path, [make_trajectory(), make_trajectory(make_ticket(1))])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ErgonError, match="cut short at byte"):
        list(read_trajectories(path))
    path.write_bytes(b"\x93abc")
    with pytest.raises(ErgonError, match="no file of trajectories"):
        list(read_trajectories(path))
    with pytest.raises(ErgonError, match="cannot be read: No such file"):
        list(read_trajectories(tmp_path / "nothing"))
    with pytest.raises(ErgonError, match="has no recorded trajectories"):
        find_recordings([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ErgonError, match="has no recorded trajectories"):
        find_recordings([tmp_path / "empty"])


def test_recorded_episodes_are_demonstrations(tmp_path: Path) -> None:
    references = [make_trajectory(make_ticket(0), 1.0)]
    write_trajectories(
        tmp_path / "b.msgpack", [make_trajectory(make_ticket(1), 1.0), make_trajectory(make_ticket(2), 0.0)]
    )
    write_trajectories(tmp_path / "a.msgpack", [make_trajectory(make_ticket(3), 1.0)])
    section = WarmStartSection(files=(tmp_path,), min_reward=1.0)
    assert [t.ticket.task.index for t in demonstrations(references, section)] == [0, 3, 1]
    with pytest.raises(ErgonError, match="none of the 4 demonstrations"):
        demonstrations(references, section.model_copy(update={"min_reward": 2.0}))


def test_the_recorder_forgets_the_history_that_was_lost(tmp_path: Path) -> None:
    batch = [
        Consumed(make_trajectory(make_ticket(0, 0), 1.0), Reason.TRAINED),
        Consumed(make_trajectory(make_ticket(0, 1), 0.0), Reason.TRAINED),
        Consumed(make_trajectory(make_ticket(1, 0), 1.0), Reason.SURPLUS),
    ]
    Recorder(tmp_path / "none", "none", 1.0, 0).add(batch, 3)
    assert not (tmp_path / "none").exists()
    recorder = Recorder(tmp_path / "r", "passed", 1.0, 0)
    recorder.add(batch, 3)
    recorder.add(batch, 6)
    assert [p.name for p in find_recordings([tmp_path / "r"])] == ["000000000003.msgpack", "000000000006.msgpack"]
    assert [t.head.reward for t in read_trajectories(tmp_path / "r" / "000000000003.msgpack")] == [1.0]
    Recorder(tmp_path / "r", "all", 1.0, 3).add(batch, 5)
    assert [p.name for p in find_recordings([tmp_path / "r"])] == ["000000000003.msgpack", "000000000005.msgpack"]
    assert len(list(read_trajectories(tmp_path / "r" / "000000000005.msgpack"))) == 2
