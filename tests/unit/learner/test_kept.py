"""The trajectories that are kept for people: within their bound, groups whole, the newest complete, over restarts."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from broker.protocol.kept import FOLDER, Kept, file_name, read_records, unpack_kept
from broker.protocol.trajectory import PolicyVersion, Segment, Trajectory, VersionRun
from learner.kept import NUM_FILES, NUM_NEWEST, Keeper, closed_files, is_of_level
from tests.unit.learner.make import make_segment, make_ticket, make_trajectory

BOUND = 512 << 10
GROUP = 4


def place() -> tuple[int, PolicyVersion]:
    return 5, PolicyVersion(2, 29)


def of_group(group: int, num_tokens: int = 64) -> list[Trajectory]:
    ids = np.arange(num_tokens, dtype=np.int32)
    mask = np.ones(num_tokens, np.bool_)
    segment = Segment(ids, mask, np.zeros(num_tokens, np.float32), (VersionRun(1, group, num_tokens),))
    return [make_trajectory(make_ticket(group, member, GROUP), segment=segment) for member in range(GROUP)]


def kept(run_dir: Path) -> list[Kept]:
    files = [file.path for file in closed_files(run_dir / FOLDER)]
    return [unpack_kept(record) for path in files for _, _, record in read_records(path.read_bytes())[0]]


def num_bytes(run_dir: Path) -> int:
    return sum(path.stat().st_size for path in (run_dir / FOLDER).iterdir())


def test_everything_is_kept_while_there_is_room(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, BOUND, place)
    for trajectory in of_group(0):
        keeper.keep(trajectory, "trained")
    keeper.keep(make_trajectory(make_ticket(1)), "evaluated", "after/greedy")
    found = kept(tmp_path)  # while it is being written
    assert [each.trajectory.ticket.group_id for each in found] == ["run/train/0"] * GROUP + ["run/train/1"]
    assert [each.facts.fate for each in found] == ["trained"] * GROUP + ["evaluated"]
    assert (found[-1].facts.evaluation, found[0].facts.step, found[0].facts.lineage) == ("after/greedy", 5, 2)
    keeper.close()


def test_the_bound_holds_and_the_sample_is_of_whole_groups_over_the_whole_run(tmp_path: Path) -> None:
    num_groups = 800  # about eight times what there is room for
    keeper = Keeper(tmp_path, BOUND, place)
    for group in range(num_groups):
        for trajectory in of_group(group):
            keeper.keep(trajectory, "trained")
        if group % 10 == 0:
            assert num_bytes(tmp_path) <= BOUND
    keeper.close()
    groups = Counter(each.trajectory.ticket.task.index for each in kept(tmp_path))
    assert sum(size != GROUP for size in groups.values()) <= 2, "but for those at the border of two files"
    assert num_bytes(tmp_path) > BOUND // 2, "a good part of the room is used"
    assert set(range(num_groups - 24, num_groups)) <= set(groups), "the newest are complete"
    old = sorted(group for group in groups if group < num_groups // 2)
    first, second = sum(group < num_groups // 4 for group in old), sum(group >= num_groups // 4 for group in old)
    assert min(first, second) > 0.4 * max(first, second), "both quarters are in the sample, one no more than the other"
    levels = [file.level for file in closed_files(tmp_path / FOLDER)][: -NUM_NEWEST - 1]
    assert max(levels) - min(levels) <= 1


def test_a_later_process_goes_on_in_a_file_of_its_own(tmp_path: Path) -> None:
    for group in (0, 1):
        keeper = Keeper(tmp_path, BOUND, place)
        for trajectory in of_group(group):
            keeper.keep(trajectory, "trained")
        if group:
            keeper.close()  # the first was killed
    assert [file.number for file in closed_files(tmp_path / FOLDER)] == [1, 2]
    assert len(kept(tmp_path)) == 2 * GROUP


def test_a_smaller_bound_holds_from_the_beginning(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, BOUND, place)
    for group in range(100):
        for trajectory in of_group(group):
            keeper.keep(trajectory, "trained")
    keeper.close()
    assert num_bytes(tmp_path) > BOUND // 4
    Keeper(tmp_path, BOUND // 4, place).close()
    assert num_bytes(tmp_path) <= BOUND // 4


def test_what_a_killed_thinning_left_behind_is_removed(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, BOUND, place)
    for trajectory in of_group(0):
        keeper.keep(trajectory, "trained")
    keeper.close()
    folder = tmp_path / FOLDER
    (folder / file_name(1, 1)).write_bytes((folder / file_name(1, 0)).read_bytes())
    (file,) = closed_files(folder)
    assert file.level == 1
    assert [path.name for path in folder.iterdir()] == [file_name(1, 1)]


def test_a_damaged_file_is_given_up_when_it_would_be_thinned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / file_name(1, 0)).write_bytes(b"\xc1" * BOUND)
    Keeper(tmp_path, BOUND, place).close()
    assert num_bytes(tmp_path) == 0
    assert "damaged and given up" in caplog.text


def test_one_that_is_larger_than_a_file_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keeper = Keeper(tmp_path, BOUND, place)
    for trajectory in of_group(0, num_tokens=BOUND // NUM_FILES):
        keeper.keep(trajectory, "trained")
    keeper.close()
    assert keeper.num_too_large == GROUP
    assert kept(tmp_path) == []
    assert caplog.text.count("too large to be kept") == 1


def test_one_that_is_not_well_formed_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = make_segment()
    poison = Segment(good.token_ids_T, good.loss_mask_T, good.logprobs_T * np.float32(np.nan), good.version_runs)
    keeper = Keeper(tmp_path, BOUND, place)
    keeper.keep(make_trajectory(segment=poison), "not_finite")
    keeper.close()
    assert kept(tmp_path) == []
    assert "not well-formed" in caplog.text


def test_a_bound_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, 0, place)
    keeper.keep(make_trajectory(), "trained")
    keeper.close()
    assert not list(tmp_path.iterdir())


def test_levels_are_nested_and_halve() -> None:
    names = [f"run/train/{number}" for number in range(4096)]
    levels = [{name for name in names if is_of_level(name, level)} for level in range(4)]
    assert levels[0] == set(names)
    for more, fewer in itertools.pairwise(levels):
        assert fewer < more
        assert 0.4 < len(fewer) / len(more) < 0.6
