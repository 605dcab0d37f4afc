"""Every run file that the project ships is one that a run takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.process.config import load_settings
from envs.registry import create_environment

RUNS = sorted((Path(__file__).parents[3] / "deploy" / "runs").glob("*.toml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_it_loads_and_its_environments_can_be_made(path: Path) -> None:
    settings = load_settings(path)
    assert settings.run.name == path.stem
    for section in settings.environments:
        assert create_environment(section.name, section.options).task("train", 0).prompt


def test_there_are_some() -> None:
    assert {"quickstart", "thinking", "gateway"} <= {path.stem for path in RUNS}
