"""Whatever a program does with its calls, in whatever order they are answered: the record is what was sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine import Sample
from actors.gateway.conversation import Answer, ChatMessage, Question, ToolChoice
from actors.gateway.errors import ApiError
from actors.gateway.session import Session
from actors.gateway.voices import Voice
from actors.renderer import Renderer
from broker.process.settings import GatewaySection
from broker.protocol.trajectory import Sampling, VersionRun
from envs.interface import Action, ToolCall
from tests.unit.actors.conversations import NAMES, TOOLS, make_renderer
from tests.unit.actors.gateway.support import ROOMY, check_record, interpreter
from tests.unit.actors.support import ScriptedEngine, make_ticket

USER = ChatMessage("user", "Say word 3.")
STARTS = [(USER,), (ChatMessage("system", "Be brief."), USER)]
ACTIONS = [
    Action("yes"),
    Action("no", thinking="hm"),
    Action("", (ToolCall("look", {"word": "a"}),)),
    Action("", (ToolCall("add", {"a": 1, "b": 2}),), thinking="add them"),
]
MALFORMED = ["<tool>bad", "a</tool>", "<tool_call>bad", '{"name": "bad"', "<think>bad"]


class HeldEngine(ScriptedEngine):
    """Answers when the test says so, with the ids that it says; remembers all prompts and samples."""

    def __init__(self, renderer: Renderer) -> None:
        super().__init__(renderer, [])
        self.waiting: dict[str, tuple[list[int], asyncio.Future[Sample]]] = {}
        self.record: list[tuple[list[int], Sample]] = []

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
    ) -> Sample:
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        self.waiting[request_id] = (list(prompt_ids), future)
        return await future

    def answer(self, request_id: str, ids: list[int], finish: Any) -> None:
        prompt, future = self.waiting.pop(request_id)
        runs = (VersionRun(1, 4 + len(self.record) % 2, len(ids)),) if ids else ()
        logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32) - len(self.record)
        sample = Sample(np.asarray(ids, np.int32), logprobs, runs, finish)
        self.record.append((prompt, sample))
        future.set_result(sample)

    async def abort(self, request_id: str) -> None:
        if request_id in self.waiting:
            self.answer(request_id, self._renderer.turn("partial")[:2], "abort")


class Play:
    """One episode, driven by what hypothesis draws."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.renderer = make_renderer(self.draw(NAMES, "format"))
        self.engine = HeldEngine(self.renderer)
        ticket, ends = make_ticket(sampling=ROOMY), (self.renderer, interpreter(self.renderer))
        voice = Voice(ticket, self.engine, *ends, 5000)
        self.session = Session(ticket, voice, *ends, GatewaySection(), 5000)
        self.known: list[tuple[ChatMessage, ...]] = list(STARTS)
        self.calls: dict[asyncio.Task[Answer], tuple[ChatMessage, ...]] = {}

    def draw(self, choices: Sequence[Any], label: str) -> Any:
        return self.data.draw(st.sampled_from(choices), label)

    async def run(self) -> None:
        for _ in range(self.data.draw(st.integers(1, 16), "number of acts")):
            act = self.draw(["ask", "ask", "answer", "answer", "hang up"], "act")
            if act == "ask" or not self.engine.waiting:
                self.ask()
            elif act == "answer":
                self.answer()
            else:
                self.draw(list(self.calls), "who hangs up").cancel()
            for _ in range(8):  # until whatever follows has followed
                await asyncio.sleep(0)
            self.listen()
        await self.session.end()
        results = await asyncio.gather(*self.calls, return_exceptions=True)
        assert all(isinstance(each, Answer | ApiError | asyncio.CancelledError) for each in results)
        assert not self.engine.waiting
        prompts, samples = [each[0] for each in self.engine.record], [each[1] for each in self.engine.record]
        if samples:
            check_record(prompts, samples, self.session.segments())

    def ask(self) -> None:
        messages = self.draw(self.known, "conversation")
        if len(messages) > 2 and self.draw([True, False, False], "edit"):
            gone = self.data.draw(st.integers(0, len(messages) - 2), "forgotten")
            messages = messages[:gone] + messages[gone + 1 :]
        if self.draw([True, False, False], "thoughts dropped"):
            messages = tuple(replace(message, thought="") for message in messages)
        if self.draw([True, False], "more is said"):
            role = self.draw(["user", "tool"], "by")
            messages = (*messages, ChatMessage(role, self.draw(["go on", "why?"], "words")))
        question = Question(
            messages,
            self.draw([(), TOOLS], "tools"),
            num_replies=self.draw([1, 1, 2, 3], "n"),
            max_tokens=self.draw([None, 5], "max_tokens"),
        )
        if question.tools:
            mode = self.draw([ToolChoice(), ToolChoice("none"), ToolChoice("required")], "tool_choice")
            question = Question(messages, question.tools, mode, question.num_replies, question.max_tokens)
        self.calls[asyncio.ensure_future(self.session.answer(question))] = messages

    def answer(self) -> None:
        renderer = self.renderer
        text = self.draw([*(renderer.write(action, TOOLS) for action in ACTIONS), *MALFORMED], "says")
        # Also tokens that the tokenizer would not choose.
        ids = (
            [renderer.voice(c)[0] for c in text] if self.draw([True, False], "by letters") else renderer.turn(text)[:-1]
        )
        finish = self.draw(["stop", "length"], "finish")
        ids += renderer.turn("") if finish == "stop" else []
        self.engine.answer(self.draw(list(self.engine.waiting), "whom"), ids, finish)

    def listen(self) -> None:
        """What was answered can be gone on with."""
        for call in [call for call in self.calls if call.done() and not call.cancelled() and call.exception() is None]:
            messages = self.calls.pop(call)
            self.known += [(*messages, reply.message) for reply in call.result().replies]


@settings(max_examples=100)
@given(data=st.data())
def test_the_record_is_what_the_engine_sampled_each_token_once(data: st.DataObject) -> None:
    asyncio.run(Play(data).run())
