"""Whose folder a run may use: a new one, its own unfinished one, never a finished one."""

import json
from pathlib import Path

import pytest

from broker.process.config import load_settings, save_settings
from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from deploy.local import Supervisor
from deploy.run import CONFIG, SUMMARY, check_environments, claim, finish


def settings(tmp_path: Path, *overrides: str) -> Settings:
    return load_settings(None, [f"run.directory={tmp_path}", "run.name=job", *overrides], {})


def begin(run: Settings) -> Settings:
    claimed = claim(run, new=False)
    save_settings(claimed, claimed.run_dir / CONFIG)
    return claimed


def test_a_new_run_gets_its_folder(tmp_path: Path) -> None:
    assert begin(settings(tmp_path)).run_dir == tmp_path / "job"


def test_an_unfinished_run_goes_on_whatever_the_model_was_resolved_to(tmp_path: Path) -> None:
    begin(settings(tmp_path, "model.path=/resolved"))
    assert claim(settings(tmp_path), new=False).run_dir == tmp_path / "job"


def test_an_unfinished_run_with_other_settings_is_not_touched(tmp_path: Path) -> None:
    begin(settings(tmp_path))
    with pytest.raises(ErgonError, match=r"learner\.num_steps: 16 there, 3 here"):
        claim(settings(tmp_path, "learner.num_steps=3"), new=False)


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    run = begin(settings(tmp_path))
    (run.run_dir / SUMMARY).write_text("{}")
    assert claim(settings(tmp_path), new=False).run.name == "job-2"
    assert claim(settings(tmp_path), new=False).run.name == "job-3"


def test_new_takes_a_free_name(tmp_path: Path) -> None:
    begin(settings(tmp_path))
    assert claim(settings(tmp_path), new=True).run.name == "job-2"


def test_the_summary_gets_the_wall_time_and_the_restarts(tmp_path: Path) -> None:
    run = begin(settings(tmp_path))
    (run.run_dir / SUMMARY).write_text('{"steps": 3, "wall_s": 0}')
    summary = finish(run, 0.0, Supervisor(run.supervisor, []))
    assert summary["steps"] == 3
    assert summary["wall_s"] > 1e9
    assert json.loads((run.run_dir / SUMMARY).read_text()) == summary


def test_an_unknown_environment_is_told_before_anything_starts() -> None:
    with pytest.raises(ErgonError, match=r"environments: .*shop"):
        check_environments(Settings.model_validate({"environments": [{"name": "sho"}]}))
