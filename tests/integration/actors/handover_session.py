"""The scene of a handover: two actors, one after the other, a real broker between them, and a real engine.

Part of `engine_session.py`, whose process plays it. The first actor is told to stop by a real SIGTERM in the middle of
a turn; the weights change; the second one, a client and a loop of its own, goes on. The environment is `memory`: the
model's weights are random, so its turns are noise that calls nothing, and each of them ends a session. How many there
were is the environment's state, which the second actor can only know from the snapshot.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from actors.actor import Actor
from actors.engine import Engine, EngineLoad, Sample
from actors.formats.tagged import Tagged
from actors.renderer import Renderer
from actors.weights import WeightAdopter
from broker.client import ActorClient, LearnerClient
from broker.process.lifecycle import install_stop
from broker.process.settings import ActorSection
from broker.protocol.partials import Partial
from broker.protocol.trajectory import Mode, PolicyVersion, Sampling, Segment, TaskRef, Ticket, Trajectory
from envs.memory.environment import MemoryEnvironment
from tests.integration.broker.conftest import RUN_ID, BrokerProcess

LIMITS = Sampling(temperature=0.8, max_turn_tokens=600, max_episode_tokens=5000, max_turns=40)
KIND = "told"  # of three sessions
TOTALS = ("granted", "handover_kept", "continued", "accepted", "expired")
STOPPED_AT = 2  # turns that have ended


class Brief(Tagged):
    """A format whose turns end at one of many tokens, so that a policy of noise comes to an end soon."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self.stop = (*Tagged.stop, *sorted(set(tokenizer.get_vocab()) - added)[3::20])


class Longwinded:
    """The engine, whose third turn has no end of its own, and in it the process is told to stop."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._num_asked = engine, 0
        self.signalled = asyncio.Event()

    @property
    def policy_version(self) -> PolicyVersion:
        return self._engine.policy_version

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
        priority: int = 0,
    ) -> Sample:
        self._num_asked += 1
        if self._num_asked > STOPPED_AT:
            stop_token_ids = ()
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
        return await self._engine.generate(prompt_ids, sampling, max_tokens, stop_token_ids, request_id, priority)

    async def abort(self, request_id: str) -> None:
        await self._engine.abort(request_id)

    def check(self) -> None:
        self._engine.check()

    def load(self) -> EngineLoad:
        return self._engine.load()


class Adopted:
    """In the place of the weight channel: the scene adopts by itself."""

    async def at_least(self, version: PolicyVersion) -> None:
        pass

    async def run(self) -> None:
        await asyncio.Event().wait()


async def hand_over(engine: Engine, tokenizer: Tokenizer, update: Any) -> dict[str, Any]:
    """Play the scene; `update` changes the weights."""
    renderer = Renderer(tokenizer, chat_format=Brief(tokenizer))
    with tempfile.TemporaryDirectory() as directory:
        broker = BrokerProcess(Path(directory))
        learner = await asyncio.to_thread(broker.learner)
        try:
            await asyncio.to_thread(learner.resume)
            task = TaskRef(env="memory", split="train", index=0)
            ticket = Ticket(
                ticket_id="t", group_id="g", group_size=1, task=task, mode=Mode.TRAIN, sampling=LIMITS, deadline_s=200.0
            )
            await asyncio.to_thread(learner.issue, [ticket])
            stop = install_stop()
            handed_over: list[Partial] = []
            await _work(broker, "first", Longwinded(engine), renderer, stop, handed_over)
            await update()
            ended, received = threading.Event(), asyncio.create_task(_receive(learner))
            received.add_done_callback(lambda _: ended.set())
            await _work(broker, "second", engine, renderer, ended, handed_over)
            return _seen(handed_over, await received, learner, await asyncio.to_thread(learner.status))
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            learner.close()
            broker.kill()


async def _work(
    broker: BrokerProcess, name: str, engine: Any, renderer: Renderer, stop: threading.Event, seen: list[Partial]
) -> None:
    """An actor's life, until `stop`; what it hands over is in `seen`."""
    client = ActorClient(broker.endpoint, RUN_ID, name)
    await client.connect(60)
    send = client.hand_over

    async def watched(ticket_id: str, partial: Partial) -> Any:
        seen.append(partial)
        return await send(ticket_id, partial)

    client.hand_over = watched  # type: ignore[method-assign]
    settings = ActorSection(max_num_seqs=8, max_episodes=8, drain_s=0.2, max_model_len=1024)
    ends = (client.tickets, client.sender, engine, cast(WeightAdopter, Adopted()))
    actor = Actor(name, *ends, renderer, {"memory": MemoryEnvironment(kinds=[KIND])}, settings, max_staleness=8)
    try:
        await actor.run(stop)
    finally:
        await client.close()


async def _receive(learner: LearnerClient) -> list[Any]:
    """The trajectory, and what comes besides, which is nothing."""
    return [await asyncio.to_thread(learner.receive, timeout_s) for timeout_s in (200.0, 0.5)]


def _seen(handed_over: list[Partial], received: list[Any], learner: LearnerClient, status: Any) -> dict[str, Any]:
    (partial,), (trajectory, more) = handed_over, received
    assert isinstance(trajectory, Trajectory)
    head = trajectory.head
    return {
        "partial": {"turns": partial.head.num_turns, "segments": list(map(_dump, partial.segments))},
        "segments": list(map(_dump, trajectory.segments)),
        "head": {"outcome": head.outcome.value, "turns": head.num_turns, "attempt": head.ticket.attempt},
        "reward": dict(head.reward_components),
        "by": head.actor_id,
        "more": more,
        "totals": {name: status.total(name) for name in TOTALS},
    }


def _dump(segment: Segment) -> dict[str, Any]:
    return {
        "ids": segment.token_ids_T.tolist(),
        "mask": segment.loss_mask_T.tolist(),
        "logprobs": segment.logprobs_T.tolist(),
        "runs": [list(run) for run in segment.version_runs],
    }
