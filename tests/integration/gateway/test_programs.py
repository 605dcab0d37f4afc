"""Real programs through a real gateway, in the sandbox and outside of it; the reference policy answers them."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from broker.protocol.trajectory import Outcome
from envs.interface import Action, ToolCall
from envs.program.examples.shop import ShopProgram
from envs.registry import create_environment
from tests.integration.gateway.words import AGENTS, WordProgram, reference_episode
from tests.unit.actors.conversations import make_renderer

PACKAGES = Path(sysconfig.get_path("purelib"))
NODE = shutil.which("node", path="/usr/bin")
SEGMENT = (
    "<|im_start|>system\nTools:\n<tool>look WORD</tool> Look a word up.<|im_end|>\n"
    "<|im_start|>user\nSay word 3.<|im_end|>\n<|im_start|>assistant\n[<tool>look 3</tool><|im_end|>]\n"
    "<|im_start|>tool\nw3<|im_end|>\n<|im_start|>assistant\n[w3<|im_end|>]"
)


async def check(environment: WordProgram) -> None:
    trajectory, texts = await reference_episode(environment)
    head = trajectory.head
    assert (head.outcome, head.reward, head.num_turns, head.num_tool_calls) == (Outcome.COMPLETED, 1.0, 2, 1)
    assert texts == [SEGMENT]


async def test_the_openai_sdk_in_a_trusted_program() -> None:
    await check(WordProgram("openai_sdk.py", "python", trusted=True))


async def test_the_openai_sdk_in_the_sandbox() -> None:
    if not all(directory.stat().st_mode & 0o001 for directory in [PACKAGES, *PACKAGES.parents]):
        pytest.skip(f"the sandbox's user may not enter {PACKAGES}")
    packages = {"mounts": {"/opt/packages": str(PACKAGES)}, "variables": {"PYTHONPATH": "/opt/packages"}}
    await check(WordProgram("openai_sdk.py", "python3", **packages))


async def test_the_openai_sdk_with_a_policy_that_speaks_and_thinks_as_qwen_does() -> None:
    """The budget ends the second thought; what the program was told of the first comes back as it was said."""
    renderer = make_renderer("qwen3")
    turns = [
        Action("", (ToolCall("look", {"word": "3"}),), thinking="look"),
        Action("w3", thinking="one two three four five six seven eight nine ten eleven twelve"),
    ]
    program = WordProgram("openai_sdk.py", "python", turns=turns, trusted=True)
    trajectory, (text,) = await reference_episode(program, renderer, budget=24)
    head = trajectory.head
    assert (head.outcome, head.reward, head.num_turns, head.num_tool_calls) == (Outcome.COMPLETED, 1.0, 2, 1)
    assert (head.num_forced_stops, head.num_overrun_tokens) == (1, 0)
    call = '<tool_call>\n{"name": "look", "arguments": {"word": "3"}}\n</tool_call>'
    assert (
        "Think for at most 24 tokens in each turn.<|im_end|>\n<|im_start|>assistant\n[<think>\nlook\n</think>" in text
    )
    assert f"{call}<|im_end|>]\n<|im_start|>user\n<tool_response>\nw3\n</tool_response><|im_end|>" in text
    assert text.endswith("] Time is up, so I answer with what I have.</think>\n\n[w3<|im_end|>]")


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "boxed"])
async def test_javascript_without_any_package_over_a_stream(trusted: bool) -> None:
    await check(WordProgram("stream.mjs", "node", trusted=trusted))


VERIFIER = """
import json
from pathlib import Path
answer = Path("program/artifacts/answer.txt").read_text()
assert json.loads(Path("program/result.json").read_text())["exit_code"] == 0
print("looked at", answer)
print(json.dumps({"reward": 0.75, "components": {"right": float(answer == Path("expected").read_text())}}))
"""


async def test_a_folder_is_a_task_with_its_verifier_in_a_sandbox_of_its_own(tmp_path: Path) -> None:
    for split in ("train", "heldout"):
        folder = tmp_path / split / "say"
        for name in ("files", "verifier"):
            (folder / name).mkdir(parents=True)
        (folder / "task.md").write_text("Say w3.")
        (folder / "files" / "agent.py").write_bytes((AGENTS / "plain.py").read_bytes())
        (folder / "verifier" / "verify.py").write_text(VERIFIER)
        (folder / "verifier" / "expected").write_text("w3")
        (folder / "reference.json").write_text('["w3"]')
    options = {
        "tasks": str(tmp_path),
        "command": ["python3", "agent.py"],
        "artifacts": ["answer.txt"],
        "verifier": ["python3", "verify.py"],
    }
    environment = create_environment("program", options)
    await environment.prepare()
    trajectory, texts = await reference_episode(environment)
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.COMPLETED, 0.75)
    assert trajectory.head.reward_components == {"right": 1.0}
    assert texts == ["<|im_start|>user\nSay w3.<|im_end|>\n<|im_start|>assistant\n[w3<|im_end|>]"]


async def test_the_example_is_solved_by_its_reference() -> None:
    example = ShopProgram(demonstrations="careless", trusted=True)
    trajectory, texts = await reference_episode(example)
    assert trajectory.head.reward in (0.0, 1.0)
    assert trajectory.head.num_turns == 3
    assert len(texts) == 1
    assert "[<tool>price " in texts[0]
