"""One episode's side of the gateway: asks the policy for its program, keeps the record, counts, ends.

Owns what was said in the episode, and the rule that everything sampled is recorded, whether or not the program has
waited for it. Knows no HTTP and no environment; never decides a reward.
"""

from __future__ import annotations

import asyncio
import bisect
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import numpy as np

from actors import metrics
from actors.engine import EngineDeadError
from actors.gateway.allowance import Allowance
from actors.gateway.budget import Budget
from actors.gateway.chat_format import Interpreter
from actors.gateway.conversation import Answer, ChatMessage, FinishReason, FunctionCall, Question, Reply, Utterance
from actors.gateway.errors import ApiError, ended, not_honoured
from actors.gateway.stitching import Prompt, Stitcher
from actors.gateway.voices import Ask, Voice
from actors.renderer import Renderer
from actors.sampler import Account, InfraFailureError
from broker.process.settings import GatewaySection
from broker.protocol.trajectory import MAX_SEGMENTS, Outcome, Segment, Ticket
from envs.interface import EnvironmentFailureError, Reward

SPARE_REQUESTS = 8  # beyond the turns of the ticket, for those that are refused anyway


class Session:
    """Of one episode, from before its program starts until after it has ended; single use.

    key, report_key: what calls and reports must bring. failure: what makes the episode void, once `failed` is set.
    max_turns: the environment's bound beside the ticket's, None for none.
    """

    def __init__(
        self,
        ticket: Ticket,
        voice: Voice,
        renderer: Renderer,
        interpreter: Interpreter,
        settings: GatewaySection,
        max_model_len: int,
        max_turns: int | None = None,
    ) -> None:
        self.key = f"sk-ergon-{secrets.token_urlsafe(32)}"
        self.report_key = f"rk-ergon-{secrets.token_urlsafe(32)}"
        self.ticket = ticket
        self.threads: dict[str, tuple[ChatMessage, ...]] = {}  # what was said up to each stored response
        self.reports: list[Reward] = []
        self.failure: Exception | None = None
        self.failed = asyncio.Event()
        self.was_refused = False  # a call, and it was logged
        self.num_tool_calls = 0
        self.num_malformed = 0
        self.model_s = 0.0  # while at least one call was being answered
        self._voice = voice
        self._renderer = renderer
        self._interpreter = interpreter
        self._settings = settings
        sampling = ticket.sampling
        self._max_turns = sampling.max_turns if max_turns is None else min(max_turns, sampling.max_turns)
        self._budget = Budget(msgspec.structs.replace(sampling, max_turns=self._max_turns), max_model_len)
        self._allowance = Allowance(ticket, interpreter.thinking.settings)
        self._stitcher = Stitcher(renderer, interpreter)
        self._working: dict[asyncio.Task[Answer], asyncio.Event] = {}
        self._num_open = 0
        self._num_asked = 0
        self._num_replying = 0
        self._num_busy = 0
        self._busy_since = 0.0
        self._ended = False

    @property
    def outcome(self) -> Outcome:
        """How the episode ended as far as its limits are concerned."""
        return self._budget.outcome or Outcome.COMPLETED

    @property
    def num_turns(self) -> int:
        """Replies given."""
        return self._budget.num_turns

    @property
    def account(self) -> Account:
        """What was thought."""
        return self._allowance.account

    def segments(self) -> tuple[Segment, ...]:
        """The record; one segment without a sampled token where nothing was asked."""
        segments = self._stitcher.segments()
        if segments:
            return segments
        ids = np.asarray(self._renderer.open(()), np.int32)
        return (Segment(ids, np.zeros(ids.size, np.bool_), np.zeros(ids.size, np.float32), ()),)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """While a request is read and answered. Raises ApiError for more at once than could ever be answered."""
        if self._num_open >= self._max_turns + SPARE_REQUESTS:
            raise ApiError(
                429,
                f"{self._num_open} calls of this episode are open, and the run allows no more turns; wait",
                code="busy",
            )
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    async def answer(self, question: Question) -> Answer:
        """Ask the policy. Cancelling it says that the program has hung up: the engine is told to stop.

        Raises ApiError; what voids the episode is in `failure` as well.
        """
        if self._ended or self.failed.is_set():
            raise ended()
        overridden = self._overridden(question.requested or {})
        cut = asyncio.Event()
        work = asyncio.create_task(self._answer(question, overridden, cut))
        self._working[work] = cut
        work.add_done_callback(self._done)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            cut.set()
            raise

    async def end(self) -> None:
        """Answer no more; what is being sampled is cut and recorded. Idempotent."""
        self._ended = True
        for cut in self._working.values():
            cut.set()
        while self._working:
            await asyncio.wait(set(self._working))

    def fail(self, error: Exception) -> None:
        """The episode is void; the first reason counts."""
        if self.failure is None:
            self.failure = error
        self.failed.set()

    async def _answer(self, question: Question, overridden: tuple[str, ...], cut: asyncio.Event) -> Answer:
        tools, choice = question.tools, question.tool_choice
        shown = tools if self._settings.tell_tools else ()
        telling = self._interpreter.thinking.telling(self._allowance.told(question.effort))
        messages = self._interpreter.told(question.messages, shown, telling)
        opening = self._interpreter.opening(choice.name) if choice.mode == "required" else ""
        prompt = self._stitcher.render(messages, tools, shown)
        with self._counted(question.num_replies):
            replies = await self._replies(question, prompt, opening, cut)
        return Answer(tuple(replies), len(prompt.ids) + replies[0].turn.num_lead, overridden)

    async def _replies(self, question: Question, prompt: Prompt, opening: str, cut: asyncio.Event) -> Sequence[Reply]:
        num_replies, wanted, cap = question.num_replies, question.max_tokens, self._allowance.cap(question.effort)
        async with (
            self._budget.reserve(num_replies, wanted, len(prompt.ids)) as room,
            self._allowance.reserve(num_replies, cap, room) as most,
        ):
            if cut.is_set():  # while it waited for its room
                raise ended()
            ask = Ask(prompt.ids, question.messages, question.tools, opening, room, 0, most)
            with self._busy():
                turns = await self._say(ask, num_replies, cut)
            replies = []
            for turn in turns:
                reply = self._record(question, prompt, opening, turn)
                run_cut = reply.turn.finish == "length" and (wanted is None or turn.num_sampled < wanted)
                self._budget.spend(turn.num_sampled, cut=run_cut)
                self._allowance.spend(reply.num_thinking, turn.num_forced_stops)
                replies.append(reply)
        if any(turn.finish == "abort" for turn in turns):
            raise ended()
        return replies

    async def _say(self, ask: Ask, num_replies: int, cut: asyncio.Event) -> Sequence[Utterance]:
        async def one() -> Utterance | None:
            self._num_asked += 1
            try:
                return await self._voice.say(replace(ask, number=self._num_asked), cut)
            except Exception as error:
                known = isinstance(error, InfraFailureError | EngineDeadError | EnvironmentFailureError)
                self.fail(error if known else InfraFailureError(f"gateway: {type(error).__name__}: {error}", "gateway"))
                raise

        said = await asyncio.gather(*(one() for _ in range(num_replies)), return_exceptions=True)
        if self.failure is not None:
            raise ApiError(503, f"the policy cannot answer: {self.failure}; the episode is void", code="episode_void")
        turns = [each for each in said if isinstance(each, Utterance)]
        if not turns:
            raise self._budget.context_full(len(ask.prompt_ids), num_replies)
        return turns

    def _record(self, question: Question, prompt: Prompt, opening: str, turn: Utterance) -> Reply:
        """Keep a turn; what the program gets of it."""
        turn, stopped = self._cut_at(question.stop, turn)
        finish: FinishReason = "length" if turn.finish != "stop" else "stop"
        text = self._renderer.text(turn.ids_N[turn.num_lead :].tolist())
        tools = question.tools if question.tools and question.tool_choice.mode != "none" else None
        spoken = self._interpreter.spoken(text, turn.began_open, opening, tools)
        said = spoken.said
        if stopped:
            kept = said[: min(at for stop in question.stop if (at := said.find(stop, len(opening))) >= 0)]
            spoken = self._interpreter.spoken(kept.removeprefix(opening), False, opening, tools)._replace(
                thought=spoken.thought
            )
        self.num_malformed += spoken.malformed is not None and finish == "stop"
        self.num_tool_calls += len(spoken.calls)
        calls = tuple(
            FunctionCall(f"call_{secrets.token_hex(12)}", call.name, json.dumps(dict(call.arguments)))
            for call in spoken.calls
        )
        if calls and finish == "stop":
            finish = "tool_calls"
        message = ChatMessage("assistant", spoken.content, calls, spoken.thought)
        self._stitcher.record(prompt, turn, message, said)
        return Reply(message, finish, turn, self._num_thinking(turn))

    def _num_thinking(self, turn: Utterance) -> int:
        """Tokens that the policy sampled while thinking."""
        own = turn.mask_N[turn.num_lead :]
        thought = self._interpreter.thinking.find(turn.ids_N[turn.num_lead :].tolist(), turn.began_open)
        return int(own[thought.positions].sum())

    def _cut_at(self, stops: Sequence[str], turn: Utterance) -> tuple[Utterance, bool]:
        """The turn up to the token that completes the first of these texts in its answer, and whether there is one.

        What the engine has sampled beyond it was never seen by anybody, so it is no part of the episode.
        """
        ids = turn.ids_N[turn.num_lead :].tolist()

        def stopped(num_tokens: int) -> bool:
            text = self._renderer.text(ids[:num_tokens])
            answer = self._interpreter.thinking.split(text, turn.began_open).answer
            return any(stop in answer for stop in stops)

        if not stops or not stopped(len(ids)):
            return turn, False
        kept = turn.num_lead + bisect.bisect_left(range(len(ids) + 1), True, key=stopped)
        metrics.gateway_discarded_tokens.inc(int(turn.mask_N[kept:].sum()))
        return turn.first(kept), True

    @contextmanager
    def _counted(self, num_replies: int) -> Iterator[None]:
        """While so many replies are given. Raises ApiError where a trajectory could not hold them as segments."""
        if self._stitcher.num_segments + self._num_replying + num_replies > MAX_SEGMENTS:
            raise self._budget.over(
                Outcome.TRUNCATED_TURNS, "max_segments", f"the {MAX_SEGMENTS} segments of a trajectory"
            )
        self._num_replying += num_replies
        try:
            yield
        finally:
            self._num_replying -= num_replies

    def _overridden(self, requested: Mapping[str, float]) -> tuple[str, ...]:
        """What the program wants to be sampled otherwise than the run does. Raises ApiError where that is refused."""
        others = []
        for name, value in requested.items():
            fixed = getattr(self.ticket.sampling, name)
            if value == fixed:
                continue
            if self._settings.sampling == "refuse":
                raise not_honoured(name, value, f"this run samples with {fixed:g}; leave it out")
            others.append(name)
            metrics.gateway_overridden.labels(name).inc()
        return tuple(others)

    def _done(self, work: asyncio.Task[Answer]) -> None:
        del self._working[work]
        if not work.cancelled():
            work.exception()  # looked at: a program that has hung up takes no answer

    @contextmanager
    def _busy(self) -> Iterator[None]:
        if not self._num_busy:
            self._busy_since = time.monotonic()
        self._num_busy += 1
        try:
            yield
        finally:
            self._num_busy -= 1
            if not self._num_busy:
                self.model_s += time.monotonic() - self._busy_since
