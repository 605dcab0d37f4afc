"""One ticket -> one trajectory. Owns the order of an episode and the rules of its outcome; no state between calls.

Outcomes: an episode that ends by itself is `completed`; out of time, tokens or turns it is `timeout`,
`truncated_tokens` or `truncated_turns` and graded as it stands; an environment that breaks is `env_failure`. What is
the infrastructure's fault (sandbox, engine) raises instead, so that the ticket is retried: it never becomes a reward.

Out of time is the episode at its ticket's deadline, or with a turn that takes longer than a turn may, sampling and
tools together. A tool call that does is no end: its environment answers it with an error, and the episode goes on.
How a turn is sampled is the sampler's, and what an interrupted episode is handover.py's. Never leases, sends or adopts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from actors import metrics
from actors.engine import Engine, EngineDeadError
from actors.handover import SNAPSHOT_LIMIT_S, EpisodeInterruptedError, HandoverError, make_partial, take_up
from actors.record import Record
from actors.renderer import Renderer
from actors.sampler import InfraFailureError as InfraFailureError
from actors.sampler import Sampler, Turn
from broker.process.thinking_settings import ThinkingSection
from broker.protocol.partials import Partial
from broker.protocol.trajectory import MAX_SEGMENTS, Mode, Outcome, Ticket, Trajectory, TrajectoryHead
from envs.interface import (
    Action,
    Environment,
    Episode,
    Message,
    Observation,
    ReferencePolicy,
    Reward,
    SandboxError,
    SelfDrivenEpisode,
    Task,
)
from envs.timeouts import OutOfTimeError, within

if TYPE_CHECKING:
    from actors.gateway.server import Gateway

logger = logging.getLogger(__name__)

GRADE_LIMIT_S = 60.0
CLOSE_LIMIT_S = 30.0
NO_BUDGETS = ThinkingSection()

T = TypeVar("T")


async def run_episode(
    ticket: Ticket,
    environment: Environment,
    engine: Engine,
    renderer: Renderer,
    *,
    actor_id: str,
    max_model_len: int,
    thinking: ThinkingSection = NO_BUDGETS,
    turn_timeout_s: float | None = None,
    gateway: Gateway | None = None,
    begun: Partial | None = None,
    interrupt: asyncio.Future[None] | None = None,
) -> Trajectory:
    """Run the ticket's episode to its end, within `ticket.deadline_s` seconds plus the time that grading takes.

    max_model_len: tokens the engine takes at most, prompt and answer together. thinking: the run's rules for budgets.
    turn_timeout_s: seconds one turn may take, None for as long as the episode. gateway: where episodes that drive
    themselves reach the policy; they are its to run. begun: what another actor has begun of it, to go on with.
    interrupt: once it is done, an episode whose environment has snapshots is left where it is. Raises
    EpisodeInterruptedError with what it is then, HandoverError where that cannot be said; InfraFailureError, and
    EngineDeadError where no further episode can run either; cancelling it ends the request and closes the sandbox.
    """
    if environment.self_driven:
        if gateway is None:
            raise InfraFailureError(f"environment {environment.name!r} needs the gateway, which this actor lacks")
        return await gateway.run_episode(ticket, environment, actor_id)
    started = time.monotonic()
    deadline = started + ticket.deadline_s
    if not environment.snapshots or ticket.mode is Mode.REFERENCE:  # a reference policy has a state of its own
        begun = interrupt = None
    sampler = Sampler(ticket, engine, renderer, thinking, max_model_len, deadline, interrupt=interrupt)
    rollout = _Rollout(ticket, environment, sampler, renderer, max_model_len, deadline, turn_timeout_s, interrupt)
    ended = await rollout.run(begun)
    record, account = rollout.record, sampler.account
    total_s = time.monotonic() - started + rollout.spent_s
    if isinstance(ended, bytes):
        raise EpisodeInterruptedError(make_partial(record, sampler, total_s, ended))
    outcome, reward = ended
    head = TrajectoryHead(
        ticket=ticket,
        kind=rollout.kind,
        outcome=outcome,
        # An environment may count in numpy's scalars, which the wire does not carry.
        reward=float(reward.total),
        reward_components={name: float(value) for name, value in reward.components.items()},
        num_turns=record.num_turns,
        num_tool_calls=record.num_tool_calls,
        num_malformed=record.num_malformed,
        num_thinking_tokens=account.num_thinking_tokens,
        num_overrun_tokens=account.num_overrun_tokens,
        num_forced_stops=account.num_forced_stops,
        timings_s={"total": total_s, "model": record.model_s, "tool": record.tool_s},
        actor_id=actor_id,
        finished_at=time.time(),
    )
    return Trajectory(head, record.segments())


class _InterruptedError(Exception):
    """The episode is to be left where it is."""


class _Rollout:
    """The act of running one ticket; single use."""

    def __init__(
        self,
        ticket: Ticket,
        environment: Environment,
        sampler: Sampler,
        renderer: Renderer,
        max_model_len: int,
        deadline: float,
        turn_timeout_s: float | None,
        interrupt: asyncio.Future[None] | None,
    ) -> None:
        self.record = Record()
        self.spent_s = 0.0  # of the deadline, by another actor
        self.sampler = sampler
        self.kind = ""
        self._ticket = ticket
        self._environment = environment
        self._renderer = renderer
        self._max_model_len = max_model_len
        self._deadline = self._episode_deadline = deadline  # of what is being done; of the episode
        self._turn_timeout_s = turn_timeout_s
        self._reference: ReferencePolicy | None = None
        self._interrupt = interrupt

    async def run(self, begun: Partial | None) -> tuple[Outcome, Reward] | bytes:
        """Start, act, grade, close; always in this order, and close whatever happens. The environment's snapshot where
        it was interrupted. begun: go on with it instead of starting."""
        episode: Episode | None = None
        try:
            if begun is not None:
                episode = await self._restore(begun)
            is_begun = episode is not None
            episode = episode or self._open_episode()
            outcome = await self._act_out(episode, is_begun)
            # Also a partial state has a grade: an episode cut short is a fact about the policy, not a failure.
            reward = await self._timed(episode.grade(), GRADE_LIMIT_S)
            check_reward(reward)
        except (EngineDeadError, InfraFailureError):
            raise
        except SandboxError as error:
            raise InfraFailureError(f"sandbox: {error}", "sandbox") from error
        except _InterruptedError:
            assert episode is not None
            return await self._snapshot(episode)
        except Exception:
            # Whatever else leaves an environment is its own failure, on purpose or not.
            logger.exception("environment failed ticket=%s task=%s", self._ticket.ticket_id, self._ticket.task)
            if not self.record.ids:
                self.record.add_context(self._renderer.open(()), ())  # a trajectory has at least one token
            outcome, reward = Outcome.ENV_FAILURE, Reward(0.0)
        finally:
            if episode is not None:
                await close_episode(episode, self._ticket)
        return outcome, reward

    def _task(self) -> Task:
        ref = self._ticket.task
        task = self._environment.task(ref.split, ref.index)  # type: ignore[arg-type]  # the environment checks it
        self.kind = task.kind
        return task

    async def _restore(self, begun: Partial) -> Episode | None:
        """The episode that another actor has begun; None where it cannot be gone on with, and begins anew."""
        try:
            episode = await self._timed(self._environment.restore(self._task(), begun.snapshot))
        except SandboxError:
            raise
        except Exception as error:  # noqa: BLE001  the bytes are a stranger's, and the environment is its author's
            metrics.handovers.labels("unreadable").inc()
            self.record.tool_s = 0.0
            logger.warning("a partial begins anew ticket=%s reason=%s", self._ticket.ticket_id, error)
            return None
        take_up(begun, self.record, self.sampler)
        self.spent_s = begun.head.total_s
        self._episode_deadline -= self.spent_s
        self._deadline = self._episode_deadline
        metrics.handovers.labels("resumed").inc()
        return episode

    async def _snapshot(self, episode: Episode) -> bytes:
        try:
            return await within(episode.snapshot(), SNAPSHOT_LIMIT_S)
        except Exception as error:
            raise HandoverError(f"no snapshot: {error}") from error

    def _open_episode(self) -> Episode:
        task = self._task()
        if self._ticket.mode is Mode.REFERENCE:
            self._reference = self._environment.demonstrator(task)
        episode = self._environment.episode(task)
        if not isinstance(episode, Episode):
            raise TypeError(
                f"{self._environment.name!r} made a {type(episode).__name__}, and says it is not self_driven"
            )
        return episode

    async def _act_out(self, episode: Episode, is_begun: bool) -> Outcome:
        """Turn after turn until something ends the episode; says what."""
        try:
            if not is_begun:
                first = await self._timed(episode.start())
                self.record.begin(self._opening(first), first)
            while True:
                if self._interrupt is not None and self._interrupt.done():
                    raise _InterruptedError
                outcome, observation = await self._turn(episode)
                if outcome is not None:
                    return outcome
                if self.record.num_turns >= min(self._ticket.sampling.max_turns, self._environment.max_turns):
                    return Outcome.TRUNCATED_TURNS
                if not self._take(observation):
                    return Outcome.TRUNCATED_TOKENS
        except OutOfTimeError:
            if time.monotonic() < self._deadline:
                raise  # the environment's own
            if not self.record.ids:
                self.record.add_context(self._renderer.open(()), ())
            return self._out_of_time()

    def _opening(self, messages: Sequence[Message]) -> list[int]:
        """What a segment begins with; the policy is told its budget in each."""
        told = self.sampler.thinking.told(messages, self._ticket.thinking_budget)
        return self._renderer.open(told, self._environment.tools)

    def _out_of_time(self) -> Outcome:
        self._count_timeouts("episode" if time.monotonic() >= self._episode_deadline else "turn")
        return Outcome.TIMEOUT

    def _count_timeouts(self, what: str, num: int = 1) -> None:
        metrics.timeouts.labels(self._ticket.task.env, self._ticket.mode.value, what).inc(num)

    def _take(self, observation: Observation) -> bool:
        """Append what answers a turn, or begin the segment that follows an edit of the history.

        False where no turn would fit after it, or there are as many segments as a trajectory may have: then nothing is
        taken, and the tokens so far stand as they are.
        """
        record, messages = self.record, observation.messages
        if record.num_sampled >= self._ticket.sampling.max_episode_tokens:
            return False
        if observation.history is None:
            added = self._renderer.observe(messages)
            if len(record.ids) + len(added) >= self._max_model_len:
                return False
            record.add_context(added, messages)
            return True
        messages = (*observation.history, *messages)
        opening = self._opening(messages)
        if len(opening) >= self._max_model_len or len(record.ended) + 1 >= MAX_SEGMENTS:
            return False
        record.begin(opening, messages)
        return True

    async def _turn(self, episode: Episode) -> tuple[Outcome | None, Observation]:
        """One generation and what answers it; the outcome if the episode ends with it."""
        record, sampler = self.record, self.sampler
        if self._turn_timeout_s is not None:
            self._deadline = min(self._episode_deadline, time.monotonic() + self._turn_timeout_s)
        sampler.deadline = self._deadline
        turn = await sampler.turn(record, self._written())
        if turn is None or turn.finish == "length":
            return Outcome.TRUNCATED_TOKENS, Observation()
        if turn.finish == "abort":
            if sampler.unfinished is not None:
                raise _InterruptedError
            return self._out_of_time(), Observation()
        text = self._renderer.text(turn.ids)
        record.messages.append(Message("assistant", text))
        record.num_turns += 1
        action = self._parse(turn, text)
        if action.malformed is not None:
            record.num_malformed += 1
            return None, Observation((Message("tool", f"error: {action.malformed}"),))
        record.num_tool_calls += len(action.tool_calls)
        observation = await self._timed(episode.step(action))
        self._count_timeouts("tool", observation.num_timeouts)
        return (Outcome.COMPLETED if observation.done else None), observation

    def _parse(self, turn: Turn, text: str) -> Action:
        thinking = self.sampler.thinking
        if thinking.find(turn.ids, turn.began_open).is_open:
            return Action("", malformed=f"the thinking was not ended with {thinking.settings.tags[1]}")
        return self._renderer.parse(thinking.answer(text, turn.began_open), self._environment.tools)

    def _written(self) -> str | None:
        """The next turn's text where the environment's reference policy acts."""
        if self._reference is None:
            return None
        return self._renderer.write(self._reference.act(tuple(self.record.messages)), self._environment.tools)

    async def _timed(self, act: Awaitable[T], limit_s: float | None = None) -> T:
        """Await the environment, up to the deadline or `limit_s`; its seconds count as the tool's."""
        started = time.monotonic()
        left_s = max(0.0, self._deadline - started) if limit_s is None else limit_s
        try:
            return await within(act, left_s)
        finally:
            self.record.tool_s += time.monotonic() - started


def check_reward(reward: Reward) -> None:
    """Raise ValueError for a reward that is no finite number."""
    if not all(np.isfinite(value) for value in (reward.total, *reward.components.values())):
        raise ValueError(f"the environment returned the reward {reward}; all of it must be finite")


async def close_episode(episode: Episode | SelfDrivenEpisode, ticket: Ticket) -> None:
    """Close the episode, also while this task is being cancelled; a failure to close does not change its result."""
    try:
        await asyncio.shield(within(episode.close(), CLOSE_LIMIT_S))
    except Exception:
        logger.exception("episode could not be closed ticket=%s", ticket.ticket_id)
