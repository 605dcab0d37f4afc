"""Policies that know nothing, to show that the shop pays for nothing else than solving it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from envs.interface import Action, Message, ReferencePolicy, ToolCall


class NoOp(ReferencePolicy):
    """Says nothing."""

    def act(self, messages: Sequence[Message]) -> Action:
        return Action("")


class Echo(ReferencePolicy):
    """Answers with the last message it saw, and with the last number in it."""

    def act(self, messages: Sequence[Message]) -> Action:
        numbers = [word.strip(".?") for word in messages[-1].content.split() if word.strip(".?").isdigit()]
        return Action(f"<answer>{numbers[-1] if numbers else messages[-1].content}</answer>")


class Constant(ReferencePolicy):
    """The same number every time."""

    def act(self, messages: Sequence[Message]) -> Action:
        return Action("<answer>500</answer>")


class Random(ReferencePolicy):
    """Any number of the right size."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def act(self, messages: Sequence[Message]) -> Action:
        return Action(f"<answer>{self._random.randrange(22, 2000)}</answer>")


class PriceParrot(ReferencePolicy):
    """Uses the price tool, and answers with the price."""

    def act(self, messages: Sequence[Message]) -> Action:
        if messages[-1].role == "tool":
            return Action(f"<answer>{messages[-1].content}</answer>")
        return Action("", (ToolCall("price", {"item": "plate"}),))


class Guesser(ReferencePolicy):
    """Knows everything but the price: multiplies by the middle one."""

    def act(self, messages: Sequence[Message]) -> Action:
        numbers = [int(word.strip(".?")) for word in messages[0].content.split() if word.strip(".?").isdigit()]
        return Action(f"<answer>{numbers[0] * 55}</answer>")


DEGENERATE: tuple[Callable[[], ReferencePolicy], ...] = (NoOp, Echo, Constant, Random, PriceParrot, Guesser)
