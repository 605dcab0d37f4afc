"""Every chat format behind the gateway: what a program sends and gets, token for token what the room's renderer writes.

Conversations are generated as they are for the formats themselves. They go through both dialects as JSON; no socket.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest

from actors.engine import Sample
from actors.formats.calls import tool_json
from actors.gateway import chat_completions, responses
from actors.gateway.conversation import Answer, ChatMessage, FunctionCall
from actors.gateway.session import Session
from actors.gateway.stitching import Stitcher
from actors.gateway.voices import Voice
from actors.renderer import Renderer
from broker.process.settings import GatewaySection
from broker.protocol.trajectory import Sampling
from envs.interface import Action, Message, Tool, ToolCall
from tests.unit.actors.conversations import (
    NAMES,
    TOOLS,
    Conversation,
    Maker,
    make_renderer,
    make_tokenizer,
    reference,
)
from tests.unit.actors.gateway.support import check_record, interpreter
from tests.unit.actors.support import ScriptedEngine, make_ticket

each_format = pytest.mark.parametrize("name", NAMES)
each_dialect = pytest.mark.parametrize("dialect", ["chat", "responses"])
ROOMY = {"max_turn_tokens": 2000, "max_episode_tokens": 50_000, "max_turns": 50}


class Remembering(ScriptedEngine):
    """Keeps what it was asked and what it has answered."""

    def __init__(self, renderer: Renderer, script: Sequence[str | Exception]) -> None:
        super().__init__(renderer, script)
        self.samples: list[Sample] = []

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
        priority: int = 0,
    ) -> Sample:
        self.prompts.append(list(prompt_ids))
        ids = self._renderer.turn(str(self._script.pop(0)))
        assert len(ids) <= max_tokens
        self.samples.append(self._sample(ids, "stop"))
        return self.samples[-1]


class Program:
    """An agent program without a socket: asks in one of the dialects, and sends back what it got, in its JSON."""

    def __init__(self, renderer: Renderer, dialect: str, script: Sequence[str], tell_tools: bool = True) -> None:
        self.renderer, self.dialect = renderer, dialect
        self.engine = Remembering(renderer, script)
        ticket, ends = make_ticket(sampling=ROOMY), (renderer, interpreter(renderer))
        voice = Voice(ticket, self.engine, *ends, 50_000)
        self.session = Session(ticket, voice, *ends, GatewaySection(tell_tools=tell_tools), 50_000)
        self.said: list[dict[str, Any]] = []
        self.call_ids: list[str] = []

    def hear(self, messages: Sequence[Message]) -> None:
        """What is told the policy next. Results answer the calls in turn, and some answer none."""
        for message in messages:
            if message.role == "tool" and self.dialect == "responses":
                self.said.append(
                    {"type": "function_call_output", "call_id": self._next_id(), "output": message.content}
                )
            elif message.role == "tool":
                self.said.append({"role": "tool", "tool_call_id": self._next_id(), "content": message.content})
            else:
                self.said.append({"role": message.role, "content": message.content})

    def _next_id(self) -> str:
        return self.call_ids.pop(0) if self.call_ids else "call_of_nobody"

    def ask(self, tools: Sequence[Tool]) -> dict[str, Any]:
        """Call, and keep the answer as it came; the answer's parts: content, thought, calls, finish."""
        if self.dialect == "chat":
            body: dict[str, Any] = {"model": "m", "messages": self.said, "tools": [tool_json(tool) for tool in tools]}
            question, form = chat_completions.read_request(json.loads(json.dumps(body)))
            answer = self._answer(question)
            made = json.loads(json.dumps(chat_completions.completion(answer, form, self.renderer.decode, "f")))
            choice = made["choices"][0]
            said = choice["message"]
            self.said.append(said)
            calls = [(each["id"], each["function"]) for each in said.get("tool_calls", ())]
            parts = {"content": said["content"] or "", "thought": said.get("reasoning_content", "")}
            usage = made["usage"]["completion_tokens_details"]["reasoning_tokens"]
        else:
            body = {"model": "m", "input": self.said}
            body["tools"] = [{"type": "function", **tool_json(tool)["function"]} for tool in tools]
            question, form_of = responses.read_request(json.loads(json.dumps(body)), {})
            answer = self._answer(question)
            made = responses.response(answer, form_of, "resp", {}, self.renderer.decode)
            made = json.loads(json.dumps(made))
            events = list(responses.events(made, form_of, {}))
            assert [e["item"] for e in events if e["type"] == "response.output_item.done"] == made["output"]
            self.said += made["output"]
            items = {kind: [i for i in made["output"] if i["type"] == kind] for kind in responses.ITEMS}
            calls = [(each["call_id"], each) for each in items["function_call"]]
            parts = {
                "content": "".join(part["text"] for each in items["message"] for part in each["content"]),
                "thought": "".join(part["text"] for each in items["reasoning"] for part in each["content"]),
            }
            usage = made["usage"]["output_tokens_details"]["reasoning_tokens"]
        self.call_ids = [each for each, _ in calls]
        assert usage > 0 or not parts["thought"]
        return parts | {
            "finish": answer.replies[0].finish,
            "calls": [(call["name"], json.loads(call["arguments"])) for _, call in calls],
        }

    def _answer(self, question: Any) -> Answer:
        return asyncio.run(self.session.answer(question))

    def check(self) -> None:
        """The record is what was sampled, each token once, after the prompt that it was sampled from."""
        check_record(self.engine.prompts, self.engine.samples, self.session.segments())


