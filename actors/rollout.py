"""One ticket -> one trajectory. Owns the order of an episode and the rules of its outcome; no state between calls.

Outcomes: an episode that ends by itself is `completed`; out of time, tokens or turns it is `timeout`,
`truncated_tokens` or `truncated_turns` and graded as it stands; an environment that breaks is `env_failure`. What is
the infrastructure's fault (sandbox, engine) raises instead, so that the ticket is retried: it never becomes a reward.
Never leases, sends or adopts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import numpy as np

from actors.engine import Engine, EngineDeadError, Sample
from actors.record import Record
from actors.renderer import REFERENCE_VERSION, Renderer
from broker.protocol.trajectory import MAX_SEGMENTS, Mode, Outcome, Ticket, Trajectory, TrajectoryHead, VersionRun
from envs.interface import (
    Action,
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
ABORT_RETRY_S = 1.0

T = TypeVar("T")


class InfraFailureError(Exception):
    """The episode could not be run through no fault of policy or environment; its ticket should be retried."""


async def run_episode(
    ticket: Ticket, environment: Environment, engine: Engine, renderer: Renderer, *, actor_id: str, max_model_len: int
) -> Trajectory:
    """Run the ticket's episode to its end, within `ticket.deadline_s` seconds plus the time that grading takes.

    max_model_len: tokens the engine takes at most, prompt and answer together. Raises InfraFailureError, and
    EngineDeadError where no further episode can run either; cancelling it ends the request and closes the sandbox.
    """
    if ticket.thinking_budget is not None:
        raise InfraFailureError(f"ticket {ticket.ticket_id} has a thinking budget, which this actor cannot enforce")
    started = time.monotonic()
    rollout = _Rollout(ticket, environment, engine, renderer, max_model_len, started + ticket.deadline_s)
    outcome, reward = await rollout.run()
    record = rollout.record
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
        timings_s={"total": total_s, "model": record.model_s, "tool": record.tool_s},
        actor_id=actor_id,
        finished_at=time.time(),
    )
    return Trajectory(head, record.segments())


class _Rollout:
    """The act of running one ticket; single use."""

    def __init__(
        self,
        ticket: Ticket,
        environment: Environment,
        engine: Engine,
        renderer: Renderer,
        max_model_len: int,
        deadline: float,
    ) -> None:
        self.record = Record()
        self.kind = ""
        self._ticket = ticket
        self._environment = environment
        self._engine = engine
        self._renderer = renderer
        self._max_model_len = max_model_len
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
            self.record.begin(self._renderer.open(first, self._environment.tools), first)
            while True:
                outcome, observation = await self._turn(episode)
                if outcome is not None:
                    return outcome
                if self.record.num_turns == self._ticket.sampling.max_turns:
                    return Outcome.TRUNCATED_TURNS
                if not self._take(observation):
                    return Outcome.TRUNCATED_TOKENS
        except TimeoutError:
            if time.monotonic() < self._deadline:
                raise  # the environment's own
            if not self.record.ids:
                self.record.add_context(self._renderer.open(()), ())
            return Outcome.TIMEOUT

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
        opening = self._renderer.open(messages, self._environment.tools)
        if len(opening) >= self._max_model_len or len(record.ended) + 1 >= MAX_SEGMENTS:
            return False
        record.begin(opening, messages)
        return True

    async def _turn(self, episode: Episode) -> tuple[Outcome | None, Observation]:
        """One generation and what answers it; the outcome if the episode ends with it."""
        sampling, record = self._ticket.sampling, self.record
        room = min(
            sampling.max_turn_tokens,
            sampling.max_episode_tokens - record.num_sampled,
            self._max_model_len - len(record.ids),
        )
        if room <= 0:
            return Outcome.TRUNCATED_TOKENS, Observation()
        sample = await self._sample(room)
        record.add_sample(sample)
        if sample.finish == "length":
            return Outcome.TRUNCATED_TOKENS, Observation()
        if sample.finish == "abort":
            return Outcome.TIMEOUT, Observation()
        text = self._renderer.text(sample.token_ids_N.tolist())
        record.messages.append(Message("assistant", text))
        record.num_turns += 1
        action = self._renderer.parse(text, self._environment.tools)
        if action.malformed is not None:
            record.num_malformed += 1
            return None, Observation((Message("tool", f"error: {action.malformed}"),))
        record.num_tool_calls += len(action.tool_calls)
        observation = await self._timed(episode.step(action))
        return (Outcome.COMPLETED if observation.done else None), observation

    async def _sample(self, max_tokens: int) -> Sample:
        if self._reference is not None:
            action: Action = self._reference.act(tuple(self.record.messages))
            return self._written(self._renderer.write(action, self._environment.tools), max_tokens)
        started = time.monotonic()
        try:
            return await self._generate(max_tokens)
        except (EngineDeadError, InfraFailureError):
            raise
        except Exception as error:
            raise InfraFailureError(f"engine: {type(error).__name__}: {error}") from error
        finally:
            self.record.model_s += time.monotonic() - started

    def _written(self, text: str, max_tokens: int) -> Sample:
        """A turn of the reference policy, in the shape of a sampled one."""
        ids = self._renderer.turn(text)
        kept = ids[:max_tokens]
        runs = (VersionRun(*REFERENCE_VERSION, len(kept)),)
        finish = "stop" if len(kept) == len(ids) else "length"
        return Sample(np.asarray(kept, np.int32), np.zeros(len(kept), np.float32), runs, finish)  # type: ignore[arg-type]

    async def _generate(self, max_tokens: int) -> Sample:
        """Sample a turn; at the deadline the request is aborted and what it has sampled is kept (finish "abort")."""
        ticket = self._ticket
        request_id = f"{ticket.ticket_id}.{ticket.attempt}.{self.record.num_turns}"
        stop = self._renderer.stop_token_ids
        request = asyncio.ensure_future(
            self._engine.generate(self.record.ids, ticket.sampling, max_tokens, stop, request_id)
        )
        try:
            await asyncio.wait({request}, timeout=max(0.0, self._deadline - time.monotonic()))
            aborted = not request.done()
            while not request.done():
                # Repeated, because an engine ignores the id of a request that has not reached it yet.
                await self._engine.abort(request_id)
                await asyncio.wait({request}, timeout=ABORT_RETRY_S)
        finally:
            request.cancel()
        sample = request.result()
        if sample.finish == "abort" and not aborted:
            raise InfraFailureError(f"the engine aborted request {request_id}")
        return sample

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
