"""Demonstrations keep to the budgets, too."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from broker.protocol.trajectory import Mode, VersionRun
from envs.interface import Action, Environment, Message, ReferencePolicy, Reward, Split, Task
from envs.tools import ToolEpisode, ToolSet
from tests.unit.actors.played import CLOSED, STOP, Played


class Thinker(ReferencePolicy):
    """Thinks, then answers."""

    def __init__(self, text: str) -> None:
        self._text = text

    def act(self, messages: Sequence[Message]) -> Action:
        assert messages[0].content == "Say it."  # what the policy is told of budgets is not the reference's business
        return Action(self._text)


class ThinkerEpisode(ToolEpisode):
    async def grade(self) -> Reward:
        return Reward(float(self.final_text == "w3"))


class ThinkerEnvironment(Environment):
    name = "thinker"
    tools = ()

    def __init__(self, text: str) -> None:
        self._text = text

    def task(self, split: Split, index: int) -> Task:
        return Task("thinker", split, index, "plain", (Message("user", "Say it."),))

    def episode(self, task: Task) -> ThinkerEpisode:
        return ThinkerEpisode(task, ToolSet())

    def reference(self, task: Task) -> ReferencePolicy:
        return Thinker(self._text)


DEMONSTRATION = "<think>plates plates plates</think>\n\nw3"


@pytest.mark.parametrize("opens", ["policy", "context"])
@pytest.mark.parametrize("budget", [None, 0, 2, 100])
@pytest.mark.parametrize("text", [DEMONSTRATION, "w3"])
async def test_a_demonstration_is_written_as_a_policy_with_that_budget_would_have(
    text: str, budget: int | None, opens: str
) -> None:
    played = Played(thinking={"opens": opens})
    played.environment = ThinkerEnvironment(text)
    await played.run([], budget, mode=Mode.REFERENCE, sampling={"max_turn_tokens": 150})
    whole = "".join(part for _, part in played.parts())
    turn = whole.partition("<|im_start|>assistant\n")[2]
    forced = budget == 2 and (text == DEMONSTRATION or opens == "context")  # the closing tag is longer than that
    assert played.head.reward == 1.0
    assert played.head.num_forced_stops == forced
    assert played.trajectory.segments[0].version_runs == (VersionRun(0, 0, played.trajectory.num_sampled),)
    if budget == 0:
        assert turn == f"{CLOSED}w3<|im_end|>"
        assert played.parts()[-1] == (True, "w3<|im_end|>")
    elif forced:
        assert played.head.num_thinking_tokens == 2
        assert played.parts()[-2:] == [(False, STOP), (True, "w3<|im_end|>")]
    elif opens == "context" and text == "w3":
        assert turn == "<think>\n\n\n</think>\n\nw3<|im_end|>"
    else:
        assert turn.replace("<think>\n", "<think>") == f"{text}<|im_end|>"


@pytest.mark.parametrize("opens", ["policy", "context"])
@pytest.mark.parametrize("per", ["turn", "episode"])
@pytest.mark.parametrize("budget", [1, 8, 10, 100])
async def test_a_demonstration_keeps_a_soft_budget_by_itself(budget: int, per: str, opens: str) -> None:
    """Nobody stops it before twice the budget: what it shows has to be shorter, and its end is trained on."""
    soft = {"overrun_rate": 0.1, "limit": 2.0}
    played = Played(thinking={"opens": opens, "per": per, "soft": soft})
    played.environment = ThinkerEnvironment(DEMONSTRATION)
    await played.run([], budget, mode=Mode.REFERENCE, sampling={"max_turn_tokens": 150})
    thinking, overrun, forced = played.account
    turn = "".join(part for _, part in played.parts()).partition("<|im_start|>assistant\n")[2]
    assert played.head.reward == 1.0
    if budget == 1:  # less than the closing tag
        assert (turn == "w3<|im_end|>") == (opens == "policy")
        return
    assert (overrun, forced) == (0, 0)
    assert played.parts()[-1][1].endswith("</think>\n\nw3<|im_end|>")
    assert played.parts()[-1][0]  # all of it was said by the demonstration
    closing = played.tokens("</think>")
    whole = closing + played.tokens("plates plates plates")
    assert thinking == min(budget, whole) > closing
