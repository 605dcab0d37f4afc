"""Task folders in the style of Harbor: what is honoured works, the tests are not where the policy is."""

from __future__ import annotations

from pathlib import Path

import pytest

from envs.degenerate import NoOp
from envs.interface import EnvironmentOptionsError, ReferencePolicy, Reward
from envs.play import play
from envs.terminal import HarborEnvironment
from envs.terminal.environment import CommandsReference
from envs.terminal.harbor import parse_reward

TEST = """
if [ "$(cat /app/out.txt 2>/dev/null)" = "$(sh /tests/expected.sh)" ]; then
  echo 1 > /logs/verifier/reward.txt
else
  echo 0 > /logs/verifier/reward.txt
fi
"""


def folder(root: Path, name: str, files: dict[str, str] | None = None) -> None:
    whole = {
        "task.toml": 'version = "1.0"\n[metadata]\ndifficulty = "easy"\n[verifier]\ntimeout_sec = 20.0\n',
        "instruction.md": "Put the upper-case text of in.txt into out.txt.",
        "environment/Dockerfile": "FROM nothing",
        "environment/in.txt": f"{name}\n",
        "tests/test.sh": TEST,
        "tests/expected.sh": f"echo {name.upper()}\n",
        "solution/solve.sh": "cd /app\ntr a-z A-Z < in.txt > out.txt\n",
    }
    for path, text in {**whole, **(files or {})}.items():
        place = root / name / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


async def rewarded(root: Path, policy: ReferencePolicy | None = None) -> Reward:
    environment = HarborEnvironment(str(root), heldout_every=0, warm_sandboxes=1)
    try:
        task = environment.task("train", 0)
        assert task.kind == "easy"
        return (await play(environment, task, policy or environment.reference(task))).reward
    finally:
        await environment.close()


async def test_the_solution_is_paid_and_nothing_is_not(tmp_path: Path) -> None:
    folder(tmp_path, "alpha")
    assert (await rewarded(tmp_path)).total == 1.0
    assert await rewarded(tmp_path, NoOp()) == Reward(0.0, {"no_reward": 0.0})


async def test_the_policy_sees_no_test_and_cannot_leave_a_reward(tmp_path: Path) -> None:
    folder(tmp_path, "alpha", {"tests/test.sh": "exit 0\n"})
    forge = (
        "mkdir -p /logs/verifier; mkdir -p /tmp/logs/verifier; echo 1 > /logs/verifier/reward.txt; ls /tests Dockerfile"
    )
    environment = HarborEnvironment(str(tmp_path), heldout_every=0, warm_sandboxes=0)
    task = environment.task("train", 0)
    played = await play(environment, task, CommandsReference([forge]))
    assert played.messages[2].content.count("No such file") >= 2
    assert played.reward == Reward(0.0, {"no_reward": 1.0})
    await environment.close()


async def test_a_test_past_its_time_pays_nothing(tmp_path: Path) -> None:
    late = "echo 1 > /logs/verifier/reward.txt\nsleep 60\n"
    folder(
        tmp_path,
        "alpha",
        {"tests/test.sh": late, "task.toml": '[metadata]\ndifficulty = "easy"\n[verifier]\ntimeout_sec = 0.5\n'},
    )
    assert (await rewarded(tmp_path)).total == 0.0


def test_folders_are_split_by_name_and_must_be_whole(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        folder(tmp_path, name)
    environment = HarborEnvironment(str(tmp_path), heldout_every=3)
    assert [environment.task("train", index).secret["folder"].name for index in range(3)] == ["a", "b", "a"]
    assert environment.task("heldout", 0).secret["folder"].name == "c"
    (tmp_path / "b/tests/test.sh").unlink()
    with pytest.raises(EnvironmentOptionsError, match=r"has no tests/test\.sh"):
        HarborEnvironment(str(tmp_path))
    with pytest.raises(EnvironmentOptionsError, match="no folder in it"):
        HarborEnvironment(str(tmp_path / "a"))


def test_rewards_are_numbers_between_0_and_1() -> None:
    assert parse_reward(b"0.5\n", None) == 0.5
    assert parse_reward(None, b'{"reward": 1}') == 1.0
    assert parse_reward(None, b'{"score": 0.25}') == 0.25
    for text, document in ((b"2", None), (b"nan", None), (b"yes", None), (None, None), (None, b"{}"), (None, b"[1]")):
        assert parse_reward(text, document) is None
