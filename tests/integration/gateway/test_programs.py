"""Real programs through a real gateway, in the sandbox and outside of it; the reference policy answers them."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from broker.protocol.trajectory import Outcome
from envs.program.examples.shop import ShopProgram
from tests.integration.gateway.words import WordProgram, reference_episode

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


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "boxed"])
async def test_javascript_without_any_package_over_a_stream(trusted: bool) -> None:
    await check(WordProgram("stream.mjs", "node", trusted=trusted))


async def test_the_example_is_solved_by_its_reference() -> None:
    example = ShopProgram(demonstrations="careless", trusted=True)
    trajectory, texts = await reference_episode(example)  # type: ignore[arg-type]
    assert trajectory.head.reward in (0.0, 1.0)
    assert trajectory.head.num_turns == 3
    assert len(texts) == 1
    assert "[<tool>price " in texts[0]
