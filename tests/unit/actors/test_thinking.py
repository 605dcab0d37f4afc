"""Where thinking stands in a turn, what the policy is told, and what the actor writes: texts and tokens, no engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.thinking import TELLINGS, Thinking
from broker.process.thinking_settings import ThinkingSection
from envs.interface import Message
from tests.unit.actors.support import make_renderer

RENDERER = make_renderer()
TAGGED = make_renderer("<think>", "</think>")  # both tags are tokens of their own
PLAIN = Thinking(ThinkingSection(), RENDERER)
PARTS = ["<think>", "</think>", "<thi", "nk>", "</th", "ink>", "plates", "\n\n", "é", "€", "<", ">"]


def joined(parts: list[list[int]]) -> list[int]:
    return [token for part in parts for token in part]


def told(budget: int | None, **settings: object) -> list[str]:
    thinking = Thinking(ThinkingSection.model_validate(settings), RENDERER)
    messages = (Message("system", "Be brief."), Message("user", "What is the bill?"))
    return [message.content for message in thinking.told(messages, budget)]


@pytest.mark.parametrize(
    ("budget", "per", "sentence"),
    [
        (0, "turn", "Answer without thinking."),
        (1, "turn", "Think for at most 1 token in each turn."),
        (16, "episode", "Think for at most 16 tokens in all."),
    ],
)
def test_the_budget_is_told_in_a_sentence(budget: int, per: str, sentence: str) -> None:
    assert told(budget, per=per) == ["Be brief.", f"What is the bill?\n{sentence}"]


def test_an_unlimited_budget_changes_nothing() -> None:
    for tell in ("sentence", "none"):
        assert told(None, tell=tell) == ["Be brief.", "What is the bill?"]


def test_a_format_may_have_a_switch_of_its_own() -> None:
    assert told(0, tell="qwen3")[1].endswith("?\n/no_think")
    assert told(None, tell="qwen3")[1].endswith("?\n/think")
    assert told(16, tell="qwen3")[1].endswith("?\nThink for at most 16 tokens in each turn. /think")
    assert told(16, tell="none")[1] == "What is the bill?"


def test_every_way_to_tell_can_be_chosen() -> None:
    for name in TELLINGS:
        assert ThinkingSection.model_validate({"tell": name}).tell == name
    with pytest.raises(ValueError, match="tell"):
        ThinkingSection.model_validate({"tell": "shout"})


def test_a_conversation_without_a_user_gets_a_message() -> None:
    assert PLAIN.told((), 0) == (Message("user", "Answer without thinking."),)


@pytest.mark.parametrize("renderer", [RENDERER, TAGGED], ids=["several tokens", "one token"])
def test_tokens_between_the_tags_count_with_those_of_the_closing_one(renderer: object) -> None:
    thinking = Thinking(ThinkingSection(), renderer)  # type: ignore[arg-type]
    tag = renderer.tag  # type: ignore[attr-defined]
    parts = ["so ", "<think>", "17 plates", "</think>", "\n\n1212"]
    ids = [tag(part) for part in parts]
    before, inner = len(ids[0]) + len(ids[1]), len(ids[2]) + len(ids[3])
    thought = thinking.find(joined(ids), False)
    assert thought == (list(range(before, before + inner)), False)
    assert thinking.find(joined(ids[:3]), False) == (list(range(before, before + len(ids[2]))), True)


def test_a_token_that_completes_the_tag_and_goes_on_is_still_thinking() -> None:
    ids = [RENDERER.inside(text) for text in ("<think>", "a</think", ">\n\n")]
    assert PLAIN.find(joined(ids), False).positions[-1] >= len(ids[0]) + len(ids[1])


@given(st.lists(st.sampled_from(PARTS), max_size=12), st.booleans())
def test_positions_are_those_of_a_walk_token_by_token(parts: list[str], is_open: bool) -> None:
    """The slow way: after every token, look at the whole text so far."""
    ids = [token for part in parts for token in RENDERER.inside(part)]

    def open_after(count: int) -> bool:
        text, state = RENDERER.decode(ids[:count]), is_open
        while (found := text.find("</think>" if state else "<think>")) >= 0:
            text = text[found + len("</think>" if state else "<think>") :]
            state = not state
        return state

    walked = [i for i in range(len(ids)) if open_after(i)]
    # A token may complete one tag and begin the next only where tags touch; then both ways count it alike.
    assert PLAIN.find(ids, is_open) == (walked, open_after(len(ids)))


@given(st.lists(st.sampled_from(PARTS), max_size=12), st.booleans())
def test_the_answer_has_nothing_of_the_thinking(parts: list[str], is_open: bool) -> None:
    text = "".join(parts)
    answer = PLAIN.answer(text, is_open)
    if "<think>" not in text and not is_open:
        assert answer == text  # untouched, white space too
    outside = "" if is_open else text.partition("<think>")[0]
    assert answer.strip().startswith(outside.strip())
    assert PLAIN.answer(f"</think>{text}", True) == PLAIN.answer(text, False).strip()


@pytest.mark.parametrize(
    ("text", "is_open", "answer"),
    [
        ("<think>is it <tool>look 3</tool>?</think>\n\nw3", False, "w3"),
        ("w3 <think>no, w4</think>", False, "w3"),
        ("<think>for ever", False, ""),
        ("17*3</think>\n\n51", True, "51"),
        ("a</think>b<think>c</think>d", True, "bd"),
        (" plain </think> text ", False, " plain </think> text "),
    ],
)
def test_answers(text: str, is_open: bool, answer: str) -> None:
    assert PLAIN.answer(text, is_open) == answer


@pytest.mark.parametrize("renderer", [RENDERER, TAGGED])
def test_what_the_actor_writes(renderer: object) -> None:
    thinking = Thinking(ThinkingSection(stop_phrase=" Stop."), renderer)  # type: ignore[arg-type]
    decode = renderer.decode  # type: ignore[attr-defined]
    assert decode(thinking.stop_ids) == " Stop.</think>\n\n"
    assert decode(thinking.closing(False)) == "<think>\n\n</think>\n\n"
    assert decode(thinking.closing(True)) == "\n\n</think>\n\n"
    header = RENDERER.inside("assistant\n")
    assert not thinking.opened_by(header)
    assert thinking.opened_by([*header, *thinking.open_ids])
    assert thinking.closed_by([*header, *thinking.closing(False)])


def test_only_a_tag_that_is_one_token_can_be_stopped_at() -> None:
    assert PLAIN.open_token_ids == ()
    assert Thinking(ThinkingSection(), TAGGED).open_token_ids == tuple(TAGGED.tag("<think>"))


def test_a_written_turn_is_cut_at_tags_and_gaps() -> None:
    assert PLAIN.pieces("<think>a b</think>\n\nw3") == ["<think>", "a b", "</think>", "\n\n", "w3"]
    assert PLAIN.pieces("w3") == ["w3"]
    assert PLAIN.pieces("") == []
