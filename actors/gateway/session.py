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

import numpy as np
from msgspec.structs import replace

from actors import metrics
from actors.engine import Sample
from actors.gateway.budget import Budget
from actors.gateway.chat_format import call_opening, parse, told, written
from actors.gateway.conversation import Answer, ChatMessage, FinishReason, FunctionCall, Question, Reply
from actors.gateway.errors import ApiError, ended, not_honoured
from actors.gateway.stitching import Prompt, Stitcher
from actors.gateway.voices import Ask, Voice
from actors.renderer import Renderer
from broker.process.settings import GatewaySection
from broker.protocol.trajectory import Outcome, Segment, Ticket, VersionRun
from envs.interface import Reward

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
        self._settings = settings
        sampling = ticket.sampling
        self._max_turns = sampling.max_turns if max_turns is None else min(max_turns, sampling.max_turns)
        self._budget = Budget(replace(sampling, max_turns=self._max_turns), max_model_len)
        self._stitcher = Stitcher(renderer, written)
        self._working: dict[asyncio.Task[Answer], asyncio.Event] = {}
        self._num_open = 0
        self._num_asked = 0
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
        messages = told(question.messages, tools) if self._settings.tell_tools else question.messages
        opening = call_opening(choice.name) if choice.mode == "required" else ""
        prompt = self._stitcher.render(messages, tools, opening)
        wanted = question.max_tokens
        async with self._budget.reserve(question.num_replies, wanted, len(prompt.ids)) as room:
            if cut.is_set():  # while it waited for its room
                raise ended()
            with self._busy():
                samples = await self._say(question, prompt, opening, room, cut)
            replies = []
            for sample in samples:
                reply = self._record(question, prompt, opening, sample)
                run_cut = reply.sample.finish == "length" and (wanted is None or room < wanted)
                self._budget.spend(sample.token_ids_N.size, cut=run_cut)
                replies.append(reply)
        if any(sample.finish == "abort" for sample in samples):
            raise ended()
        return Answer(tuple(replies), len(prompt.ids), overridden)

    async def _say(
        self, question: Question, prompt: Prompt, opening: str, room: int, cut: asyncio.Event
    ) -> Sequence[Sample]:
        async def one() -> Sample:
            self._num_asked += 1
            request_id = f"{self.ticket.ticket_id}.{self.ticket.attempt}.{self._num_asked}"
            ask = Ask(prompt.ids, question.messages, question.tools, opening, room, request_id)
            try:
                return await self._voice.say(ask, cut)
            except Exception as error:
                self.fail(error)
                raise

        said = await asyncio.gather(*(one() for _ in range(question.num_replies)), return_exceptions=True)
        samples = [each for each in said if isinstance(each, Sample)]
        if len(samples) < len(said):
            raise ApiError(503, f"the policy cannot answer: {self.failure}; the episode is void", code="episode_void")
        return samples

    def _record(self, question: Question, prompt: Prompt, opening: str, sample: Sample) -> Reply:
        """Keep a sample; what the program gets of it."""
        sample, stopped = _cut_at(question.stop, sample, self._renderer)
        text = said = opening + self._renderer.text(sample.token_ids_N.tolist())
        if stopped:
            text = text[: min(at for stop in question.stop if (at := text.find(stop, len(opening))) >= 0)]
        finish: FinishReason = "length" if sample.finish != "stop" else "stop"
        message = ChatMessage("assistant", text)
        if question.tools and question.tool_choice.mode != "none":
            spoken = parse(text, question.tools)
            self.num_malformed += spoken.malformed is not None and finish == "stop"
            if spoken.calls:
                self.num_tool_calls += len(spoken.calls)
                calls = tuple(
                    FunctionCall(f"call_{secrets.token_hex(12)}", call.name, json.dumps(dict(call.arguments)))
                    for call in spoken.calls
                )
                message = ChatMessage("assistant", spoken.content, calls)
                finish = "tool_calls" if finish == "stop" else finish
        self._stitcher.record(prompt, sample, message, said)
        return Reply(message, finish, sample)

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


def _cut_at(stops: Sequence[str], sample: Sample, renderer: Renderer) -> tuple[Sample, bool]:
    """The sample up to the token that completes the first of these texts, and whether there is one.

    What the engine has sampled beyond it was never seen by anybody, so it is no part of the episode.
    """
    ids = sample.token_ids_N.tolist()
    if not stops or not any(stop in renderer.text(ids) for stop in stops):
        return sample, False

    def stopped(num_tokens: int) -> bool:
        return any(stop in renderer.decode(ids[:num_tokens]) for stop in stops)

    kept = bisect.bisect_left(range(len(ids) + 1), True, key=stopped)
    metrics.gateway_discarded_tokens.inc(len(ids) - kept)
    runs: list[VersionRun] = []
    left = kept
    for run in sample.version_runs:
        if left > 0:
            runs.append(run._replace(num_tokens=min(left, run.num_tokens)))
            left -= run.num_tokens
    return Sample(sample.token_ids_N[:kept], sample.logprobs_N[:kept], tuple(runs), "stop"), True