def same(name: str, text: str, other: str) -> bool:
    """Qwen's tokenizers put accents together."""
    return text == (normalize("NFC", other) if name == "qwen3" else other)


@each_dialect
@each_format
def test_a_conversation_through_the_gateway_is_one_segment_as_the_renderer_grows_it(name: str, dialect: str) -> None:
    renderer, maker = make_renderer(name), Maker(name, random.Random(4))
    seen: Counter[str] = Counter()
    for _ in range(25):
        made = maker.conversation()
        if not made.rounds:
            continue
        if dialect == "responses" and any(not before for before, _ in made.rounds[1:]):
            continue  # two turns with nothing between them are one turn's items there
        if not made.tools and any(action.tool_calls for _, action in made.rounds):
            made = Conversation(TOOLS, made.rounds, made.last)
        program = Program(renderer, dialect, [renderer.write(action, TOOLS) for _, action in made.rounds])
        for before, action in made.rounds:
            program.hear(before)
            got = program.ask(made.tools)
            assert got["finish"] == ("tool_calls" if action.tool_calls else "stop")
            assert same(name, got["content"], action.text)
            assert same(name, got["thought"], action.thinking)
            said = [(call.name, dict(call.arguments)) for call in action.tool_calls]
            assert json.dumps(got["calls"]) == json.dumps(
                json.loads(normalize("NFC", json.dumps(said, ensure_ascii=False))) if name == "qwen3" else said
            )
            seen.update(calls=len(said), thoughts=bool(action.thinking), turns=1)
        program.check()
        (segment,) = program.session.segments()
        described = renderer.chat_format.describe(made.tools)
        first = made.rounds[0][0]
        if described:  # the format has no place for tools of its own, so they are in the system message
            system = f"{first[0].content}\n\n{described}" if first[0].role == "system" else described
            rest = first[1:] if first[0].role == "system" else first
            first = (Message("system", system), *rest)
        grown = Conversation(made.tools, ((first, made.rounds[0][1]), *made.rounds[1:]), None).grown(renderer)
        assert segment.token_ids_T.tolist() == grown
        assert program.session.num_malformed == 0
    assert seen["turns"] > 25
    assert seen["calls"] > 10
    assert (seen["thoughts"] > 5) == (name not in ("tagged", "llama3"))


def as_chat(conversation: Conversation) -> list[ChatMessage]:
    """A conversation of which no turn came from here, as a program sends it."""
    messages: list[ChatMessage] = []
    for before, action in conversation.rounds:
        messages += [ChatMessage(message.role, message.content) for message in before]
        calls = tuple(FunctionCall("x", c.name, json.dumps(dict(c.arguments))) for c in action.tool_calls)
        messages.append(ChatMessage("assistant", action.text, calls, action.thinking))
    return messages + [ChatMessage(message.role, message.content) for message in conversation.last or ()]


