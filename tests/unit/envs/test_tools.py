"""Typed functions become tools; bad calls become error observations, broken tools become environment failures."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest

from envs.interface import Action, EnvironmentFailureError, Message, Reward, SandboxError, Task, ToolCall
from envs.tools import ToolEpisode, ToolError, ToolSet


def add(episode: NotDefinedYet, first: int, second: Annotated[int, "what to add"] = 1) -> str:
    """Add two
    integers.

    Not for the policy.
    """
    return str(first + second)


async def paint(episode: Any, colour: Literal["red", "blue"], title: str = "") -> str:
    """Paint it."""
    if title == "refuse":
        raise ToolError("no paint left")
    if title == "break":
        raise KeyError(title)
    if title == "die":
        raise SandboxError("gone")
    return f"{type(episode).__name__} {colour}"


class NotDefinedYet(ToolEpisode):
    async def grade(self) -> Reward:
        return Reward(0.0)


TOOLS = ToolSet(add, paint)


def episode() -> NotDefinedYet:
    return NotDefinedYet(Task("test", "train", 0, "kind", (Message("user", "go"),)), TOOLS)


def test_schemas_come_from_signature_and_docstring() -> None:
    assert [(tool.name, tool.description) for tool in TOOLS.tools] == [
        ("add", "Add two integers."),
        ("paint", "Paint it."),
    ]
    assert TOOLS.tools[0].parameters == {
        "type": "object",
        "properties": {
            "first": {"type": "integer"},
            "second": {"type": "integer", "default": 1, "description": "what to add"},
        },
        "required": ["first"],
        "additionalProperties": False,
    }
    properties = TOOLS.tools[1].parameters["properties"]
    assert properties["colour"] == {"type": "string", "enum": ["red", "blue"]}
    assert properties["title"] == {"type": "string", "default": ""}  # an argument named title is no pydantic title


@pytest.mark.parametrize(
    ("call", "text", "error"),
    [
        (ToolCall("add", {"first": 2, "second": 3}), "5", False),
        (ToolCall("add", {"first": "2"}), "3", False),
        (ToolCall("paint", {"colour": "red"}), "NotDefinedYet red", False),
        (ToolCall("steal", {}), "error: unknown tool steal; the tools are: add, paint", True),
        (ToolCall("add", {}), "error: add needs the argument first", True),
        (ToolCall("add", {"first": 1, "third": 2}), "error: add has no argument third; it takes: first, second", True),
        (ToolCall("paint", {"colour": "red", "title": "refuse"}), "error: no paint left", True),
    ],
)
async def test_calls_are_answered(call: ToolCall, text: str, error: bool) -> None:
    output = await TOOLS.call(episode(), call)
    assert (output.text, output.error) == (text, error)


@pytest.mark.parametrize("value", ["two", None, 1.5, [1], {}])
async def test_arguments_of_the_wrong_type_are_errors(value: object) -> None:
    output = await TOOLS.call(episode(), ToolCall("add", {"first": value}))
    assert output.error
    assert output.text.startswith("error: add: first: ")
    assert "\n" not in output.text


async def test_a_broken_tool_is_the_environments_failure() -> None:
    with pytest.raises(EnvironmentFailureError, match="tool 'paint' broke: KeyError"):
        await TOOLS.call(episode(), ToolCall("paint", {"colour": "red", "title": "break"}))


async def test_a_dead_sandbox_stays_a_sandbox_error() -> None:
    with pytest.raises(SandboxError, match="gone"):
        await TOOLS.call(episode(), ToolCall("paint", {"colour": "red", "title": "die"}))


def test_functions_that_cannot_be_tools_are_refused() -> None:
    def nothing() -> str:
        """No episode."""
        return ""

    def silent(episode: Any) -> str:
        return ""

    def untyped(episode: Any, x) -> str:  # type: ignore[no-untyped-def]
        """Untyped."""
        return ""

    def many(episode: Any, *x: int) -> str:
        """Many."""
        return ""

    for function, complaint in (
        (nothing, "first parameter"),
        (silent, "docstring"),
        (untyped, "type annotation"),
        (many, "ordinary"),
    ):
        with pytest.raises(TypeError, match=complaint):
            ToolSet(function)
    with pytest.raises(TypeError, match="two tools"):
        ToolSet(add, add)


async def test_an_action_runs_its_calls_in_order_and_counts_errors() -> None:
    running = episode()
    assert [message.content for message in await running.start()] == ["go"]
    calls = (ToolCall("add", {"first": 1}), ToolCall("steal", {}), ToolCall("add", {"first": 5}))
    observation = await running.step(Action("text", calls))
    assert [(message.role, message.content) for message in observation.messages] == [
        ("tool", "2"),
        ("tool", "error: unknown tool steal; the tools are: add, paint"),
        ("tool", "6"),
    ]
    assert not observation.done
    assert (running.num_tool_calls, running.num_tool_errors, running.final_text) == (3, 1, None)


async def test_a_malformed_call_is_an_error_observation() -> None:
    running = episode()
    observation = await running.step(Action("<tool>", malformed="the call was not closed"))
    assert observation.messages == (Message("tool", "error: the call was not closed"),)
    assert running.num_tool_errors == 1


async def test_a_flood_of_calls_is_bounded() -> None:
    observation = await episode().step(Action("", tuple(ToolCall("add", {"first": 1}) for _ in range(10))))
    assert [message.content for message in observation.messages] == ["2"] * 8 + [
        "error: at most 8 calls in one turn"
    ] * 2


async def test_a_turn_without_calls_is_final_and_the_last() -> None:
    running = episode()
    observation = await running.step(Action("done"))
    assert (observation.done, observation.messages, running.final_text) == (True, (), "done")
    with pytest.raises(EnvironmentFailureError, match="over"):
        await running.step(Action("more"))
