"""Look a word up, then answer with it: worked at by agents in `agents/`, answered by a reference policy: no model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from actors.gateway.server import Gateway
from actors.renderer import Renderer
from broker.process.settings import GatewaySection
from broker.protocol.codec import pack_trajectories
from broker.protocol.trajectory import Mode, Sampling, Segment, TaskRef, Ticket, Trajectory
from envs.interface import (
    Action,
    Environment,
    EnvironmentFailureError,
    Message,
    ReferencePolicy,
    Reward,
    Split,
    Task,
    ToolCall,
)
from envs.program import Program, ProgramEnvironment, ProgramResult
from tests.unit.actors.support import make_tokenizer

AGENTS = Path(__file__).with_name("agents")


class Turns(ReferencePolicy):
    """Says its turns one after the other, whatever the program shows."""

    def __init__(self, turns: Sequence[Action]) -> None:
        self._turns = turns

    def act(self, messages: Sequence[Message]) -> Action:
        return self._turns[sum(message.role == "assistant" for message in messages)]


class WordProgram(ProgramEnvironment):
    """An agent of `agents/`, run by this command."""

    name = "words"

    def __init__(self, agent: str, *command: str, turns: Sequence[Action] = (), **options: Any) -> None:
        variables = options.pop("variables", {})
        super().__init__(timeout_s=120, **options)
        self._agent, self._command, self._variables = agent, command, variables
        self._turns = turns or (Action("", (ToolCall("look", {"word": "3"}),)), Action("w3"))

    def task(self, split: Split, index: int) -> Task:
        return Task(self.name, split, index, "plain", (Message("user", "Say word 3."),), {"answer": "w3"})

    def program(self, task: Task) -> Program:
        files = {self._agent: (AGENTS / self._agent).read_bytes()}
        return Program((*self._command, self._agent), task.prompt[0].content, files=files, variables=self._variables)

    async def verify(self, task: Task, result: ProgramResult, reports: Sequence[Reward]) -> Reward:
        if result.exit_code != 0:
            raise EnvironmentFailureError(result.stderr.decode())
        return Reward(float(result.text == task.secret["answer"]))

    def reference(self, task: Task) -> ReferencePolicy:
        return Turns(self._turns)


class PlainProgram(WordProgram):
    """Asks one question; to be named in a run's settings."""

    name = "tests.integration.gateway.words:PlainProgram"

    def __init__(self) -> None:
        super().__init__("plain.py", "python3", turns=[Action("w3")])


@asynccontextmanager
async def gateway(renderer: Renderer) -> AsyncIterator[Gateway]:
    """A real one on a free port, whose episodes must be reference episodes."""
    made = Gateway(None, renderer, GatewaySection(), port=0, max_model_len=8000)  # type: ignore[arg-type]
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def reference_episode(
    environment: Environment, renderer: Renderer | None = None, budget: int | None = None
) -> tuple[Trajectory, list[str]]:
    """The trajectory of a reference episode, and its segments as texts with what was said in brackets."""
    renderer = renderer or Renderer(make_tokenizer())
    ticket = Ticket(
        ticket_id="t",
        group_id="g",
        group_size=1,
        task=TaskRef(env="words", split="train", index=3),
        mode=Mode.REFERENCE,
        sampling=Sampling(max_turn_tokens=200, max_episode_tokens=1000, max_turns=8),
        deadline_s=120,
        thinking_budget=budget,
    )
    async with gateway(renderer) as door:
        trajectory = await door.run_episode(ticket, environment, "actor")
    pack_trajectories((trajectory,))  # raises unless the wire carries it
    return trajectory, [marked(segment, renderer) for segment in trajectory.segments]


def marked(segment: Segment, renderer: Renderer) -> str:
    """A segment's text, with what the policy said in brackets."""
    text, inside = "", False
    for token, said in zip(segment.token_ids_T.tolist(), segment.loss_mask_T.tolist(), strict=True):
        text += ("[" if said else "]") * (said != inside) + renderer.decode([token])
        inside = said
    return text + "]" * inside