@each_format
def test_turns_that_did_not_come_from_here_are_told_as_the_models_template_tells_them(name: str) -> None:
    """Also where it leaves earlier thoughts out, or a call is of a tool that is not offered any more."""
    renderer, maker, tokenizer = make_renderer(name), Maker(name, random.Random(5)), make_tokenizer(name)
    stitcher_of = interpreter(renderer)
    for _ in range(100):
        made = maker.conversation()
        rounds = tuple(
            (before, Action(action.text, action.tool_calls, thinking=maker.text(1) if name == "qwen3" else ""))
            for before, action in made.rounds
        )
        last = made.last or (Message("user", maker.content()),)
        conversation = Conversation(made.tools, rounds, last)
        prompt = Stitcher(renderer, stitcher_of).render(as_chat(conversation), TOOLS, made.tools)
        whole = tokenizer.encode(conversation.whole(reference(name)), add_special_tokens=False).ids
        texts = [stitcher_of.written(message, TOOLS) for message in as_chat(conversation)]
        assert prompt.ids == whole == renderer.open(texts, made.tools)
        if name not in ("tagged", "llama3"):  # the template writes whatever calls there are
            without = Stitcher(renderer, stitcher_of).render(as_chat(conversation), (), made.tools)
            assert without.ids == whole


@each_dialect
@pytest.mark.parametrize("name", ["chatml_json", "qwen3", "plain"])
def test_a_program_that_drops_thoughts_gets_the_segments_of_what_the_policy_saw(name: str, dialect: str) -> None:
    renderer, look = make_renderer(name), "<think>\nhm\n</think>\n\n" + look_up(name)
    program = Program(renderer, dialect, [look, "<think>\nso\n</think>\n\nw3", "yes"], tell_tools=False)
    program.hear([Message("user", "Say word 3.")])
    program.ask(TOOLS)
    program.said = [dropped(each) for each in program.said if each.get("type") != "reasoning"]
    program.hear([Message("tool", "w3")])
    program.ask(TOOLS)
    program.said = [dropped(each) for each in program.said if each.get("type") != "reasoning"]
    program.hear([Message("user", "Sure?")])
    program.ask(TOOLS)
    program.check()
    texts = [renderer.decode(segment.token_ids_T.tolist()) for segment in program.session.segments()]
    assert [text.count("<think>") for text in texts] == [1, 1, 0]
    assert [int(segment.loss_mask_T.sum()) for segment in program.session.segments()] == [
        sample.token_ids_N.size for sample in program.engine.samples
    ]
    assert texts[2].count("yes") == 1
    assert "w3" in texts[2]


def look_up(name: str) -> str:
    return make_renderer(name).write(Action("", (ToolCall("look", {"word": "3"}),)), TOOLS)


