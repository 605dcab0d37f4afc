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


def smolagents(agent: str, *turns: Action) -> WordProgram:
    packages = {"PYTHONPATH": str(Path(CLIENTS, "python"))}
    return WordProgram(agent, "python", turns=turns, trusted=True, variables=packages)


async def test_smolagents_tool_caller_works_unchanged_and_its_own_words_are_context() -> None:
    """It asks for a call in every turn, and tells the policy's calls back in its own words: so every turn begins anew,
    and what is trained on is still just what was said, after just what was shown."""
    look, answer = ToolCall("look", {"word": "3"}), ToolCall("final_answer", {"answer": "w3"})
    trajectory, texts = await reference_episode(smolagents("smol.py", Action("", (look,)), Action("", (answer,))))
    head = trajectory.head
    assert (head.outcome, head.reward, head.num_turns, head.num_tool_calls) == (Outcome.COMPLETED, 1.0, 2, 2)
    first, second = texts
    assert first.endswith("Say word 3.<|im_end|>\n<|im_start|>assistant\n<tool>[look 3</tool><|im_end|>]")
    assert "<|im_start|>assistant\nCalling tools:" in second
    assert second.endswith(
        "Observation:\nw3<|im_end|>\n<|im_start|>assistant\n<tool>[final_answer w3</tool><|im_end|>]"
    )


async def test_smolagents_code_writer_is_one_segment_although_it_stops_every_turn() -> None:
    looking, answering = '<code>\nprint(look("3"))\n</code>', '<code>\nfinal_answer("w3")\n</code>'
    trajectory, texts = await reference_episode(smolagents("smol_code.py", Action(looking), Action(answering)))
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.COMPLETED, 1.0)
    (text,) = texts
    assert f"<|im_start|>assistant\n[{looking}]\nCalling tools:" in text  # it adds words of its own to the turn
    assert text.endswith(f"<|im_start|>assistant\n[{answering}]")
