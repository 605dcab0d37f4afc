"""Policies that know nothing: whatever an environment pays them, it pays for nothing. For tests and certificates."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from envs.interface import Action, Environment, Message, ReferencePolicy, ToolCall

NUM_TURNS = 4


class NoOp(ReferencePolicy):
    """Ends at once and says nothing."""

    def act(self, messages: Sequence[Message]) -> Action:
        """An empty answer."""
        return Action("")


class Echo(ReferencePolicy):
    """Answers with what it was told last."""

    def act(self, messages: Sequence[Message]) -> Action:
        """The last message, as the answer."""
        return Action(messages[-1].content)


class Constant(ReferencePolicy):
    """The same answer, whatever was asked, in every dress that environments look for."""

    def act(self, messages: Sequence[Message]) -> Action:
        """A number, an answer tag and a code block."""
        return Action("42 <answer>42</answer>\n```python\ndef solve(*arguments):\n    return 42\n```")


class RandomCalls(ReferencePolicy):
    """Calls tools at random with arguments that fit their schemas, then answers with a number."""

    def __init__(self, environment: Environment, seed: int = 0) -> None:
        self._tools = tuple(environment.tools)
        self._random = random.Random(seed)

    def act(self, messages: Sequence[Message]) -> Action:
        """The next call, or the answer after NUM_TURNS of them."""
        turns = sum(message.role == "assistant" for message in messages)
        if turns >= NUM_TURNS or not self._tools:
            return Action(f"<answer>{self._random.randrange(1000)}</answer>")
        tool = self._random.choice(self._tools)
        properties: Mapping[str, Any] = tool.parameters.get("properties", {})
        arguments = {name: self._value(schema, messages) for name, schema in properties.items()}
        return Action("", (ToolCall(tool.name, arguments),))

    def _value(self, schema: Mapping[str, Any], messages: Sequence[Message]) -> Any:
        if choices := schema.get("enum"):
            return self._random.choice(list(choices))
        if options := schema.get("anyOf"):
            return self._value(self._random.choice(list(options)), messages)
        words = messages[0].content.split()
        match schema.get("type"):
            case "integer":
                return self._random.randrange(100)
            case "number":
                return self._random.random()
            case "boolean":
                return self._random.random() < 0.5
            case "array":
                return [self._value(schema.get("items", {}), messages)]
            case "object":
                return {}
            case "null":
                return None
        return self._random.choice(words)


DEGENERATE: Mapping[str, Callable[[Environment], ReferencePolicy]] = {
    "no-op": lambda environment: NoOp(),
    "echo": lambda environment: Echo(),
    "constant": lambda environment: Constant(),
    "random calls": RandomCalls,
}
"""Name -> maker of a fresh one for an environment."""
