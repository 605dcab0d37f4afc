"""What a program does with a real engine behind the gateway; played by the engine sessions of tests/integration/actors.

A conversation that grows over a weight update in flight, branches from it, a sub-agent beside it, a client that hangs
up. The model is a tiny random one, so its replies are noise, cut at their limit; what counts is that every sampled
token stands in one segment, with the log-prob that a forward pass of the segment gives it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from openai import AsyncOpenAI

from actors.engine import Engine
from actors.gateway.server import Gateway
from actors.gateway.session import Session
from actors.renderer import Renderer
from actors.thinking import Thinking
from broker.process.settings import GatewaySection
from broker.process.thinking_settings import ThinkingSection
from broker.protocol.trajectory import Mode, Sampling, TaskRef, Ticket

LONG = 400  # tokens; what is to happen meanwhile happens long before they are sampled
SAMPLING = Sampling(temperature=0.8, max_turn_tokens=LONG, max_episode_tokens=3000, max_turns=20)
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}


def ask(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ticket_of(name: str, sampling: Sampling = SAMPLING, budget: int | None = None) -> Ticket:
    return Ticket(
        ticket_id=name,
        group_id="g",
        group_size=1,
        task=TaskRef(env="words", split="train", index=0),
        mode=Mode.TRAIN,
        sampling=sampling,
        thinking_budget=budget,
    )


def recorded(session: Session) -> list[dict[str, Any]]:
    return [
        {
            "ids": segment.token_ids_T.tolist(),
            "mask": segment.loss_mask_T.tolist(),
            "logprobs": segment.logprobs_T.tolist(),
            "runs": [list(run) for run in segment.version_runs],
        }
        for segment in session.segments()
    ]


async def converse(
    engine: Engine, renderer: Renderer, update: Callable[[], Awaitable[object]], unfinished: Callable[[], int]
) -> dict[str, Any]:
    """Play the scene; `update` changes the weights, `unfinished` counts the engine's requests."""
    gateway = Gateway(engine, renderer, GatewaySection(), port=0, max_model_len=1024)
    await gateway.start()
    session = gateway.open(ticket_of("program"), None)
    endpoint = gateway.endpoint(session, 0.0)
    try:
        async with AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.key, max_retries=0) as client:
            seen = await _program(client, update)
            hanging = asyncio.create_task(_say(client, [ask("What is the bill?")], LONG))
            while not unfinished():
                await asyncio.sleep(0.01)
            await _say(client, [ask("total")], 8)  # the other has sampled something by then, too
            hanging.cancel()
            await asyncio.gather(hanging, return_exceptions=True)
        await gateway.shut(session)
        seen["unfinished"] = unfinished()
        seen["failure"] = repr(session.failure)
        seen["segments"] = recorded(session)
        return seen
    finally:
        await gateway.close()


async def think(engine: Engine, renderer: Renderer, budget: int) -> dict[str, Any]:
    """Calls of programs whose tickets have a thinking budget, in a format with JSON calls and tools of its own telling.

    Thinking is opened by the context and closed by a letter, which a model of random weights writes at times, or by a
    word, which it never writes; so both ends are seen.
    """
    seen: dict[str, Any] = {"episodes": []}
    for closing in ("e", "</think>"):
        settings = ThinkingSection(tags=("#", closing), opens="context", stop_phrase=" Stop.")
        gateway = Gateway(engine, renderer, GatewaySection(), settings, port=0, max_model_len=1024)
        await gateway.start()
        sampling = Sampling(temperature=SAMPLING.temperature, max_turn_tokens=60, max_episode_tokens=2000, max_turns=20)
        session = gateway.open(ticket_of(f"think{closing}", sampling, budget), None)
        endpoint = gateway.endpoint(session, 0.0)
        try:
            async with AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.key, max_retries=0) as client:
                usages = await _thinker(client)
            await gateway.shut(session)
        finally:
            await gateway.close()
        account = session.account
        thinking = Thinking(settings, renderer)
        seen["episodes"].append(
            {
                "segments": recorded(session),
                "usages": usages,
                "account": [account.num_thinking_tokens, account.num_overrun_tokens, account.num_forced_stops],
                "stop_ids": thinking.stop_ids,
                "open_token_ids": list(thinking.open_token_ids),
                "failure": repr(session.failure),
                "num_turns": session.num_turns,
            }
        )
    return seen


async def _thinker(client: AsyncOpenAI) -> list[list[int]]:
    """Conversations that keep their thoughts and one that drops them, replies side by side, an effort of `low`; tokens
    sampled and those of them while thinking, of each call."""
    usages: list[list[int]] = []

    async def say(messages: list[Any], **options: Any) -> dict[str, Any]:
        answer: Any = await client.chat.completions.create(
            model="m",
            messages=messages,
            tools=[TOOL],
            **options,
        )
        details = answer.usage.completion_tokens_details
        usages.append([answer.usage.completion_tokens, details.reasoning_tokens, len(answer.choices)])
        said: dict[str, Any] = answer.choices[-1].message.model_dump(exclude_none=True)
        return said

    messages = [ask("Eva buys 17 plates.")]
    messages.append(await say(messages))
    messages += [ask("What is the bill?"), {"role": "tool", "tool_call_id": "x", "content": "72"}]
    messages.append(await say(messages, n=2))
    messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
    await say([*messages, ask("Sure?")])
    await say([ask("coins")], reasoning_effort="low")
    await say([ask("coins")], reasoning_effort="none", max_completion_tokens=7)
    return usages


async def _say(client: AsyncOpenAI, messages: list[Any], max_tokens: int, **options: Any) -> Any:
    return await client.chat.completions.create(
        model="m", messages=messages, tools=[TOOL], max_tokens=max_tokens, logprobs=True, **options
    )


async def _program(client: AsyncOpenAI, update: Callable[[], Awaitable[object]]) -> dict[str, Any]:
    told: list[float] = []  # the log-probs that the program was told, of all replies

    def heard(answer: Any) -> list[Any]:
        told.extend(entry.logprob for choice in answer.choices for entry in choice.logprobs.content)
        return [choice.message.model_dump(exclude_none=True) for choice in answer.choices]

    messages = [ask("Eva buys 17 plates.")]
    messages += heard(await _say(client, messages, 24))
    messages.append(ask("What is the bill?"))
    flying = asyncio.create_task(_say(client, messages, LONG))  # it goes on under the new weights
    heard(await _say(client, [ask("total")], 16))  # the long one has surely begun when this has been answered
    await update()
    messages += heard(await flying)
    messages.append(ask("coins"))
    branches = heard(await _say(client, messages, 16, n=3))
    heard(await _say(client, [*messages, branches[1], ask("change")], 16))
    stream = await client.responses.create(model="m", input="price plate", max_output_tokens=12, stream=True)
    last = [event async for event in stream][-1]
    return {"told": told, "responses_status": last.response.status, "responses_text": last.response.output_text}
