"""A gateway with a scripted engine, and an environment whose program is a coroutine of the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from openai import AsyncOpenAI

from actors.engine import Sample
from actors.gateway.chat_format import Interpreter
from actors.gateway.server import Gateway
from actors.gateway.session import Session
from actors.renderer import Renderer
from actors.rollout import run_episode
from actors.thinking import Thinking
from broker.process.settings import GatewaySection
from broker.process.thinking_settings import ThinkingSection
from broker.protocol.codec import pack_trajectories
from broker.protocol.trajectory import Segment, Ticket, Trajectory
from envs.interface import (
    Endpoint,
    Environment,
    Message,
    ReferencePolicy,
    Reward,
    SelfDrivenEpisode,
    Split,
    Task,
)
from tests.unit.actors.support import ScriptedEngine, WordReference, make_renderer, make_ticket

RENDERER = make_renderer()
ROOMY = {"max_turn_tokens": 200, "max_episode_tokens": 5000, "max_turns": 50}
Program = Callable[[Endpoint], Awaitable[None]]

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


@dataclass
class Open:
    """A session that is open, and the client of its program."""

    gateway: Gateway
    session: Session
    engine: ScriptedEngine
    endpoint: Endpoint
    client: AsyncOpenAI

    @property
    def texts(self) -> list[str]:
        """The segments so far, with what was sampled in brackets."""
        return [marked(segment) for segment in self.session.segments()]


def marked(segment: Any) -> str:
    text, inside = "", False
    for token, sampled in zip(segment.token_ids_T.tolist(), segment.loss_mask_T.tolist(), strict=True):
        text += ("[" if sampled else "]") * (sampled != inside) + RENDERER.decode([token])
        inside = sampled
    return text + "]" * inside


def interpreter(renderer: Renderer = RENDERER, **thinking: Any) -> Interpreter:
    section = ThinkingSection.model_validate(thinking)
    return Interpreter(renderer.chat_format, Thinking(section, renderer))


def check_record(prompts: Sequence[Sequence[int]], samples: Sequence[Sample], segments: Sequence[Segment]) -> None:
    """What must hold of a record, whatever was called: it has what was sampled, each token once, after its prompt."""
    recorded = [pair for s in segments for pair in _pairs(s.token_ids_T[s.loss_mask_T], s.logprobs_T[s.loss_mask_T])]
    assert sorted(recorded) == sorted(pair for s in samples for pair in _pairs(s.token_ids_N, s.logprobs_N))
    for segment in segments:
        assert sum(run.num_tokens for run in segment.version_runs) == segment.loss_mask_T.sum()
        assert not segment.logprobs_T[~segment.loss_mask_T].any()
    # Every sample stands, masked as sampled, in a segment after exactly the prompt that it was sampled from.
    places = []
    for prompt, sample in zip(prompts, samples, strict=True):
        if sample.token_ids_N.size:
            start, end = len(prompt), len(prompt) + sample.token_ids_N.size
            found = [
                (number, start)
                for number, segment in enumerate(segments)
                if segment.token_ids_T[:end].tolist() == [*prompt, *sample.token_ids_N.tolist()]
                and segment.loss_mask_T[start:end].all()
                and segment.logprobs_T[start:end].tolist() == sample.logprobs_N.tolist()
            ]
            assert found
            places.append(found)
    assert len({place for found in places for place in found}) >= len(places)


def _pairs(ids: Any, logprobs: Any) -> list[tuple[int, float]]:
    return list(zip(ids.tolist(), logprobs.tolist(), strict=True))


@asynccontextmanager
async def listening(
    engine: ScriptedEngine,
    max_model_len: int = 2000,
    thinking: dict[str, Any] | None = None,
    renderer: Renderer = RENDERER,
    **settings: Any,
) -> AsyncIterator[Gateway]:
    section = GatewaySection(**{"tell_tools": False} | settings)
    rules = ThinkingSection.model_validate(thinking or {})
    gateway = Gateway(engine, renderer, section, rules, port=0, max_model_len=max_model_len)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.close()


@asynccontextmanager
async def opened(
    script: Sequence[str | Exception] = (),
    *,
    reference: ReferencePolicy | None = None,
    sampling: dict[str, Any] | None = None,
    max_model_len: int = 2000,
    otherwise: str = "run",
    budget: int | None = None,
    thinking: dict[str, Any] | None = None,
    renderer: Renderer = RENDERER,
    engine: ScriptedEngine | None = None,
    **settings: Any,
) -> AsyncIterator[Open]:
    """One episode's door, without a program. otherwise: gateway.sampling, what becomes of other wishes."""
    engine = engine or ScriptedEngine(renderer, script)
    async with listening(engine, max_model_len, thinking, renderer, sampling=otherwise, **settings) as gateway:
        session = gateway.open(make_ticket(sampling=ROOMY | (sampling or {}), thinking_budget=budget), reference)
        endpoint = gateway.endpoint(session, 0.0)
        async with AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.key, max_retries=0) as client:
            yield Open(gateway, session, engine, endpoint, client)


class ProgramEpisode(SelfDrivenEpisode):
    def __init__(self, environment: ProgramEnvironment, task: Task) -> None:
        self._env = environment
        self.task = task

    async def run(self, endpoint: Endpoint) -> None:
        self._env.endpoints.append(endpoint)
        async with AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.key, max_retries=0) as client:
            await self._env.program(client, endpoint)

    async def grade(self) -> Reward:
        if self._env.on_grade is not None:
            raise self._env.on_grade
        return Reward(self._env.reward, {"right": self._env.reward})

    async def close(self) -> None:
        self._env.closed += 1


@dataclass
class ProgramEnvironment(Environment):
    """Its episodes run a coroutine that gets a client."""

    program: Callable[[AsyncOpenAI, Endpoint], Awaitable[None]]
    reward: float = 1.0
    on_grade: Exception | None = None
    on_task: Exception | None = None
    closed: int = 0
    endpoints: list[Endpoint] = field(default_factory=list)
    name = "programs"
    tools = ()
    self_driven = True

    def task(self, split: Split, index: int) -> Task:
        if self.on_task is not None:
            raise self.on_task
        return Task("programs", split, index, "plain", (Message("user", "Say word 3."),), {"answer": "w3"})

    def episode(self, task: Task) -> ProgramEpisode:
        return ProgramEpisode(self, task)

    def reference(self, task: Task) -> ReferencePolicy:
        return WordReference(task)


async def run(
    environment: ProgramEnvironment,
    script: Sequence[str | Exception],
    ticket: Ticket | None = None,
    engine: ScriptedEngine | None = None,
) -> Trajectory:
    """A ticket's episode through the actor's own way to it."""
    engine = engine or ScriptedEngine(RENDERER, script)
    async with listening(engine) as gateway:
        trajectory = await run_episode(
            ticket or make_ticket(),
            environment,
            engine,
            RENDERER,
            actor_id="a",
            max_model_len=2000,
            gateway=gateway,
        )
    assert environment.closed == len(environment.endpoints)
    pack_trajectories((trajectory,))  # raises unless the wire carries it
    return trajectory
