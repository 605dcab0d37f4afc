"""How a turn is sampled: within the ticket's limits and its thinking budget, by the engine or by a reference policy.

    begin -> draw -> thinking over its limit? cut, close it -> draw on -> ... -> the turn ends

Thinking is enforced in phases: what may be thought is what the engine is asked for at first; where thinking is still
open when its limit is reached, the actor writes the stop phrase and the closing tag, and the policy goes on with its
answer. What the actor writes was not sampled and is never reported so: its loss mask is False, it has no log-probs and
no version. Where thinking begins so late that it is asked for with the answer, what lies beyond its limit is thrown
away: a sample that ends where a rule about what came before says so is a sample of the same policy.

Owns the account of an episode's thinking, and what becomes of a request at the deadline. Never grades, never calls a
tool, never decides an outcome.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from actors.engine import Engine, EngineDeadError, FinishReason, Sample
from actors.renderer import Renderer
from actors.script import Script
from actors.thinking import Thinking, Thought
from broker.process.thinking_settings import Budget, ThinkingSection
from broker.protocol.trajectory import Ticket, VersionRun
from envs.interface import Message

ABORT_RETRY_S = 1.0


class InfraFailureError(Exception):
    """The episode could not be run through no fault of policy or environment; its ticket should be retried.

    cause: what failed, one of `actors.metrics.CAUSES`.
    """

    def __init__(self, message: str, cause: str = "actor") -> None:
        super().__init__(message)
        self.cause = cause


class Trace(Protocol):
    """The episode's growing token trace, which a turn is added to."""

    ids: list[int]
    num_turns: int
    model_s: float

    @property
    def num_sampled(self) -> int:
        """Tokens sampled so far."""
        ...

    def add_context(self, ids: Sequence[int], messages: Sequence[Message]) -> None:
        """Append tokens that were not sampled."""
        ...

    def add_sample(self, sample: Sample) -> None:
        """Append tokens that were."""
        ...


@dataclass(slots=True)
class Account:
    """An episode's thinking, as TrajectoryHead has it."""

    num_thinking_tokens: int = 0
    num_overrun_tokens: int = 0
    num_forced_stops: int = 0

    def book(self, num_thinking: int, budget: Budget, per: str) -> None:
        """Count the thinking tokens of a turn, whose budget is for it alone or for the whole episode (`per`)."""
        self.num_thinking_tokens += num_thinking
        if budget is None:
            return
        if per == "turn":
            self.num_overrun_tokens += max(0, num_thinking - budget)
        else:
            self.num_overrun_tokens = max(0, self.num_thinking_tokens - budget)


@dataclass(slots=True)
class Turn:
    """One turn as it was sampled: its tokens, those that the actor wrote into it included, which of them were sampled,
    whether thinking was open before the first, and how it ended ("length": no room for another token)."""

    began_open: bool
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    finish: FinishReason = "length"

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return sum(self.mask)

    def extend(self, ids: Sequence[int], sampled: bool) -> None:
        """Add tokens."""
        self.ids += ids
        self.mask += [sampled] * len(ids)


