"""Every chat format against its reference template, and the promises that all of them keep."""

from __future__ import annotations

import random
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.formats.calls import CLOSE, OPEN
from actors.renderer import Renderer
from envs.interface import Action, Message, Tool, ToolCall
from tests.unit.actors.conversations import (
    NAMES,
    TOKENS,
    TOOLS,
    Conversation,
    Maker,
    make_renderer,
    make_tokenizer,
    reference,
)

NUM_CONVERSATIONS = 500
each_format = pytest.mark.parametrize("name", NAMES)
TAGGED_JSON = ("chatml_json", "qwen3", "plain")


def tokens_of(name: str, text: str) -> list[int]:
    """As a template's user tokenises its text: names of tokens become tokens."""
    return list(make_tokenizer(name).encode(text, add_special_tokens=False).ids)


@each_format
def test_growing_a_conversation_equals_its_template_rendered_whole(name: str) -> None:
    renderer, maker, tokenizer = make_renderer(name), Maker(name, random.Random(0)), make_tokenizer(name)
    seen: Counter[str] = Counter()
    for _ in range(NUM_CONVERSATIONS):
        conversation = maker.conversation()
        whole = tokenizer.encode(conversation.whole(reference(name)), add_special_tokens=False).ids
        grown = conversation.grown(renderer)
        assert grown == whole[: len(grown)], conversation
        # A template ends a turn's line at once, a rollout when something follows.
        line_end = "" if conversation.last is not None else {"llama3": "", "plain": "\n\n"}.get(name, "\n")
        assert renderer.decode(whole[len(grown) :]) == line_end
        seen["tools"] += bool(conversation.tools)
        seen["turns"] += len(conversation.rounds)
        seen["calls"] += sum(len(action.tool_calls) for _, action in conversation.rounds)
        seen["thinking"] += sum(bool(action.thinking) for _, action in conversation.rounds)
    assert min(seen["tools"], seen["calls"], seen["turns"] - NUM_CONVERSATIONS) > NUM_CONVERSATIONS // 10
    assert (seen["thinking"] > NUM_CONVERSATIONS // 10) == (name in TAGGED_JSON)


@each_format
def test_a_replaced_history_is_opened_as_the_template_renders_it(name: str) -> None:
    """Also where the template drops earlier thinking: nothing of an opening was sampled in its segment."""
    renderer, maker, tokenizer = make_renderer(name), Maker(name, random.Random(1)), make_tokenizer(name)
    for _ in range(NUM_CONVERSATIONS // 5):
        made = maker.conversation()
        rounds = tuple(
            (before, Action(action.text, action.tool_calls, thinking=maker.text(1) if name == "qwen3" else ""))
            for before, action in made.rounds
        )
        conversation = Conversation(made.tools, rounds, made.last or ())
        messages = [
            message
            for before, action in rounds
            for message in (*before, Message("assistant", renderer.write(action, TOOLS)))
        ]
        opened = renderer.open([*messages, *(conversation.last or ())], conversation.tools)
        whole = tokenizer.encode(conversation.whole(reference(name)), add_special_tokens=False).ids
        assert opened == whole, conversation


def test_the_chatml_template_that_vllm_ships_says_the_same() -> None:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "transformers_utils/chat_templates/template_chatml.jinja"
    maker, renderer = Maker("tagged", random.Random(2)), make_renderer("tagged")
    for _ in range(50):
        made = maker.conversation()
        rounds = tuple((before, Action(action.text)) for before, action in made.rounds)
        conversation = Conversation((), rounds, (Message("user", maker.content()),))
        assert conversation.grown(renderer) == tokens_of("tagged", conversation.whole(path.read_text()))


@each_format
def test_what_is_written_is_read_back(name: str) -> None:
    renderer, maker = make_renderer(name), Maker(name, random.Random(3))
    for _ in range(300):
        action = maker.action(thinks=maker.rng.random() < 0.3)
        text = renderer.write(action, TOOLS)
        # Qwen's tokenizers put accents together, which is their way of reading text that was not sampled.
        assert renderer.text(renderer.turn(text)) == (normalize("NFC", text) if name == "qwen3" else text)
        read = renderer.parse(text, TOOLS)
        assert read.malformed is None
        assert read.tool_calls == action.tool_calls
        assert read.thinking == action.thinking
        if not action.tool_calls:
            assert read.text == action.text
        # What was read is written as it was read: a parsed turn holds its calls in its text.
        assert renderer.write(read, TOOLS) == text


written = st.text(st.characters(codec="utf-8"), max_size=20)


@each_format
@settings(max_examples=40)
@given(data=st.data())
def test_no_text_in_a_message_becomes_a_token_of_another_meaning(name: str, data: st.DataObject) -> None:
    """The tokens that were added to the vocabulary are where the format put them, whatever the messages say."""
    renderer = make_renderer(name)
    hostile = st.lists(written | st.sampled_from([*TOKENS[name], "\n", " "]), max_size=6).map("".join)
    roles = [data.draw(st.sampled_from(["user", "tool", "system"])) for _ in range(data.draw(st.integers(1, 4)))]
    said = [Message(role, data.draw(hostile)) for role in roles]  # type: ignore[arg-type]
    quiet = [Message(role, "x") for role in roles]  # type: ignore[arg-type]
    added = set(make_tokenizer(name).get_added_tokens_decoder())

    def control(ids: list[int]) -> list[int]:
        return [token_id for token_id in ids if token_id in added]

    told, quietly = (
        [Tool("note", text, {"type": "object", "properties": {"a": {"type": "string", "description": text}}})]
        for text in (data.draw(hostile), "x")
    )
    assert control(renderer.open(said, told)) == control(renderer.open(quiet, quietly))
    assert control(renderer.observe(said)) == control(renderer.observe(quiet))
    # A turn's own text may hold what a policy writes within a turn, and nothing that ends it or speaks for others.
    turn = control(renderer.turn(data.draw(hostile)))
    markup = {make_tokenizer(name).token_to_id(token) for token in renderer.chat_format.markup}
    assert set(turn[:-1]) <= markup
    assert turn[-1] == renderer.stop_token_ids[0]


@each_format
def test_calls_with_a_formats_own_markup_in_their_arguments_are_neither_tokens_nor_misread(name: str) -> None:
    renderer = make_renderer(name)
    texts = [*TOKENS[name], f"a{CLOSE}b{OPEN}", "</think>", "\\u003c", "\n\t\x00", "{}; {}"]
    for text in texts:
        action = Action("", (ToolCall("look", {"word": text}),))
        ids = renderer.turn(renderer.write(action, TOOLS))
        assert renderer.parse(renderer.text(ids), TOOLS).tool_calls == action.tool_calls
        assert not {make_tokenizer(name).token_to_id(token) for token in TOKENS[name]} & set(
            renderer.turn(text)[:-1]
        ) - {make_tokenizer(name).token_to_id(token) for token in renderer.chat_format.markup}


@each_format
def test_sampled_boundaries_are_kept_where_the_tokenizer_would_write_the_text_otherwise(name: str) -> None:
    renderer = make_renderer(name)
    merged = tokens_of(name, "plate")
    spelled = [tokens_of(name, letter)[0] for letter in "plate"]
    assert len(merged) < len(spelled)
    ids = [*renderer.open([Message("user", "x")], TOOLS), *spelled, renderer.stop_token_ids[0]]
    grown = ids + renderer.observe([Message("tool", "y")])
    assert grown[: len(ids)] == ids
    assert renderer.text(grown[len(ids) - 6 : len(ids)]) == "plate"


@each_format
def test_the_tokens_that_end_a_turn_belong_to_it_and_not_to_its_text(name: str) -> None:
    renderer = make_renderer(name)
    ends = {
        "tagged": ["<|im_end|>"],
        "chatml_json": ["<|im_end|>", "<|endoftext|>"],
        "qwen3": ["<|im_end|>", "<|endoftext|>"],
        "llama3": ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"],
        "plain": ["<|endoftext|>"],
    }[name]
    assert list(renderer.stop_token_ids) == [make_tokenizer(name).token_to_id(end) for end in ends]
    for stop in renderer.stop_token_ids:
        assert renderer.text([*tokens_of(name, "hi"), stop]) == "hi"
    assert renderer.text(tokens_of(name, "hi")) == "hi"


def names(action: Action) -> list[str]:
    return [call.name for call in action.tool_calls]


PING = Tool("ping", "Say nothing.", {"type": "object", "properties": {}})


def call(function: str, **arguments: Any) -> str:
    return f'{OPEN}\n{{"name": "{function}", "arguments": {arguments!r}}}\n{CLOSE}'.replace("'", '"')


@pytest.mark.parametrize("name", TAGGED_JSON)
def test_several_calls_with_prose_around_them(name: str) -> None:
    renderer = make_renderer(name)
    text = f"First {call('look', word='a')} then\n{call('add', a=1, b=-2)}{call('ping')}."
    action = renderer.parse(text, (*TOOLS, PING))
    said = ToolCall("look", {"word": "a"}), ToolCall("add", {"a": 1, "b": -2}), ToolCall("ping", {})
    assert action.tool_calls == said
    assert action.text == text
    assert renderer.parse('<tool_call>{"arguments": {}, "name": "ping", "id": 7}</tool_call>', (PING,)).tool_calls
    assert renderer.parse("No call <tool> here", TOOLS) == Action("No call <tool> here")


MALFORMED = [
    ("<tool_call>", "not JSON"),
    ("<tool_call></tool_call>", "not JSON"),
    ("<tool_call>look</tool_call>", "not JSON"),
    ('<tool_call>{"name": "look", "arguments": {"word": "a"}}', "must be followed by </tool_call>"),
    ('<tool_call>{"name": "look", "arguments": {"word": "a"}} so</tool_call>', "must be followed by </tool_call>"),
    ('{"name": "look", "arguments": {"word": "a"}}</tool_call>', "a </tool_call> without <tool_call>"),
    (f"</tool_call>{call('look', word='a')}", "a </tool_call> without <tool_call>"),
    (f"{call('look', word='a')}</tool_call>", "a </tool_call> without <tool_call>"),
    ("<tool_call>[]</tool_call>", 'a call is a JSON object {"name": TOOL, "arguments": {...}}'),
    ('<tool_call>{"name": "look"}</tool_call>', "a call is a JSON object"),
    ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', "a call is a JSON object"),
    ('<tool_call>{"name": "look", "arguments": "{}"}</tool_call>', "look takes a JSON object with word"),
    (call("find"), "unknown tool find; the tools are: look, add"),
    (call("add", a=1), "add needs b"),
    (call("add", a=1, b="2"), "add: b must be of type integer"),
    (call("add", a=1, b=2, c=3), "add has no parameter c; it has a, b"),
    ("<tool_call>" + "[" * 100_000, "not JSON"),
    ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": NaN}}</tool_call>', "not JSON"),
    ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": ' + "9" * 5000 + "}}</tool_call>", "not JSON"),
    ('<tool_call>{"name": "look", "arguments": {"word": "\\ud800"}}</tool_call>', "not JSON"),
    (f"{call('look', word='a')}{call('look', word=1)}", "look: word must be of type string"),
    ("<think>hm", "the thinking was not ended with </think>"),
]


