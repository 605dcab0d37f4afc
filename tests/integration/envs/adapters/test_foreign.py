"""Environments that nobody here wrote, of TextArena, OpenEnv and verifiers, played for real: `make test-adapters`."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.trajectory import Outcome
from envs.adapters.verifiers import VerifiersEnvironment
from envs.interface import Action, EnvironmentOptionsError, Message, ReferencePolicy, Task, ToolCall
from envs.play import play
from envs.registry import create_environment
from tests.integration.envs.support import children
from tests.integration.gateway.words import reference_episode

FOREIGN = os.environ.get("ERGON_FOREIGN", "")
PYTHON = f"{FOREIGN}/bin/python"
pytestmark = pytest.mark.skipif(not FOREIGN, reason="needs other people's environments: make test-adapters")


class Halving(ReferencePolicy):
    """Plays GuessTheNumber well."""

    def __init__(self) -> None:
        self.low, self.high, self.guess = 1, 20, 0

    def act(self, messages: Sequence[Message]) -> Action:
        if len(messages) > 1 and "higher" in messages[-1].content:
            self.low = self.guess + 1
        elif len(messages) > 1:
            self.high = self.guess - 1
        self.guess = (self.low + self.high) // 2
        return Action("", (ToolCall("act", {"move": f"[{self.guess}]"}),))


class Saying(ReferencePolicy):
    """Makes these moves one after the other."""

    def __init__(self, *moves: str) -> None:
        self._moves = list(moves)

    def act(self, messages: Sequence[Message]) -> Action:
        return Action("", (ToolCall("act", {"move": self._moves.pop(0)}),)) if self._moves else Action("I give up.")


HANOI = ("[A C]", "[A B]", "[C B]", "[A C]", "[B A]", "[B C]", "[A C]")


def first_free(text: str) -> str:
    """The opponent's move in TicTacToe: the free cell of the highest number."""
    cells = re.findall(r"\[(\d)\]", text.rpartition("valid moves")[2] or text) or re.findall(r"\b(\d)\b", text)
    return f"[{max(cells)}]"


async def test_guessing_a_number_is_solved_by_halving_and_not_by_guessing_wildly() -> None:
    environment = create_environment("textarena", {"id": "GuessTheNumber-v0", "python": PYTHON, "solved_at": 1.0})
    await environment.prepare()
    first = [await play(environment, environment.task("train", index), Halving(), 12) for index in range(4)]
    assert [played.reward.total for played in first] == [1.0] * 4
    assert all(played.done and "correct number" in played.messages[-1].content for played in first)
    again = await play(environment, environment.task("train", 2), Halving(), 12)
    assert again.messages == first[2].messages  # the seed is the game
    other = await play(environment, environment.task("heldout", 0), Saying("nonsense", "nonsense", "nonsense"), 5)
    assert (other.reward.total, other.done) == (0.0, True)
    gone = await play(environment, environment.task("heldout", 0), Saying(), 5)
    assert gone.reward.components == {"paid": 0.0, "ended": 0.0}
    before = children()
    await environment.close()
    await environment.close()
    assert len(children()) < len(before)


async def test_the_tower_of_hanoi_is_solved_and_another_player_has_an_opponent() -> None:
    hanoi = create_environment("textarena", {"id": "TowerOfHanoi-v0", "python": PYTHON})
    played = await play(hanoi, hanoi.task("train", 0), Saying(*HANOI), 10)
    assert (played.done, played.reward.total) == (True, 1.0)
    assert "Current Board" in played.messages[0].content
    await hanoi.close()
    options = {"id": "TicTacToe-v0", "python": PYTHON, "num_players": 2, "opponent": f"{__name__}:first_free"}
    game = create_environment("textarena", options)
    played = await play(game, game.task("train", 0), Saying("[0]", "[1]", "[2]"), 5)
    assert (played.done, played.reward.total) == (True, 1.0), played.messages
    await game.close()