class Sampler:
    """Samples the turns of one episode, each with `turn`; single use."""

    def __init__(
        self,
        ticket: Ticket,
        engine: Engine,
        renderer: Renderer,
        thinking: ThinkingSection,
        max_model_len: int,
        deadline: float,
        cut: asyncio.Event | None = None,
        interrupt: asyncio.Future[None] | None = None,
    ) -> None:
        """max_model_len: tokens the engine takes at most, prompt and answer together. deadline: see below. cut: once
        it is set, requests are aborted, too. interrupt: once it is done, turns are left unfinished."""
        self.account = Account()
        self.unfinished: Turn | None = None
        """The turn that was interrupted, in this sampler or in the one before it; the next `turn` goes on with it."""
        self.deadline = deadline
        """When requests are aborted, by time.monotonic(); the episode's, or that of the turn."""
        self.thinking = Thinking(thinking, renderer)
        self._ticket = ticket
        self._engine = engine
        self._renderer = renderer
        self._max_model_len = max_model_len
        self._budget = ticket.thinking_budget
        self._limit = thinking.limit(self._budget)
        self._num_requests = 0
        self._cut_now = cut
        self._interrupt = interrupt
        self._interrupted = False

    async def turn(
        self, trace: Trace, text: str | None = None, *, opening: Sequence[int] = (), most: int | None = None
    ) -> Turn | None:
        """Sample the next turn, or write `text`, a reference policy's; None where there is no room for a token. One
        that ends with "abort" and is `unfinished` was interrupted, otherwise it has run out of time or was cut.

        opening: tokens that the actor begins the turn with; such a turn does not think where its thinking is limited,
        or opened for it. most: thinking tokens that it may have at most, whatever the ticket allows. Raises
        InfraFailureError, and EngineDeadError where no further request can be served.
        """
        allowed = self._allowed(most)
        if opening and (allowed is not None or self._header(trace, None)[1]):
            allowed = 0
        turn, self.unfinished = self.unfinished or self._begin(trace, allowed, opening), None
        if turn is None:
            return None
        ends = self.thinking, self._renderer
        script = None if text is None else Script(*ends, text, allowed, turn.began_open, self._kept(most))
        thought = self.thinking.find(turn.ids, turn.began_open)
        self._num_requests = 0
        while (room := self._room(trace, turn.num_sampled)) > 0:
            if thought.is_open and allowed is not None and _spent(turn, thought) >= allowed:
                if self._room(trace, turn.num_sampled, len(self.thinking.stop_ids)) <= 0:
                    break  # nothing could be answered any more
                self._stop_thinking(trace, turn, script)
                thought = thought._replace(is_open=False)
                continue
            stop = self._renderer.stop_token_ids
            if allowed and (thought.is_open or not turn.ids):
                of_tag = 0 if thought.is_open else self.thinking.num_open_tokens
                room = min(room, of_tag + allowed - _spent(turn, thought))
            elif allowed is not None:  # where thinking begins late, nothing needs to be thrown away
                stop = (*stop, *self.thinking.open_token_ids)
            drawn = await self._draw(trace, room, stop) if script is None else script.draw(room)
            sample, thought = self._cut(turn, drawn, allowed)
            trace.add_sample(sample)
            turn.extend(sample.token_ids_N.tolist(), True)
            if self._ends(turn, sample, room):
                break
        if turn.finish == "abort" and self._interrupted:
            self.unfinished = turn  # its thinking is booked when it ends
        else:
            spent = _spent(turn, self.thinking.find(turn.ids, turn.began_open))
            self.account.book(spent, self._budget, self.thinking.settings.per)
        return turn

    def _begin(self, trace: Trace, allowed: int | None, opening: Sequence[int]) -> Turn | None:
        """A new turn, whose header and opening are in the trace; None where there is no room for a token after them."""
        header, is_open = self._header(trace, allowed)
        header = [*header, *opening]
        if self._room(trace, 0, len(header)) <= 0:
            return None
        trace.add_context(header, ())
        return Turn(is_open)

    def _ends(self, turn: Turn, sample: Sample, num_asked: int) -> bool:
        """Whether the turn is over with this sample, which it has already."""
        if sample.finish == "length":
            return sample.token_ids_N.size < num_asked  # the engine's own limit
        if sample.finish == "abort" or turn.ids[-1] in self._renderer.stop_token_ids:
            turn.finish = sample.finish
            return True
        return False

    def _stop_thinking(self, trace: Trace, turn: Turn, script: Script | None) -> None:
        """Write what ends thinking."""
        trace.add_context(self.thinking.stop_ids, ())
        turn.extend(self.thinking.stop_ids, False)
        self.account.num_forced_stops += 1
        if script:
            script.skip_thinking()

    def _room(self, trace: Trace, num_sampled: int, num_written: int = 0) -> int:
        """Tokens that may yet be sampled in a turn with so many, after `num_written` more that are not."""
        sampling = self._ticket.sampling
        return min(
            sampling.max_turn_tokens - num_sampled,
            sampling.max_episode_tokens - trace.num_sampled,
            self._max_model_len - len(trace.ids) - num_written,
        )

    def _allowed(self, most: int | None) -> int | None:
        """Thinking tokens that the next turn may have, at most so many; None for any number."""
        left = self._limit
        if left is not None and self.thinking.settings.per == "episode":
            left = max(0, left - self.account.num_thinking_tokens)
        return min((each for each in (left, most) if each is not None), default=None)

    def _kept(self, most: int | None) -> int | None:
        """Thinking tokens that keep a soft budget, which is overrun by what is allowed; None where none is soft."""
        budget = self._budget
        if not budget or self._limit == budget:
            return None
        if self.thinking.settings.per == "episode":
            budget = max(0, budget - self.account.num_thinking_tokens)
        return budget if most is None else min(budget, most)

    def _header(self, trace: Trace, allowed: int | None) -> tuple[list[int], bool]:
        """What the actor adds to the turn's header, to open or to close thinking; whether it is open after that."""
        is_open = self.thinking.opened_by(trace.ids)
        if allowed == 0:
            return ([] if self.thinking.closed_by(trace.ids) else self.thinking.closing(is_open)), False
        if self.thinking.settings.opens == "context" and not is_open:
            return self.thinking.open_ids, True
        return [], is_open

    def _cut(self, turn: Turn, sample: Sample, allowed: int | None) -> tuple[Sample, Thought]:
        """The sample up to the last token that may be thought, and where thinking stands with it."""
        ids = [*turn.ids, *sample.token_ids_N.tolist()]
        thought = self.thinking.find(ids, turn.began_open)
        if allowed is None:
            return sample, thought
        mask = [*turn.mask, *[True] * sample.token_ids_N.size]
        sampled = [i for i in thought.positions if mask[i]]
        if len(sampled) <= allowed:
            return sample, thought
        cut = sampled[allowed]
        kept = Thought([i for i in thought.positions if i < cut], True)
        return _first(sample, cut - len(turn.ids)), kept

    async def _draw(self, trace: Trace, max_tokens: int, stop_token_ids: Sequence[int]) -> Sample:
        started = time.monotonic()
        try:
            return await self._generate(trace, max_tokens, stop_token_ids)
        except (EngineDeadError, InfraFailureError):
            raise
        except Exception as error:
            raise InfraFailureError(f"engine: {type(error).__name__}: {error}", "engine") from error
        finally:
            trace.model_s += time.monotonic() - started

    async def _generate(self, trace: Trace, max_tokens: int, stop_token_ids: Sequence[int]) -> Sample:
        """Sample on; at the deadline, once it is cut, or where it is interrupted, the request is aborted and what it
        has sampled is kept (finish "abort")."""
        ticket = self._ticket
        if self._interrupt is not None and self._interrupt.done() and time.monotonic() < self.deadline:
            self._interrupted = True
            return Sample(np.zeros(0, np.int32), np.zeros(0, np.float32), (), "abort")
        request_id = f"{ticket.ticket_id}.{ticket.attempt}.{trace.num_turns}"
        if self._num_requests:
            request_id += f".{self._num_requests}"
        self._num_requests += 1
        request = asyncio.ensure_future(
            self._engine.generate(trace.ids, ticket.sampling, max_tokens, stop_token_ids, request_id)
        )
        cutting = [asyncio.ensure_future(self._cut_now.wait())] if self._cut_now else []
        try:
            ended: set[asyncio.Future[Any]] = {request, *cutting}
            if self._interrupt is not None:
                ended.add(self._interrupt)
            left_s = max(0.0, self.deadline - time.monotonic())
            timeout = left_s if left_s < float("inf") else None
            await asyncio.wait(ended, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            aborted = not request.done()
            in_time = time.monotonic() < self.deadline
            self._interrupted = in_time and self._interrupt is not None and self._interrupt.done()
            while not request.done():
                # Repeated, because an engine ignores the id of a request that has not reached it yet.
                await self._engine.abort(request_id)
                await asyncio.wait({request}, timeout=ABORT_RETRY_S)
        finally:
            request.cancel()
            for each in cutting:
                each.cancel()
        sample = request.result()
        if sample.finish == "abort" and not aborted:
            raise InfraFailureError(f"the engine aborted request {request_id}", "engine")
        return sample


def _spent(turn: Turn, thought: Thought) -> int:
    """Thinking tokens of the turn that count: those that were sampled."""
    return sum(turn.mask[i] for i in thought.positions)


def _first(sample: Sample, num_tokens: int) -> Sample:
    """The first tokens of a sample, as if the engine had been told to stop there; the turn goes on."""
    runs, left = list[VersionRun](), num_tokens
    for run in sample.version_runs:
        if left > 0:
            runs.append(run._replace(num_tokens=min(run.num_tokens, left)))
        left -= run.num_tokens
    return Sample(sample.token_ids_N[:num_tokens], sample.logprobs_N[:num_tokens], tuple(runs), "stop")
