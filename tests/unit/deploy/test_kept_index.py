"""The index of kept trajectories: follows what is written, filters, sorts and pages, survives thinning and damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.protocol.kept import FOLDER, Kept, KeptFacts, file_name, pack_kept
from broker.protocol.trajectory import Mode, Outcome, PolicyVersion
from deploy.report.kept import Filter, Index
from learner.kept import Keeper
from tests.unit.deploy.recorded import episode, keep, make_settings


def names(index: Index, chosen: Filter, sort: str = "finished_at", **options: bool) -> list[str]:
    return [row["ticket_id"] for row in index.page(chosen, sort, 0, 100, **options)]


def test_it_follows_a_file_that_is_being_written(tmp_path: Path) -> None:
    index = Index(tmp_path)
    assert (index.refresh(), index.count()) == (0, 0)
    keeper = Keeper(tmp_path, 1 << 20, lambda: (3, PolicyVersion(1, 3)))
    keeper.keep(episode(0), "trained")
    assert (index.refresh(), index.count()) == (1, 1)
    keeper.keep(episode(1), "stale")
    with (tmp_path / FOLDER / file_name(1, 0)).open("ab") as file:
        file.write(pack_kept(Kept(KeptFacts(step=1, lineage=1, version=1, fate="trained"), episode(2)))[:-3])
    assert (index.refresh(), index.count()) == (1, 2)
    assert index.num_damaged == 0
    row = index.find("made/train/0/1")
    assert row is not None
    assert (row["fate"], row["step"], row["turns"], row["seconds"], row["versions"]) == ("stale", 3, 1, 1.5, 1)
    loaded = index.load("made/train/0/1")
    assert loaded is not None
    assert loaded.trajectory.ticket.ticket_id == "made/train/0/1"
    assert index.load("made/train/9/9") is None


@pytest.fixture
def index(tmp_path: Path) -> Index:
    settings = make_settings(tmp_path)
    keep(settings, [episode(n, reward=n / 10, kind="boxes" if n % 2 else "change") for n in range(6)], step=1)
    late = [episode(6, env="code", outcome=Outcome.TIMEOUT, reward=0.0), episode(7, mode=Mode.EVAL, reward=1.0)]
    keep(settings, late, step=9)
    found = Index(settings.run_dir)
    found.refresh()
    return found


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (Filter(), [7, 6, 5, 4, 3, 2, 1, 0]),
        (Filter(env="code"), [6]),
        (Filter(kind="boxes", mode="train"), [6, 5, 3, 1]),
        (Filter(outcome="timeout"), [6]),
        (Filter(evaluation="after/greedy"), [7]),
        (Filter(fate="evaluated"), [7]),
        (Filter(step_from=2), [7, 6]),
        (Filter(step_to=1, reward_from=0.35), [5, 4]),
        (Filter(reward_to=0.1), [6, 1, 0]),
        (Filter(group="made/train/1"), [3, 2]),
        (Filter(env="' OR 1=1 --"), []),
    ],
)
def test_filters(index: Index, chosen: Filter, expected: list[int]) -> None:
    found = names(index, chosen)
    assert [int(name.rsplit("/", 1)[1]) for name in found] == expected
    assert index.count(chosen) == len(expected)


def test_sorting_paging_and_choices(index: Index) -> None:
    by_reward = names(index, Filter(mode="train"), "reward", descending=False)
    assert [name.rsplit("/", 1)[1] for name in by_reward] == ["0", "6", "1", "2", "3", "4", "5"]
    second = index.page(Filter(), "finished_at", 3, 2)
    assert [row["ticket_id"].rsplit("/", 1)[1] for row in second] == ["4", "3"]
    assert index.choices()["outcome"] == ["completed", "timeout"]
    assert index.choices()["mode"] == ["eval", "train"]
    with pytest.raises(ValueError, match="cannot sort by 'length'"):
        index.page(Filter(), "length", 0, 1)


def test_a_text_is_searched_word_for_word(index: Index) -> None:
    waiting = index.without_text()
    assert [kept.trajectory.ticket.ticket_id for kept in waiting][:2] == ["made/eval/3/7", "made/train/3/6"]
    texts = {kept.trajectory.ticket.ticket_id: f"said {n} 100% of_it" for n, kept in enumerate(waiting)}
    index.add_texts(texts)
    assert index.num_with_text() == 8
    assert index.without_text() == []
    assert len(names(index, Filter(text="SAID 3"))) == 1
    assert len(names(index, Filter(text="0% of_i"))) == 8
    for nothing in ("said%it", "of.it", "o!f", "ofxit"):
        assert names(index, Filter(text=nothing)) == []


def test_a_ticket_that_came_again_counts_once_and_the_later_one(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    keep(settings, [episode(0, reward=0.0), episode(1)], step=1, fate="trained")
    keep(settings, [episode(0, reward=0.75)], step=2, fate="zero_variance")  # the first learner had died
    index = Index(settings.run_dir)
    index.refresh()
    row = index.find("made/train/0/0")
    assert row is not None
    assert (index.count(), row["reward"], row["fate"], row["step"]) == (2, 0.75, "zero_variance", 2)


def test_files_that_are_thinned_while_they_are_looked_at(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, 64 << 10, lambda: (1, PolicyVersion(1, 1)))
    index = Index(tmp_path)
    for number in range(400):
        keeper.keep(episode(number), "trained")
        if number % 37 == 0:
            index.refresh()
            for row in index.page(Filter(), "finished_at", 0, 400):
                loaded = index.load(row["ticket_id"])
                assert loaded is not None
                assert loaded.trajectory.ticket.ticket_id == row["ticket_id"]
    stale = index.page(Filter(), "finished_at", 0, 400, descending=False)
    gone = [row["ticket_id"] for row in stale if index.load(row["ticket_id"]) is None]
    assert len(gone) < len(stale)
    index.refresh()
    fresh = Index(tmp_path)
    fresh.refresh()
    assert names(index, Filter()) == names(fresh, Filter())
    assert index.num_damaged == 0
    keeper.close()


def test_what_is_damaged_is_left_out_and_counted(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    keep(settings, [episode(0), episode(1)])
    path = settings.run_dir / FOLDER / file_name(1, 0)
    data = bytearray(path.read_bytes())
    data[data.index(b"ERGN")] ^= 1
    path.write_bytes(bytes(data))
    (settings.run_dir / FOLDER / file_name(2, 0)).write_bytes(b"\xc1\xc1")
    (settings.run_dir / FOLDER / "notes.txt").write_text("not ours")
    index = Index(settings.run_dir)
    index.refresh()
    assert names(index, Filter()) == ["made/train/0/1"]
    assert index.num_damaged == 2