def dropped(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def test_qwen_tells_a_history_anew_without_thoughts_before_the_last_question_and_goes_on_from_there() -> None:
    """The program sends all thoughts back; its history is edited once, and so a segment begins, as the template has it.
    What is said after that is appended: also when the last question is another one by then."""
    renderer = make_renderer("qwen3")
    think = "<think>\nhm\n</think>\n\n"
    script = [think + "one", think + look_up("qwen3"), think + "two", think + "three", think + "four"]
    program = Program(renderer, "chat", script, tell_tools=False)
    for question in ("a?", "b?"):
        program.hear([Message("user", question)])
        program.ask(TOOLS)
    program.hear([Message("tool", "w3")])
    program.ask(TOOLS)
    assert len(program.session.segments()) == 1
    program.said[0] = {"role": "user", "content": "A?"}  # the edit
    program.said.pop()
    program.ask(TOOLS)
    first, second = program.session.segments()
    assert renderer.decode(first.token_ids_T.tolist()).count("hm") == 3
    told = renderer.decode(second.token_ids_T[~second.loss_mask_T].tolist())
    assert told.count("hm") == 1  # of the turn that called, after the last question; the turn before it has none
    program.hear([Message("user", "c?")])
    program.ask(TOOLS)
    segments = program.session.segments()
    assert len(segments) == 2  # rendered whole, the template would leave the thought of that call out by now
    assert segments[1].token_ids_T[: second.token_ids_T.size].tolist() == second.token_ids_T.tolist()
    program.check()


def test_a_thought_that_was_closed_at_once_is_left_out_as_well_where_a_history_is_told_anew() -> None:
    """As Qwen's template does with turns that were not to think."""
    renderer = make_renderer("qwen3")
    program = Program(renderer, "chat", [f"<think>\n\n</think>\n\n{word}" for word in ("one", "two")], tell_tools=False)
    program.hear([Message("user", "a?")])
    assert program.ask(())["thought"] == ""
    program.said[0] = {"role": "user", "content": "A?"}
    program.hear([Message("user", "b?")])
    program.ask(())
    told = [Message("user", "A?"), Message("assistant", "one"), Message("user", "b?")]
    assert program.engine.prompts[1] == renderer.open(told)
    program.said[0] = {"role": "user", "content": "a?"}  # back again, where it was sampled
    program.said.pop()
    program.engine._script.append("three")
    program.ask(())
    assert [renderer.decode(s.token_ids_T.tolist()).count("<think>") for s in program.session.segments()] == [1, 1]
    program.check()


@each_format
def test_a_malformed_call_is_content_and_is_counted(name: str) -> None:
    renderer = make_renderer(name)
    wrong = renderer.chat_format.quote_call("look", '{"word": 3}')
    bad = [renderer.chat_format.quote_call("fly", "{}"), renderer.chat_format.begin_call("look")]
    bad += [wrong] if name != "tagged" else []
    program = Program(renderer, "chat", bad)
    for number, text in enumerate(bad):
        program.hear([Message("user", "Go.")])
        got = program.ask(TOOLS)
        assert (got["content"], got["calls"], got["finish"]) == (text, [], "stop")
        assert program.session.num_malformed == number + 1
    program.check()
    assert len(program.session.segments()) == 1


@each_format
def test_a_call_that_must_be_is_begun_in_the_formats_own_way(name: str) -> None:
    renderer = make_renderer(name)
    whole = look_up(name)
    for choice in ("required", {"type": "function", "function": {"name": "look"}}):
        opening = renderer.chat_format.begin_call(None if choice == "required" else "look")
        assert whole.startswith(opening)
        program = Program(renderer, "chat", [whole.removeprefix(opening)], tell_tools=False)
        body = {"model": "m", "messages": [{"role": "user", "content": "Go."}], "tool_choice": choice}
        question, _ = chat_completions.read_request(body | {"tools": [tool_json(tool) for tool in TOOLS]})
        (reply,) = asyncio.run(program.session.answer(question)).replies
        assert [(call.name, json.loads(call.arguments)) for call in reply.message.calls] == [("look", {"word": "3"})]
        assert reply.finish == "tool_calls"
        (segment,) = program.session.segments()
        trained = segment.token_ids_T[segment.loss_mask_T]
        np.testing.assert_array_equal(trained, program.engine.samples[0].token_ids_N)
        assert renderer.decode(program.engine.prompts[0]).endswith(opening)
        program.check()


@each_format
def test_what_was_recalled_once_is_recalled_the_same_twice(name: str) -> None:
    renderer, maker = make_renderer(name), Maker(name, random.Random(6))
    for _ in range(100):
        messages = [
            message
            for before, action in maker.conversation().rounds
            for message in (*before, Message("assistant", renderer.write(action, TOOLS)))
        ]
        recalled = renderer.chat_format.recall(messages)
        assert renderer.chat_format.recall(recalled) == recalled
        assert renderer.open(recalled, TOOLS) == renderer.open(messages, TOOLS)


@each_format
def test_prose_is_what_stands_around_calls(name: str) -> None:
    renderer, maker = make_renderer(name), Maker(name, random.Random(7))
    for _ in range(200):
        action = maker.action(thinks=False)
        if action.tool_calls:
            assert renderer.chat_format.prose(renderer.write(action, TOOLS)) == action.text
