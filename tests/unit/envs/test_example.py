"""The environment that the README shows is complete, short, and solved by its reference policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from envs.interface import Split
from envs.play import play
from envs.registry import create_environment
from tests.unit.envs import example_environment

NAME = "tests.unit.envs.example_environment:LettersEnvironment"


@pytest.mark.parametrize("split", ["train", "heldout"])
async def test_the_reference_policy_solves_it_through_the_tool(split: Split) -> None:
    environment = create_environment(NAME)
    for index in range(4):
        task = environment.task(split, index)
        played = await play(environment, task, environment.reference(task))
        assert played.reward.total == 1.0
        assert played.done
        assert [call.name for call in played.tool_calls] == ["count_letters"]


def test_it_has_at_most_thirty_lines_of_code() -> None:
    lines = Path(str(example_environment.__file__)).read_text().splitlines()
    assert len([line for line in lines if line.strip() and not line.strip().startswith(('"""', "#"))]) <= 30