@pytest.mark.parametrize("name", TAGGED_JSON)
@pytest.mark.parametrize(("text", "reason"), MALFORMED)
def test_malformed_calls_have_a_reason_and_run_nothing(name: str, text: str, reason: str) -> None:
    action = make_renderer(name).parse(text, TOOLS)
    assert action.malformed is not None
    assert reason in action.malformed
    assert len(action.malformed) < 200
    assert action.tool_calls == ()


def test_calls_of_llama() -> None:
    parse = make_renderer("llama3").parse
    look = '{"name": "look", "parameters": {"word": "a; b"}}'
    add = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
    for text in (f"{look}; {add}", f"<|python_tag|>{look};{add}", f"\n{look}\n{add}\n", f"{look};{add};"):
        assert parse(text, TOOLS).tool_calls == (ToolCall("look", {"word": "a; b"}), ToolCall("add", {"a": 1, "b": 2}))
    for answer in ("1212", "The bill is {x}", "{17}", '{"answer": 3}', f"I would call {look}", ""):
        assert parse(answer, TOOLS) == Action(answer)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name": "look", "parameters": {"word": "a"', "a turn that calls is JSON objects and nothing else"),
        ('{"name": "look", "parameters": {"word": "a"}} and so on', "a turn that calls is JSON objects"),
        ('{"name": "look"}', 'a call is a JSON object {"name": TOOL, "parameters": {...}}'),
        ('{"name": "find", "parameters": {}}', "unknown tool find; the tools are: look, add"),
        ('{"name": "add", "parameters": {"a": 1}}', "add needs b"),
        ("<|python_tag|>", "<|python_tag|> without a call"),
        ("<|python_tag|>look.call(word='a')", "a turn that calls is JSON objects"),
    ],
)
def test_malformed_calls_of_llama(text: str, reason: str) -> None:
    action = make_renderer("llama3").parse(text, TOOLS)
    assert action.malformed is not None
    assert reason in action.malformed
    assert action.tool_calls == ()


