"""One ticket -> one trajectory. Owns the order of an episode and the rules of its outcome; no state between calls.

Outcomes: an episode that ends by itself is `completed`; out of time, tokens or turns it is `timeout`,
`truncated_tokens` or `truncated_turns` and graded as it stands; an environment that breaks is `env_failure`. What is
the infrastructure's fault (sandbox, engine) raises instead, so that the ticket is retried: it never becomes a reward.
How a turn is sampled is the sampler's. Never leases, sends or adopts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from actors.engine import Engine, EngineDeadError, Sample
from actors.renderer import Renderer
from actors.sampler import InfraFailureError as InfraFailureError
from actors.sampler import Sampler
from actors.tool_format import format_action, parse_action
from broker.process.thinking_settings import ThinkingSection
from broker.protocol.trajectory import Mode, Outcome, Segment, Ticket, Trajectory, TrajectoryHead, VersionRun
from envs.interface import (
    Environment,
    Episode,
    Message,
    Observation,
    ReferencePolicy,
    Reward,
    SandboxError,
    Task,
)

logger = logging.getLogger(__name__)

GRADE_LIMIT_S = 60.0
CLOSE_LIMIT_S = 30.0
NO_BUDGETS = ThinkingSection()

T = TypeVar("T")


@dataclass(slots=True)
class _Record:
    """What an episode has produced so far: one growing token trace and its conversation."""

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    runs: list[VersionRun] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    num_turns: int = 0
    num_tool_calls: int = 0
    num_malformed: int = 0
    model_s: float = 0.0
    tool_s: float = 0.0

    @property
    def num_sampled(self) -> int:
        return sum(run.num_tokens for run in self.runs)

    def add_context(self, ids: Sequence[int], messages: Sequence[Message]) -> None:
        self.ids += ids
        self.mask += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.messages += messages

    def add_sample(self, sample: Sample) -> None:
        ids = sample.token_ids_N.tolist()
        self.ids += ids
        self.mask += [True] * len(ids)
        self.logprobs += sample.logprobs_N.tolist()
        for run in sample.version_runs:
            if self.runs and self.runs[-1][:2] == run[:2]:
                run = run._replace(num_tokens=run.num_tokens + self.runs.pop().num_tokens)
            self.runs.append(run)

    def segment(self) -> Segment:
        return Segment(
            np.asarray(self.ids, np.int32),
            np.asarray(self.mask, np.bool_),
            np.asarray(self.logprobs, np.float32),
            tuple(self.runs),
        )


async def run_episode(
    ticket: Ticket,
    environment: Environment,
    engine: Engine,
    renderer: Renderer,
    *,
    actor_id: str,
    max_model_len: int,
    thinking: ThinkingSection = NO_BUDGETS,
) -> Trajectory:
    """Run the ticket's episode to its end, within `ticket.deadline_s` seconds plus the time that grading takes.

    max_model_len: tokens the engine takes at most, prompt and answer together. thinking: the run's rules for budgets.
    Raises InfraFailureError, and EngineDeadError where no further episode can run either; cancelling it ends the
    request and closes the sandbox.
    """
    started = time.monotonic()
    sampler = Sampler(ticket, engine, renderer, thinking, max_model_len, started + ticket.deadline_s)
    rollout = _Rollout(ticket, environment, sampler, renderer, started + ticket.deadline_s)
    outcome, reward = await rollout.run()
    record, account = rollout.record, sampler.account
    total_s = time.monotonic() - started
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
    return Trajectory(head, (record.segment(),))


class _Rollout:
    """The act of running one ticket; single use."""

    def __init__(
        self,
        ticket: Ticket,
        environment: Environment,
        sampler: Sampler,
        renderer: Renderer,
        deadline: float,
    ) -> None:
        self.record = _Record()
        self.sampler = sampler
        self.kind = ""
        self._ticket = ticket
        self._environment = environment
        self._renderer = renderer
        self._deadline = deadline
        self._reference: ReferencePolicy | None = None

    async def run(self) -> tuple[Outcome, Reward]:
        """Start, act, grade, close; always in this order, and close whatever happens."""
        episode: Episode | None = None
        try:
            episode = self._open_episode()
            outcome = await self._act_out(episode)
            # Also a partial state has a grade: an episode cut short is a fact about the policy, not a failure.
            reward = await self._timed(episode.grade(), GRADE_LIMIT_S)
            _check_reward(reward)
        except (EngineDeadError, InfraFailureError):
            raise
        except SandboxError as error:
            raise InfraFailureError(f"sandbox: {error}") from error
        except Exception:
            # Whatever else leaves an environment is its own failure, on purpose or not.
            logger.exception("environment failed ticket=%s task=%s", self._ticket.ticket_id, self._ticket.task)
            if not self.record.ids:
                self.record.add_context(self._renderer.open(()), ())  # a trajectory has at least one token
            outcome, reward = Outcome.ENV_FAILURE, Reward(0.0)
        finally:
            if episode is not None:
                await _close(episode, self._ticket)
        return outcome, reward

    def _open_episode(self) -> Episode:
        ref = self._ticket.task
        task: Task = self._environment.task(ref.split, ref.index)  # type: ignore[arg-type]  # the environment checks it
        self.kind = task.kind
        if self._ticket.mode is Mode.REFERENCE:
            self._reference = self._environment.demonstrator(task)
        return self._environment.episode(task)

    async def _act_out(self, episode: Episode) -> Outcome:
        """Turn after turn until something ends the episode; says what."""
        try:
            first = await self._timed(episode.start())
            told = self.sampler.thinking.told(first, self._ticket.thinking_budget)
            self.record.add_context(self._renderer.open(told), first)
            while True:
                outcome, observation = await self._turn(episode)
                if outcome is not None:
                    return outcome
                if self.record.num_turns == self._ticket.sampling.max_turns:
                    return Outcome.TRUNCATED_TURNS
                self.record.add_context(self._renderer.observe(observation.messages), observation.messages)
        except TimeoutError:
            if time.monotonic() < self._deadline:
                raise  # the environment's own
            if not self.record.ids:
                self.record.add_context(self._renderer.open(()), ())
            return Outcome.TIMEOUT

    async def _turn(self, episode: Episode) -> tuple[Outcome | None, Observation]:
        """One generation and what answers it; the outcome if the episode ends with it."""
        record, sampler = self.record, self.sampler
        turn = await sampler.turn(record, self._written())
        if turn is None or turn.finish == "length":
            return Outcome.TRUNCATED_TOKENS, Observation()
        if turn.finish == "abort":
            return Outcome.TIMEOUT, Observation()
        text = self._renderer.text(turn.ids)
        record.messages.append(Message("assistant", text))
        record.num_turns += 1
        action = parse_action(sampler.thinking.answer(text, turn.began_open), self._environment.tools)
        if action.malformed is not None:
            record.num_malformed += 1
            return None, Observation((Message("tool", f"error: {action.malformed}"),))
        record.num_tool_calls += len(action.tool_calls)
        observation = await self._timed(episode.step(action))
        return (Outcome.COMPLETED if observation.done else None), observation

    def _written(self) -> str | None:
        """The next turn's text where the environment's reference policy acts."""
        if self._reference is None:
            return None
        return format_action(self._reference.act(tuple(self.record.messages)), self._environment.tools)

    async def _timed(self, act: Awaitable[T], limit_s: float | None = None) -> T:
        """Await the environment, up to the deadline or `limit_s`; its seconds count as the tool's."""
        started = time.monotonic()
        left_s = max(0.0, self._deadline - started) if limit_s is None else limit_s
        try:
            return await asyncio.wait_for(act, left_s)
        finally:
            self.record.tool_s += time.monotonic() - started


def _check_reward(reward: Reward) -> None:
    if not all(np.isfinite(value) for value in (reward.total, *reward.components.values())):
        raise ValueError(f"the environment returned the reward {reward}; all of it must be finite")


async def _close(episode: Episode, ticket: Ticket) -> None:
    """Close the episode, also while this task is being cancelled; a failure to close does not change its result."""
    close: Callable[[], Awaitable[None]] = episode.close
    try:
        await asyncio.shield(asyncio.wait_for(close(), CLOSE_LIMIT_S))
    except Exception:
        logger.exception("episode could not be closed ticket=%s", ticket.ticket_id)
