"""One ticket of a self-driven environment -> one trajectory: rollout.py's part for programs.

Owns the order of such an episode and the rules of its outcome, which are rollout.py's: what the infrastructure breaks
raises and is retried, what the environment breaks is `env_failure`, what is cut short is graded as it stands. An
episode in which the policy was never asked says nothing of it, so that is the environment's failure, too. Never
leases, sends or samples.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from actors import metrics
from actors.engine import EngineDeadError
from actors.gateway.session import Session
from actors.rollout import GRADE_LIMIT_S, InfraFailureError, check_reward, close_episode
from broker.protocol.trajectory import Mode, Outcome, Ticket, Trajectory, TrajectoryHead
from envs.interface import (
    Endpoint,
    Environment,
    EnvironmentFailureError,
    ReferencePolicy,
    Reward,
    SandboxError,
    SelfDrivenEpisode,
)

logger = logging.getLogger(__name__)

END_LIMIT_S = 30.0
"""Seconds beyond the deadline in which an episode must have ended its program."""


class Door(Protocol):
    """What an episode needs of the gateway."""

    def open(self, ticket: Ticket, reference: ReferencePolicy | None, max_turns: int | None = None) -> Session:
        """Let the calls of an episode in, with no more turns than this and the ticket's."""
        ...

    def endpoint(self, session: Session, deadline: float) -> Endpoint:
        """Where its program reaches them."""
        ...

    async def shut(self, session: Session) -> None:
        """Let no more in."""
        ...


async def run_self_driven(door: Door, ticket: Ticket, environment: Environment, actor_id: str) -> Trajectory:
    """Run the ticket's program to its end, within `ticket.deadline_s` seconds plus the time for ending and grading.

    Raises InfraFailureError, and EngineDeadError; cancelling it ends the program and its requests.
    """
    started = time.monotonic()
    drive = _Drive(door, ticket, environment, started + ticket.deadline_s)
    outcome, reward = await drive.run()
    total_s = time.monotonic() - started
    session = drive.session
    if session is None:  # the environment has failed before there was one
        await door.shut(session := door.open(ticket, None))
    head = TrajectoryHead(
        ticket=ticket,
        kind=drive.kind,
        outcome=outcome,
        reward=float(reward.total),
        reward_components={name: float(value) for name, value in reward.components.items()},
        num_turns=session.num_turns,
        num_tool_calls=session.num_tool_calls,
        num_malformed=session.num_malformed,
        num_thinking_tokens=session.account.num_thinking_tokens,
        num_overrun_tokens=session.account.num_overrun_tokens,
        num_forced_stops=session.account.num_forced_stops,
        timings_s={"total": total_s, "model": session.model_s, "tool": max(0.0, total_s - session.model_s)},
        actor_id=actor_id,
        finished_at=time.time(),
    )
    segments = session.segments()
    metrics.gateway_segments.labels(ticket.task.env).observe(len(segments))
    return Trajectory(head, segments)


class _Drive:
    """The act of running one ticket; single use."""

    def __init__(self, door: Door, ticket: Ticket, environment: Environment, deadline: float) -> None:
        self.kind = ""
        self._door = door
        self._ticket = ticket
        self._environment = environment
        self._deadline = deadline
        self.session: Session | None = None

    async def run(self) -> tuple[Outcome, Reward]:
        """Start, let it act, grade, close; always in this order, and close whatever happens."""
        episode: SelfDrivenEpisode | None = None
        try:
            episode = self._open_episode()
            outcome = await self._act_out(episode)
            reward = await asyncio.wait_for(episode.grade(), GRADE_LIMIT_S)
            check_reward(reward)
        except (EngineDeadError, InfraFailureError):
            raise
        except SandboxError as error:
            raise InfraFailureError(f"sandbox: {error}", "sandbox") from error
        except Exception:
            # Whatever else leaves an environment is its own failure, on purpose or not.
            logger.exception("environment failed ticket=%s task=%s", self._ticket.ticket_id, self._ticket.task)
            outcome, reward = Outcome.ENV_FAILURE, Reward(0.0)
        finally:
            if self.session is not None:
                await self._door.shut(self.session)
            if episode is not None:
                await close_episode(episode, self._ticket)
        return outcome, reward

    def _open_episode(self) -> SelfDrivenEpisode:
        ref = self._ticket.task
        task = self._environment.task(ref.split, ref.index)  # type: ignore[arg-type]  # the environment checks it
        self.kind = task.kind
        is_reference = self._ticket.mode is Mode.REFERENCE
        demonstrator = self._environment.demonstrator(task) if is_reference else None
        self.session = self._door.open(self._ticket, demonstrator, self._environment.max_turns)
        episode = self._environment.episode(task)
        if not isinstance(episode, SelfDrivenEpisode):
            raise TypeError(f"{self._environment.name!r} made a {type(episode).__name__}, and says it is self_driven")
        return episode

    async def _act_out(self, episode: SelfDrivenEpisode) -> Outcome:
        """Let the program run until something ends it; says what."""
        assert self.session is not None
        session = self.session
        running = asyncio.create_task(episode.run(self._door.endpoint(session, self._deadline)))
        void = asyncio.create_task(session.failed.wait())
        timed_out = False
        try:
            left_s = max(0.0, self._deadline - time.monotonic())
            await asyncio.wait({running, void}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not running.done() and not void.done():
                timed_out = True
                await session.end()  # what is being sampled is cut, and kept, before its program goes
                await asyncio.wait({running, void}, timeout=END_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
            if session.failure is not None:
                raise session.failure
            if not running.done():
                raise EnvironmentFailureError(f"the episode was not over {END_LIMIT_S:g} s after its deadline")
            try:
                running.result()
            except TimeoutError:
                timed_out = True
        finally:
            for task in (running, void):
                task.cancel()
            await asyncio.gather(running, void, return_exceptions=True)
        await self._door.shut(session)
        if session.failure is not None:  # while it was cut
            raise session.failure
        if not session.num_turns and session.outcome is Outcome.COMPLETED:
            raise EnvironmentFailureError("the program has ended without asking the policy anything; see its log")
        return Outcome.TIMEOUT if timed_out else session.outcome