async def test_a_game_that_is_none_is_named() -> None:
    environment = create_environment("textarena", {"id": "NoSuchGame-v0", "python": PYTHON})
    with pytest.raises(EnvironmentOptionsError, match="NoSuchGame-v0"):
        await environment.prepare()
    with pytest.raises(EnvironmentOptionsError, match="pip install textarena"):
        create_environment("textarena", {"id": "x", "python": "/no/such/python"})


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that `openenv init` writes."""
    folder = tmp_path_factory.mktemp("openenv")
    command = [f"{FOREIGN}/bin/openenv", "init", "echo", "--output-dir", str(folder)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PATH": os.environ["PATH"]})
    return folder / "echo"


async def test_the_environment_that_openenv_makes_is_played_over_its_socket(echo: Path) -> None:
    command = [PYTHON, "-m", "uvicorn", "server.app:app", "--port", "{port}"]
    variables = {"PYTHONPATH": str(echo)}
    environment = create_environment("openenv", {"command": command, "variables": variables, "max_turns": 4})
    await environment.prepare()
    episode = environment.episode(environment.task("train", 0))
    first = (await episode.start())[0].content
    assert "- message: string" in first
    assert "echoed_message: Echo environment ready!" in first
    answer = await episode.step(Action("", (ToolCall("act", {"action": {"message": "hello"}}),)))
    assert "echoed_message: hello" in answer.messages[0].content
    assert "reward: 0.5" in answer.messages[0].content
    answer = await episode.step(Action("", (ToolCall("act", {"action": {"words": "hello"}}),)))
    assert answer.messages[0].content.startswith("error: Invalid")
    assert (await episode.step(Action("Done."))).done
    assert (await episode.grade()).total == 0.5
    await episode.close()
    await episode.close()
    second = environment.episode(environment.task("train", 1))  # the place is free again
    await second.start()
    await second.close()
    await environment.close()


ROW = {
    "messages": [
        {
            "role": "user",
            "content": "<context>Aspirin thins blood.</context> <question>What does aspirin do?</question>",
        },
        {"role": "assistant", "content": "It thins blood."},
    ]
}


async def test_a_medical_environment_of_others_is_played_too(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(ROW) + "\n" for _ in range(3)))
    variables = {"DIPG_DATASET_PATH": str(data), "HF_HUB_OFFLINE": "1", "DATABASE_URL": f"sqlite:///{tmp_path}/x.db"}
    command = [PYTHON, "-m", "uvicorn", "med_safety_gym.app:app", "--port", "{port}"]
    environment = create_environment("openenv", {"command": command, "variables": variables})
    await environment.prepare()
    answer = {"action": {"llm_response": "It thins blood."}}
    episode = environment.episode(environment.task("train", 0))
    first = (await episode.start())[0].content
    assert "context: Aspirin thins blood." in first
    assert "question: What does aspirin do?" in first
    observation = await episode.step(Action("", (ToolCall("act", answer),)))
    assert observation.done
    assert observation.messages[0].content.endswith("It is over.")
    reward = await episode.grade()
    assert (reward.total, reward.components["ended"]) == (reward.components["return"], 1.0)
    assert reward.total != 0.0
    await episode.close()
    await environment.close()


class Answered(VerifiersEnvironment):
    """With a policy that says one thing, since the library's environments bring none."""

    def __init__(self, text: str, **options: Any) -> None:
        super().__init__(**options)
        self._text = text

    def reference(self, task: Task) -> ReferencePolicy:
        text = self._text

        class Says(ReferencePolicy):
            def act(self, messages: Sequence[Message]) -> Action:
                return Action(text if text else f"<answer>{worked_out(messages[-1].content)}</answer>")

        return Says()


def worked_out(question: str) -> str:
    """The answer to a question of `basic_arithmetic` or `chain_sum`."""
    found = re.search(r"([-\d(][\d\s+*/()-]*)\s*(?:=|\?|\.|$)", question.strip())
    assert found, question
    return str(int(eval(found[1])))


@pytest.mark.parametrize("data_set", ["chain_sum", "leg_counting"])
async def test_a_rollout_of_verifiers_asks_the_gateway_and_its_rubric_pays(data_set: str) -> None:
    options = {
        "id": "verifiers.envs.integrations.reasoninggym_env:ReasoningGymEnv",
        "options": {"gym": data_set, "num_train_examples": 8, "num_eval_examples": 4, "seed": 1},
        "python": PYTHON,
    }
    wrong = Answered("<answer>no number</answer>", **options)
    trajectory, texts = await reference_episode(wrong)
    assert (trajectory.head.outcome, trajectory.head.num_turns) == (Outcome.COMPLETED, 1)
    assert trajectory.head.reward < 0.1
    assert texts[0].count("[") == 1
    await wrong.close()
    if data_set == "chain_sum":
        right = Answered("", **options)
        trajectory, _ = await reference_episode(right)
        assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.COMPLETED, 1.0)
        await right.close()


async def test_an_environment_of_verifiers_that_is_not_installed_is_named() -> None:
    environment = VerifiersEnvironment("no-such-environment", python=PYTHON)
    with pytest.raises(EnvironmentOptionsError, match="no-such-environment"):
        await environment.prepare()
    await environment.close()
