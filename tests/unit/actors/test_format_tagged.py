from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.formats.tagged import Tagged
from envs.interface import Action, Tool, ToolCall
from tests.unit.actors.support import ADD, LOOKUP

PING = Tool("ping", "Say nothing.", {"type": "object", "properties": {}})
TOOLS = (LOOKUP, ADD, PING)
TAGGED = Tagged()


def test_text_binds_to_the_single_string_parameter_verbatim() -> None:
    action = TAGGED.parse("Let me see. <tool>look a  b\n c</tool>", TOOLS)
    assert action.tool_calls == (ToolCall("look", {"word": "a  b\n c"}),)
    assert action.malformed is None
    assert TAGGED.parse("<tool>look</tool>", TOOLS).tool_calls == (ToolCall("look", {"word": ""}),)


def test_several_parameters_are_a_json_object() -> None:
    assert TAGGED.parse('<tool>add {"a": 1, "b": -2}</tool>', TOOLS).tool_calls == (ToolCall("add", {"a": 1, "b": -2}),)


def test_several_calls_keep_their_order() -> None:
    calls = TAGGED.parse("<tool>look x</tool>\n<tool>ping</tool><tool>look y</tool>", TOOLS).tool_calls
    assert [call.name for call in calls] == ["look", "ping", "look"]


def test_a_turn_without_a_call_is_an_answer() -> None:
    assert TAGGED.parse("<answer>1212</answer>", TOOLS) == Action("<answer>1212</answer>")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool>look x", "without </tool>"),
        ("look x</tool>", "without <tool>"),
        ("<tool>look <tool>look x</tool></tool>", "inside of another"),
        ("<tool></tool>", "NAME TEXT"),
        ("<tool>17*3</tool>", "NAME TEXT"),
        ("<tool>find x</tool>", "unknown tool find; the tools are: look, add, ping"),
        ("<tool>add 1 2</tool>", "takes a JSON object with a, b"),
        ("<tool>add [1, 2]</tool>", "takes a JSON object"),
        ('<tool>add {"a": 1}</tool>', "needs b"),
        ('<tool>add {"a": 1, "b": "2"}</tool>', "b must be of type integer"),
        ('<tool>add {"a": 1, "b": true}</tool>', "b must be of type integer"),
        ('<tool>add {"a": 1, "b": 2, "c": 3}</tool>', "no parameter c"),
        ("<tool>add " + "[" * 100_000 + "</tool>", "takes a JSON object"),
        ("<tool>ping pong</tool>", "takes a JSON object with no keys"),
        ("<tool>look x</tool> <tool>look", "without </tool>"),
    ],
)
def test_malformed_calls_have_a_reason_and_run_nothing(text: str, reason: str) -> None:
    action = TAGGED.parse(text, TOOLS)
    assert action.malformed is not None
    assert reason in action.malformed
    assert action.tool_calls == ()
    assert action.text == text


@given(st.text())
def test_any_text_parses_to_something(text: str) -> None:
    assert TAGGED.parse(text, TOOLS).text == text


@given(st.text(), st.integers(), st.integers())
def test_a_written_call_reads_back_or_is_refused(word: str, a: int, b: int) -> None:
    calls = [ToolCall("add", {"a": a, "b": b}), ToolCall("ping", {})]
    if "<tool>" in word or "</tool>" in word:
        with pytest.raises(ValueError, match="cannot be written"):
            TAGGED.write(Action("", (ToolCall("look", {"word": word}),)), TOOLS)
    else:
        calls.append(ToolCall("look", {"word": word}))
    text = TAGGED.write(Action("", tuple(calls)), TOOLS)
    assert TAGGED.parse(text, TOOLS).tool_calls == tuple(calls)


def test_an_unknown_tool_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="unknown tool find"):
        TAGGED.write(Action("", (ToolCall("find", {}),)), TOOLS)
