"""Other people's clients, unchanged: the npm package `openai`, and smolagents. `make test-gateway-clients`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from broker.protocol.trajectory import Outcome
from envs.interface import Action, ToolCall
from tests.integration.gateway.words import WordProgram, reference_episode

CLIENTS = os.environ.get("ERGON_GATEWAY_CLIENTS", "")
pytestmark = pytest.mark.skipif(not CLIENTS, reason="needs packages from npm and PyPI: make test-gateway-clients")


async def test_the_npm_package_openai_speaks_the_responses_api_from_the_sandbox() -> None:
    modules = {"/workspace/node_modules": str(Path(CLIENTS, "node_modules"))}
    trajectory, texts = await reference_episode(WordProgram("openai_sdk.mjs", "node", mounts=modules))
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.COMPLETED, 1.0)
    assert [text.count("[") for text in texts] == [2]


async def test_smolagents_works_unchanged_and_its_own_words_are_context() -> None:
    """It asks for a call in every turn, and tells the policy's calls back in its own words: so every turn begins anew,
    and what is trained on is still just what was said, after just what was shown."""
    turns = [
        Action("", (ToolCall("look", {"word": "3"}),)),
        Action("", (ToolCall("final_answer", {"answer": "w3"}),)),
    ]
    environment = WordProgram(
        "smol.py", "python", turns=turns, trusted=True, variables={"PYTHONPATH": str(Path(CLIENTS, "python"))}
    )
    trajectory, texts = await reference_episode(environment)
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.COMPLETED, 1.0)
    assert (trajectory.head.num_turns, trajectory.head.num_tool_calls) == (2, 2)
    first, second = texts
    assert first.endswith("<|im_start|>assistant\n<tool>[look 3</tool><|im_end|>]")
    assert second.endswith("<tool>[final_answer w3</tool><|im_end|>]") or second.endswith('"w3"}</tool><|im_end|>]')
    assert second.count("[") == second.count("[", second.rindex("<tool>")) + second[: second.rindex("<tool>")].count("[")
