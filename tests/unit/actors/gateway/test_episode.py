"""A ticket of a self-driven environment becomes a trajectory: outcomes, limits, reference episodes."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI

from actors.engine import EngineDeadError
from actors.gateway.server import Gateway
from actors.rollout import InfraFailureError, run_episode
from broker.process.lifecycle import ErgonError
from broker.process.settings import GatewaySection
from broker.protocol.trajectory import Mode, Outcome, VersionRun
from envs.interface import Endpoint, EnvironmentFailureError, SandboxError
from tests.unit.actors.gateway.support import LOOK, RENDERER, ProgramEnvironment, listening, marked, run
from tests.unit.actors.support import ScriptedEngine, make_ticket

USER: Any = {"role": "user", "content": "Say word 3."}
SCRIPT = ["<tool>look 3</tool>", "w3"]
WHOLE = (
    "<|im_start|>user\nSay word 3.<|im_end|>\n<|im_start|>assistant\n[<tool>look 3</tool><|im_end|>]\n"
    "<|im_start|>tool\nw3<|im_end|>\n<|im_start|>assistant\n[w3<|im_end|>]"
)


async def agent(client: AsyncOpenAI, endpoint: Endpoint) -> None:
    """Look the word up, then answer."""
    messages = [USER]
    while True:
        answer = await client.chat.completions.create(model=endpoint.model, messages=messages, tools=[LOOK])
        said = answer.choices[0].message
        messages.append(said.model_dump(exclude_none=True))
        if not said.tool_calls:
            return
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "w3"} for call in said.tool_calls]


async def test_a_program_that_ends_is_completed_and_graded() -> None:
    environment = ProgramEnvironment(agent)
    trajectory = await run(environment, SCRIPT)
    head = trajectory.head
    assert (head.outcome, head.reward, head.reward_components, head.kind) == (
        Outcome.COMPLETED, 1.0, {"right": 1.0}, "plain",
    )  # fmt: skip
    assert (head.num_turns, head.num_tool_calls, head.num_malformed) == (2, 1, 0)
    assert head.timings_s.keys() == {"total", "model", "tool"}
    assert [marked(segment) for segment in trajectory.segments] == [WHOLE]
    assert trajectory.segments[0].version_runs[0][:2] == (1, 4)


async def test_reference_episodes_have_the_boundaries_of_sampled_ones() -> None:
    sampled = await run(ProgramEnvironment(agent), SCRIPT)
    trajectory = await run(ProgramEnvironment(agent), [], make_ticket(mode=Mode.REFERENCE))
    (segment,) = trajectory.segments
    assert trajectory.head.outcome is Outcome.COMPLETED
    np.testing.assert_array_equal(segment.token_ids_T, sampled.segments[0].token_ids_T)
    np.testing.assert_array_equal(segment.loss_mask_T, sampled.segments[0].loss_mask_T)
    assert not segment.logprobs_T.any()
    assert segment.version_runs == (VersionRun(0, 0, int(segment.loss_mask_T.sum())),)


async def test_a_conversation_that_the_reference_cannot_answer_is_env_failure() -> None:
    async def no_tools(client: AsyncOpenAI, endpoint: Endpoint) -> None:
        await client.chat.completions.create(model="m", messages=[USER])

    trajectory = await run(ProgramEnvironment(no_tools), [], make_ticket(mode=Mode.REFERENCE))
    assert trajectory.head.outcome is Outcome.ENV_FAILURE


async def test_sub_agents_are_segments_of_one_episode() -> None:
    async def ask(client: AsyncOpenAI, role: str) -> None:
        messages: Any = [{"role": "system", "content": role}, USER]
        for _ in range(2):
            said = (await client.chat.completions.create(model="m", messages=messages)).choices[0].message
            messages += [{"role": "assistant", "content": said.content}, USER]

    async def team(client: AsyncOpenAI, endpoint: Endpoint) -> None:
        await asyncio.gather(*(ask(client, role) for role in ("boss", "clerk", "critic")))

    trajectory = await run(
        ProgramEnvironment(team), [f"word {n}" for n in range(6)], make_ticket(sampling={"max_turns": 6})
    )
    assert len(trajectory.segments) == 3
    assert trajectory.head.num_turns == 6
    assert all(marked(segment).count("[") == 2 for segment in trajectory.segments)
    assert trajectory.head.outcome is Outcome.COMPLETED


async def test_a_turn_that_the_run_cuts_is_truncated_tokens() -> None:
    trajectory = await run(
        ProgramEnvironment(agent), ["w3 and so on and on"], make_ticket(sampling={"max_turn_tokens": 3})
    )
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.TRUNCATED_TOKENS, 1.0)
    assert trajectory.num_sampled == 3


async def test_the_token_budget_of_the_episode_is_kept() -> None:
    turn = len(RENDERER.turn(SCRIPT[0]))
    refusals: list[str] = []

    async def greedy(client: AsyncOpenAI, endpoint: Endpoint) -> None:
        try:
            await agent(client, endpoint)
        except openai.BadRequestError as error:
            refusals.append(str(error.code))

    engine = ScriptedEngine(RENDERER, [SCRIPT[0]] * 3)
    ticket = make_ticket(sampling={"max_episode_tokens": 2 * turn})
    trajectory = await run(ProgramEnvironment(greedy), [], ticket, engine)
    assert trajectory.head.outcome is Outcome.TRUNCATED_TOKENS
    assert (engine.max_tokens, refusals) == ([min(60, 2 * turn), turn], ["max_episode_tokens"])
    assert trajectory.num_sampled == 2 * turn


async def test_parallel_calls_share_the_budget_and_wait_rather_than_being_cut() -> None:
    engine = ScriptedEngine(RENDERER, ["yes"] * 6)

    async def crowd(client: AsyncOpenAI, endpoint: Endpoint) -> None:
        async def one() -> None:
            answer = await client.chat.completions.create(model="m", messages=[USER], max_tokens=20)
            assert answer.choices[0].finish_reason == "stop"

        await asyncio.gather(*(one() for _ in range(6)))

    ticket = make_ticket(sampling={"max_episode_tokens": 6 * len(RENDERER.turn("yes")) + 20, "max_turns": 6})
    trajectory = await run(ProgramEnvironment(crowd), [], ticket, engine)
    assert trajectory.head.outcome is Outcome.COMPLETED
    assert engine.max_tokens == [20] * 6


async def test_too_many_turns_are_refused_and_graded() -> None:
    trajectory = await run(ProgramEnvironment(agent), [SCRIPT[0]] * 3, make_ticket(sampling={"max_turns": 2}))
    assert trajectory.head.outcome is Outcome.ENV_FAILURE  # this program lets the error through
    caught: list[Any] = []

    async def careful(client: AsyncOpenAI, endpoint: Endpoint) -> None:
        try:
            await agent(client, endpoint)
        except openai.BadRequestError as error:
            caught.append(error.code)

    trajectory = await run(ProgramEnvironment(careful), [SCRIPT[0]] * 3, make_ticket(sampling={"max_turns": 2}))
    assert (trajectory.head.outcome, caught) == (Outcome.TRUNCATED_TURNS, ["max_turns"])
    assert trajectory.head.num_turns == 2
    environment = ProgramEnvironment(careful)
    environment.max_turns = 1  # its own bound, below the ticket's
    trajectory = await run(environment, [SCRIPT[0]] * 3, make_ticket(sampling={"max_turns": 2}))
    assert (trajectory.head.outcome, trajectory.head.num_turns) == (Outcome.TRUNCATED_TURNS, 1)


async def test_a_full_context_is_refused_with_openais_code() -> None:
    caught: list[Any] = []

    async def long(client: AsyncOpenAI, endpoint: Endpoint) -> None:
        try:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x " * 3000}])
        except openai.BadRequestError as error:
            caught.append(error.code)

    trajectory = await run(ProgramEnvironment(long), [])
    assert (trajectory.head.outcome, caught) == (Outcome.TRUNCATED_TOKENS, ["context_length_exceeded"])


async def test_at_the_deadline_the_partial_turn_is_kept_and_graded() -> None:
    async def patient(client: AsyncOpenAI, endpoint: Endpoint) -> None:
        try:
            await agent(client, endpoint)
        except openai.AuthenticationError:
            raise TimeoutError from None

    trajectory = await run(ProgramEnvironment(patient), [SCRIPT[0], "<hang>"], make_ticket(deadline_s=1.0))
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.TIMEOUT, 1.0)
    assert trajectory.num_sampled == len(RENDERER.turn(SCRIPT[0])) + 1


async def test_a_limit_of_the_episodes_own_is_a_timeout_too() -> None:
    async def slow(client: AsyncOpenAI, endpoint: Endpoint) -> None:
        await agent(client, endpoint)
        raise TimeoutError

    assert (await run(ProgramEnvironment(slow), list(SCRIPT))).head.outcome is Outcome.TIMEOUT


@pytest.mark.parametrize("error", [EnvironmentFailureError("gone"), KeyError("bug")])
@pytest.mark.parametrize("where", ["task", "program", "grade"])
async def test_a_broken_environment_is_env_failure(where: str, error: Exception) -> None:
    async def breaks(client: AsyncOpenAI, endpoint: Endpoint) -> None:
        await agent(client, endpoint)
        raise error

    environment = ProgramEnvironment(breaks if where == "program" else agent)
    environment.on_task = error if where == "task" else None
    environment.on_grade = error if where == "grade" else None
    trajectory = await run(environment, list(SCRIPT))
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.ENV_FAILURE, 0.0)
    assert trajectory.num_sampled > 0 or where == "task"


async def test_a_program_that_never_asks_is_the_environments_failure() -> None:
    async def silent(client: AsyncOpenAI, endpoint: Endpoint) -> None:
        pass

    assert (await run(ProgramEnvironment(silent), [])).head.outcome is Outcome.ENV_FAILURE


async def test_what_the_infrastructure_breaks_is_no_reward() -> None:
    async def sandboxed(client: AsyncOpenAI, endpoint: Endpoint) -> None:
        raise SandboxError("bwrap died")

    with pytest.raises(InfraFailureError, match="bwrap died"):
        await run(ProgramEnvironment(sandboxed), [])
    with pytest.raises(InfraFailureError, match="odd"):
        await run(ProgramEnvironment(agent), [RuntimeError("odd")])
    with pytest.raises(EngineDeadError, match="gone"):
        await run(ProgramEnvironment(agent), [EngineDeadError("gone")])


async def test_a_program_that_swallows_the_engines_death_gets_no_reward_either() -> None:
    async def stubborn(client: AsyncOpenAI, endpoint: Endpoint) -> None:
        try:
            await agent(client, endpoint)
        except openai.APIError:
            await asyncio.Event().wait()

    with pytest.raises(InfraFailureError, match="odd"):
        await run(ProgramEnvironment(stubborn), [RuntimeError("odd")])


async def test_cancelling_ends_the_requests_and_closes_the_episode() -> None:
    environment, engine = ProgramEnvironment(agent), ScriptedEngine(RENDERER, ["<hang>"])
    task = asyncio.create_task(run(environment, [], None, engine))
    await engine.hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert environment.closed == 1
    assert all(event.is_set() for event in engine._aborts.values())


async def test_an_actor_without_a_gateway_gives_the_ticket_back() -> None:
    with pytest.raises(InfraFailureError, match="needs the gateway"):
        await run_episode(
            make_ticket(),
            ProgramEnvironment(agent),
            ScriptedEngine(RENDERER, []),
            RENDERER,
            actor_id="a",
            max_model_len=9,
        )


async def test_a_port_that_is_taken_and_an_open_address_are_told() -> None:
    engine = ScriptedEngine(RENDERER, [])
    async with listening(engine) as gateway:
        port = int(gateway.url.rpartition(":")[2].removesuffix("/v1"))
        with pytest.raises(ErgonError, match=rf"gateway.port = {port} on 127.0.0.1 cannot be had"):
            await Gateway(engine, RENDERER, GatewaySection(), port=port, max_model_len=9).start()
    with pytest.raises(ErgonError, match="allow_unencrypted"):
        await Gateway(engine, RENDERER, GatewaySection(host="0.0.0.0"), port=0, max_model_len=9).start()