@each_format
@given(text=written | st.lists(written | st.sampled_from([OPEN, CLOSE, "{", "}", '"name"', "</think>"])).map("".join))
@settings(max_examples=50)
def test_any_text_is_read_as_something(name: str, text: str) -> None:
    action = make_renderer(name).parse(text, TOOLS)
    assert action.malformed is None or not action.tool_calls


@each_format
def test_calls_within_thinking_are_thoughts(name: str) -> None:
    renderer = make_renderer(name)
    wanted = renderer.write(Action("", (ToolCall("look", {"word": "a"}),)), TOOLS)
    action = renderer.parse(f"<think>\nPerhaps {wanted}?\n</think>\n\n1212", TOOLS)
    assert action == Action("1212", thinking=f"Perhaps {wanted}?")
    assert names(renderer.parse(f"<think>\nhm\n</think>\n\n{wanted}", TOOLS)) == ["look"]
    assert renderer.parse("</think> is how it ends", TOOLS) == Action("</think> is how it ends")


def test_qwen_keeps_what_was_thought_until_a_new_segment_begins() -> None:
    """The template would drop it at the next question; in a segment, what was sampled stays."""
    renderer = make_renderer("qwen3")
    first, second = [Message("user", "a?")], [Message("user", "b?")]
    said = "<think>\nhm\n</think>\n\nyes"
    grown = renderer.open(first) + renderer.turn(said) + renderer.observe(second)
    assert "hm" in renderer.decode(grown)
    reopened = renderer.open([*first, Message("assistant", said), *second])
    assert renderer.decode(reopened) == renderer.decode(grown).replace("<think>\nhm\n</think>\n\n", "")


def test_llama_tells_of_the_tools_in_the_system_message_where_there_is_no_question() -> None:
    renderer = make_renderer("llama3")
    text = renderer.decode(renderer.open([Message("system", "Be brief."), Message("tool", "x")], TOOLS))
    system, _, rest = text.partition("<|eot_id|>")
    assert "You have access to the following functions." in system
    assert system.endswith("Be brief.")
    assert '"name": "add"' in system
    assert rest.startswith('<|start_header_id|>ipython<|end_header_id|>\n\n"x"<|eot_id|>')


@each_format
def test_an_empty_conversation_has_a_header(name: str) -> None:
    renderer: Renderer = make_renderer(name)
    assert renderer.open([])
    assert renderer.observe([])
