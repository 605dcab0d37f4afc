"""Calls become segments: exactly what was sampled, each token once, prompts are prefixes of segments."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine import Sample
from actors.gateway.conversation import ChatMessage, FunctionCall, Utterance
from actors.gateway.stitching import Prompt, Stitcher
from broker.protocol.trajectory import VersionRun
from tests.unit.actors.gateway.support import check_record, interpreter
from tests.unit.actors.support import ADD, LOOKUP, make_renderer

RENDERER = make_renderer()
INTERPRETER = interpreter()
TOOLS = (LOOKUP, ADD)
USER = ChatMessage("user", "Say word 3.")


def sample_of(ids: list[int], version: int = 4, finish: Any = "stop") -> Sample:
    logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
    runs = (VersionRun(1, version, len(ids)),) if ids else ()
    return Sample(np.asarray(ids, np.int32), logprobs, runs, finish)


def utterance(forced: list[int], sample: Sample) -> Utterance:
    """A turn that begins with these ids and goes on as sampled."""
    num, zeros = len(forced), np.zeros(len(forced), np.float32)
    return Utterance(
        np.concatenate([np.asarray(forced, np.int32), sample.token_ids_N]),
        np.arange(num + sample.token_ids_N.size) >= num,
        np.concatenate([zeros, sample.logprobs_N]),
        sample.version_runs,
        sample.finish,
        num,
    )


@dataclass
class Episode:
    """A stitcher, and all that went through it."""

    stitcher: Stitcher = field(default_factory=lambda: Stitcher(RENDERER, INTERPRETER))
    prompts: list[Prompt] = field(default_factory=list)
    sampled_from: list[list[int]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def call(self, *messages: ChatMessage, says: str, opening: str = "", cut: bool = False) -> ChatMessage:
        ids = RENDERER.turn(says)[:-1] if cut else RENDERER.turn(says)
        return self.answer_ids(self.stitcher.render(messages, TOOLS, ()), ids, opening=opening)

    def answer(self, prompt: Prompt, says: str, *, version: int = 4) -> ChatMessage:
        return self.answer_ids(prompt, RENDERER.turn(says), version)

    def answer_ids(self, prompt: Prompt, ids: list[int], version: int = 4, opening: str = "") -> ChatMessage:
        sample = sample_of(ids, version)
        forced = RENDERER.voice(opening) if opening else []
        turn = utterance(forced, sample)
        spoken = INTERPRETER.spoken(RENDERER.text(ids), False, opening, TOOLS)
        calls = tuple(
            FunctionCall(f"call_{len(self.samples)}_{number}", call.name, json.dumps(dict(call.arguments)))
            for number, call in enumerate(spoken.calls)
        )
        message = ChatMessage("assistant", spoken.content, calls)
        self.stitcher.record(prompt, turn, message, spoken.said)
        self.prompts.append(prompt)
        self.sampled_from.append([*prompt.ids, *forced])
        self.samples.append(sample)
        return message

    def texts(self) -> list[str]:
        """The segments, with what was sampled in brackets."""
        texts = []
        for segment in self.stitcher.segments():
            text, inside = "", False
            for token, sampled in zip(segment.token_ids_T.tolist(), segment.loss_mask_T.tolist(), strict=True):
                text += ("[" if sampled else "]") * (sampled != inside) + RENDERER.decode([token])
                inside = sampled
            texts.append(text + "]" * inside)
        return texts

    def check(self) -> None:
        check_record(self.sampled_from, self.samples, self.stitcher.segments())


def tool(content: str) -> ChatMessage:
    return ChatMessage("tool", content)


def test_a_conversation_that_grows_is_one_segment() -> None:
    episode = Episode()
    first = episode.call(USER, says="<tool>look 3</tool>")
    second = episode.call(USER, first, tool("w3"), says="w3")
    episode.call(USER, first, tool("w3"), second, ChatMessage("user", "Sure?"), says="yes")
    assert episode.texts() == [
        "<|im_start|>user\nSay word 3.<|im_end|>\n<|im_start|>assistant\n[<tool>look 3</tool><|im_end|>]\n"
        "<|im_start|>tool\nw3<|im_end|>\n<|im_start|>assistant\n[w3<|im_end|>]\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[yes<|im_end|>]"
    ]
    episode.check()


def test_what_was_sampled_is_reused_and_not_tokenised_again() -> None:
    episode = Episode()
    letters = [RENDERER.turn(letter)[0] for letter in "answer"]
    assert letters != RENDERER.turn("answer")[:-1]  # not as the tokenizer would write it
    prompt = episode.stitcher.render((USER,), TOOLS, ())
    first = episode.answer_ids(prompt, [*letters, *RENDERER.turn("")])
    episode.call(USER, first, ChatMessage("user", "Again."), says="yes")
    assert episode.prompts[1].ids[len(prompt.ids) :][: len(letters)] == letters
    assert len(episode.texts()) == 1
    episode.check()


def test_arguments_may_come_back_as_other_json() -> None:
    episode = Episode()
    first = episode.call(USER, says='<tool>add {"a": 1, "b": 2}</tool>')
    assert first.calls[0].arguments == '{"a": 1, "b": 2}'
    echoed = ChatMessage("assistant", "", (FunctionCall("other", "add", '{"b":2,"a":1}'),))
    episode.call(USER, echoed, tool("3"), says="3")
    assert len(episode.texts()) == 1
    episode.check()


def test_a_turn_that_was_cut_is_closed_before_something_follows() -> None:
    episode = Episode()
    first = episode.call(USER, says="w3 and", cut=True)
    episode.call(USER, first, ChatMessage("user", "Go on."), says="so on", cut=True)
    assert episode.texts() == [
        "<|im_start|>user\nSay word 3.<|im_end|>\n<|im_start|>assistant\n[w3 and]<|im_end|>\n"
        "<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n[so on]"
    ]
    episode.check()


def test_words_added_to_a_turn_that_was_cut_are_context_of_the_same_segment() -> None:
    episode = Episode()
    episode.call(USER, says="<code>go</code>", cut=True)
    added = ChatMessage("assistant", "<code>go</code>\nCalling tools: []")
    episode.call(USER, added, ChatMessage("user", "Observation"), says="yes")
    assert episode.texts() == [
        "<|im_start|>user\nSay word 3.<|im_end|>\n"
        "<|im_start|>assistant\n[<code>go</code>]\nCalling tools: []<|im_end|>\n"
        "<|im_start|>user\nObservation<|im_end|>\n<|im_start|>assistant\n[yes<|im_end|>]"
    ]
    episode.check()


def test_words_that_only_begin_like_a_turn_that_was_cut_are_words() -> None:
    episode = Episode()
    episode.call(USER, says="an", cut=True)
    other = ChatMessage("user", "Other.")
    episode.call(other, ChatMessage("assistant", "answer"), USER, says="yes")
    opened = RENDERER.open([INTERPRETER.written(other, ())])
    assert episode.prompts[1].ids[len(opened) :][: len(RENDERER.turn("answer"))] == RENDERER.turn("answer")
    episode.check()


def test_branches_are_segments_that_share_context_and_train_it_once() -> None:
    episode = Episode()
    first = episode.call(USER, says="one")
    prompts = [episode.stitcher.render((USER, first, ChatMessage("user", "More.")), TOOLS, ()) for _ in range(2)]
    for prompt, says in zip(prompts, ["two", "three"], strict=True):  # in flight at the same time
        episode.answer(prompt, says)
    start = "<|im_start|>user\nSay word 3.<|im_end|>\n<|im_start|>assistant\n"
    more = "\n<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n"
    assert episode.texts() == [
        f"{start}[one<|im_end|>]{more}[two<|im_end|>]",
        f"{start}one<|im_end|>{more}[three<|im_end|>]",
    ]
    episode.check()


def test_an_edited_history_begins_anew_with_the_ids_that_were_sampled_in_it() -> None:
    episode = Episode()
    letters = [RENDERER.turn(letter)[0] for letter in "answer"]
    first = episode.answer_ids(episode.stitcher.render((USER,), TOOLS, ()), [*letters, *RENDERER.turn("")])
    episode.call(ChatMessage("user", "Summary."), first, ChatMessage("user", "More."), says="yes")
    assert episode.texts()[1] == (
        "<|im_start|>user\nSummary.<|im_end|>\n<|im_start|>assistant\nanswer<|im_end|>\n"
        "<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n[yes<|im_end|>]"
    )
    opened = RENDERER.open([INTERPRETER.written(ChatMessage("user", "Summary."), ())])
    assert episode.prompts[1].ids[len(opened) :][: len(letters)] == letters
    assert episode.prompts[1].parent is None
    episode.check()


def test_words_put_into_the_policys_mouth_are_context() -> None:
    episode = Episode()
    episode.call(USER, says="w3")
    made_up = ChatMessage("assistant", "", (FunctionCall("x", "look", '{"word": "3"}'),))
    gone = ChatMessage("assistant", "", (FunctionCall("y", "gone", "[1]"),))
    episode.call(USER, made_up, tool("w3"), gone, tool("?"), says="w3")
    assert episode.texts()[1] == (
        "<|im_start|>user\nSay word 3.<|im_end|>\n<|im_start|>assistant\n<tool>look 3</tool><|im_end|>\n"
        "<|im_start|>tool\nw3<|im_end|>\n<|im_start|>assistant\n<tool>gone [1]</tool><|im_end|>\n"
        "<|im_start|>tool\n?<|im_end|>\n<|im_start|>assistant\n[w3<|im_end|>]"
    )
    episode.check()


def test_a_forced_opening_is_context_of_the_turn_it_begins() -> None:
    episode = Episode()
    first = episode.call(USER, says="look 3</tool>", opening="<tool>")
    assert [call.name for call in first.calls] == ["look"]
    episode.call(USER, first, tool("w3"), says="w3")
    assert episode.texts() == [
        "<|im_start|>user\nSay word 3.<|im_end|>\n<|im_start|>assistant\n<tool>[look 3</tool><|im_end|>]\n"
        "<|im_start|>tool\nw3<|im_end|>\n<|im_start|>assistant\n[w3<|im_end|>]"
    ]
    episode.check()


def test_versions_of_a_segment_are_run_length_coded() -> None:
    episode = Episode()
    first = episode.answer(episode.stitcher.render((USER,), TOOLS, ()), "one", version=4)
    second = episode.answer(episode.stitcher.render((USER, first), TOOLS, ()), "two", version=4)
    episode.answer(episode.stitcher.render((USER, first, second), TOOLS, ()), "three", version=5)
    (segment,) = episode.stitcher.segments()
    sizes = [len(RENDERER.turn(text)) for text in ("one", "two", "three")]
    assert segment.version_runs == (VersionRun(1, 4, sizes[0] + sizes[1]), VersionRun(1, 5, sizes[2]))


def test_tools_are_told_in_the_system_message() -> None:
    messages = INTERPRETER.told((USER,), TOOLS, "")
    assert [message.role for message in messages] == ["system", "user"]
    assert "<tool>look WORD</tool> Look a word up." in messages[0].content
    merged = INTERPRETER.told((ChatMessage("system", "Be brief."), USER), TOOLS, "")
    assert [message.role for message in merged] == ["system", "user"]
    assert merged[0].content.startswith("Be brief.\n\nTools:")
    assert INTERPRETER.told((USER,), (), "") == (USER,)


TEXTS = st.sampled_from(["yes", "no", "<tool>look a</tool>", 'well <tool>add {"a": 1, "b": 2}</tool>', "<tool>bad", ""])
WORDS = st.sampled_from(["go on", "why?", "w3"])


@settings(max_examples=100)
@given(data=st.data())
def test_random_calls_branches_and_edits(data: st.DataObject) -> None:
    episode = Episode()
    known: list[tuple[ChatMessage, ...]] = [(USER,), (ChatMessage("system", "s"), USER)]
    waiting: list[tuple[Prompt, tuple[ChatMessage, ...], str]] = []
    for _ in range(data.draw(st.integers(1, 14), "number of acts")):
        if waiting and data.draw(st.booleans(), "an answer comes"):
            prompt, messages, opening = waiting.pop(data.draw(st.integers(0, len(waiting) - 1), "which"))
            text = data.draw(TEXTS, "says")
            # Also tokens that the tokenizer would not choose, and turns that are cut.
            ids = (
                [RENDERER.turn(c)[0] for c in text]
                if data.draw(st.booleans(), "by letters")
                else RENDERER.turn(text)[:-1]
            )
            ids += [] if data.draw(st.booleans(), "cut") else RENDERER.turn("")
            reply = episode.answer_ids(prompt, ids, data.draw(st.integers(4, 5), "version"), opening)
            known.append((*messages, reply))
            continue
        messages = data.draw(st.sampled_from(known), "conversation")
        if messages[-1].role == "assistant" and data.draw(st.integers(0, 3), "words added") == 0:
            messages = (*messages[:-1], ChatMessage("assistant", messages[-1].content + " and so on"))
        if len(messages) > 2 and data.draw(st.integers(0, 3), "edit") == 0:
            gone = data.draw(st.integers(0, len(messages) - 2), "forgotten")
            messages = messages[:gone] + messages[gone + 1 :]
        if data.draw(st.booleans(), "more is said"):
            messages = (*messages, ChatMessage(data.draw(st.sampled_from(["user", "tool"])), data.draw(WORDS)))
        opening = "<tool>" if data.draw(st.integers(0, 5), "forced") == 0 else ""
        waiting.append((episode.stitcher.render(messages, TOOLS, ()), messages, opening))
    episode.check()
