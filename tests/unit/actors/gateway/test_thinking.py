"""Thinking behind the gateway: what a program sees of it, and that budgets are told, kept, counted and recorded."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI

from actors.gateway.allowance import Allowance
from actors.rollout import run_episode
from broker.process.thinking_settings import ThinkingSection
from broker.protocol.codec import pack_trajectories
from broker.protocol.trajectory import Mode
from envs.interface import Action, Endpoint, ReferencePolicy, Task
from tests.unit.actors.gateway.support import LOOK, ROOMY, Open, ProgramEnvironment, listening, opened
from tests.unit.actors.played import CLOSED, RENDERER, SHORT, STOP, TAGGED
from tests.unit.actors.support import ScriptedEngine, WordReference, make_ticket
from tests.unit.actors.test_sampler_any_policy import RandomEngine

USER: Any = {"role": "user", "content": "Say word 3."}
START = "<|im_start|>user\nSay word 3.<|im_end|>\n<|im_start|>assistant\n"
TELL = SHORT | {"tell": "none"}
each_renderer = pytest.mark.parametrize("renderer", [RENDERER, TAGGED], ids=["text", "tokens"])


def marked(door: Open, renderer: Any) -> list[str]:
    """The segments, with what was sampled in brackets; tokens of one kind decoded together."""
    texts = []
    for segment in door.session.segments():
        cuts = np.flatnonzero(np.diff(segment.loss_mask_T.astype(int))) + 1
        parts = zip(np.split(segment.token_ids_T, cuts), np.split(segment.loss_mask_T, cuts), strict=True)
        texts.append("".join(part(renderer, ids, mask) for ids, mask in parts))
    return texts


def part(renderer: Any, ids: Any, mask: Any) -> str:
    text = renderer.decode(ids.tolist())
    return f"[{text}]" if mask[0] else text


def tokens(renderer: Any, *texts: str) -> int:
    return sum(len(renderer.tag(text)) for text in texts)


async def chat(door: Open, messages: Any = (USER,), **options: Any) -> Any:
    return await door.client.chat.completions.create(model="m", messages=messages, **options)


@each_renderer
async def test_a_thought_is_reasoning_content_and_comes_back_as_it_was_sampled(renderer: Any) -> None:
    script = ["<think>\nlook first\n</think>\n\n<tool>look 3</tool>", "<think>\neasy\n</think>\n\nw3"]
    async with opened(script, renderer=renderer) as door:
        first = await chat(door, tools=[LOOK])
        message = first.choices[0].message
        assert (message.content, message.reasoning_content) == (None, "look first")
        assert first.choices[0].finish_reason == "tool_calls"
        assert first.usage.completion_tokens_details.reasoning_tokens == tokens(renderer, "\nlook first\n", "</think>")
        history = [USER, message.model_dump(), {"role": "tool", "tool_call_id": "x", "content": "w3"}]
        second = await chat(door, history, tools=[LOOK])
        assert (second.choices[0].message.content, second.choices[0].message.reasoning_content) == ("w3", "easy")
        assert marked(door, renderer) == [
            f"{START}[{script[0]}<|im_end|>]\n<|im_start|>tool\nw3<|im_end|>\n<|im_start|>assistant\n"
            f"[{script[1]}<|im_end|>]"
        ]
        assert door.session.account.num_thinking_tokens == tokens(
            renderer, "\nlook first\n", "</think>", "\neasy\n", "</think>"
        )


async def test_a_stream_has_the_thought_before_the_content() -> None:
    async with opened(["<think>\nhm\n</think>\n\nyes", "<think>\nhm\n</think>\n\nyes"]) as door:
        chunks = [chunk async for chunk in await chat(door, stream=True)]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert [getattr(delta, "reasoning_content", None) or delta.content for delta in deltas] == [
            "",
            "hm",
            "yes",
            None,
        ]
        async with door.client.responses.stream(model="m", input="x") as stream:
            seen = [event async for event in stream]
            final = await stream.get_final_response()
        assert [item.type for item in final.output] == ["reasoning", "message"]
        assert [event.delta for event in seen if event.type == "response.reasoning_text.delta"] == ["hm"]
        assert final.output_text == "yes"


async def test_reasoning_items_go_back_as_items_and_by_the_stored_response() -> None:
    script = ["<think>\nhm\n</think>\n\nHm. <tool>look 3</tool>", "<think>\nso\n</think>\n\nw3", "again"]
    tool: Any = {"type": "function", **LOOK["function"]}
    async with opened(script) as door:
        create = door.client.responses.create
        first = await create(model="m", input="Say word 3.", tools=[tool])
        assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
        assert first.usage is not None
        assert first.usage.output_tokens_details.reasoning_tokens == tokens(RENDERER, "\nhm\n", "</think>")
        result = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "w3"}  # type: ignore[union-attr]
        items: Any = [USER, *(item.model_dump() for item in first.output), result]
        second = await create(model="m", input=items, tools=[tool])
        await create(model="m", input=items, tools=[tool], previous_response_id=None)
        assert second.output_text == "w3"
        third = [text.count("[") for text in marked(door, RENDERER)]
        assert third == [2, 1]  # the same question twice: a branch
    async with opened(script) as door:
        first = await door.client.responses.create(model="m", input="Say word 3.", tools=[tool])
        await door.client.responses.create(model="m", input=[result], tools=[tool], previous_response_id=first.id)  # type: ignore[list-item]
        assert [text.count("[") for text in marked(door, RENDERER)] == [2]


@each_renderer
async def test_a_budget_is_told_kept_recorded_and_its_end_not_trained_on(renderer: Any) -> None:
    async with opened(
        ["<think>one two three four</think>so", "w3"], renderer=renderer, budget=4, thinking=SHORT
    ) as door:
        answer = await chat(door)
        message = answer.choices[0].message
        assert message.content == "w3"
        assert message.reasoning_content.endswith(" Stop.")
        (segment,) = door.session.segments()
        told = START.replace("Say word 3.", "Say word 3.\nThink for at most 4 tokens in each turn.")
        text = marked(door, renderer)[0]
        assert text.startswith(f"{told}[<think>")
        assert text.endswith(f"]{STOP}[w3<|im_end|>]")
        account = door.session.account
        assert (account.num_thinking_tokens, account.num_forced_stops, account.num_overrun_tokens) == (4, 1, 0)
        assert answer.usage.completion_tokens == segment.loss_mask_T.sum()
        assert answer.usage.completion_tokens_details.reasoning_tokens == 4
        # Sent back, it goes on in its segment, the forced tokens included.
        door.engine._script.append("yes")
        await chat(door, [USER, message.model_dump(), {"role": "user", "content": "Sure?"}])
        assert len(door.session.segments()) == 1


async def test_a_budget_of_0_begins_the_turn_with_closed_thinking() -> None:
    async with opened(["w3", "yes"], budget=0, thinking=TELL) as door:
        message = (await chat(door)).choices[0].message
        assert message.content == "w3"
        assert "reasoning_content" not in message.model_dump()
        await chat(door, [USER, message.model_dump(), USER])
        assert marked(door, RENDERER) == [f"{START}{CLOSED}[w3<|im_end|>]\n{START}{CLOSED}[yes<|im_end|>]"]


async def test_the_context_may_open_the_thinking() -> None:
    async with opened(["hm</think>w3"], budget=20, thinking=TELL | {"opens": "context"}) as door:
        answer = await chat(door)
        assert (answer.choices[0].message.reasoning_content, answer.choices[0].message.content) == ("hm", "w3")
        assert marked(door, RENDERER) == [f"{START}<think>\n[hm</think>w3<|im_end|>]"]
        assert answer.usage.prompt_tokens == len(door.engine.prompts[0])


async def test_a_turn_that_must_call_does_not_think_where_thinking_is_limited() -> None:
    script = ["look 3</tool>"]
    for budget, opens, header in [(4, "policy", CLOSED), (None, "context", CLOSED), (None, "policy", "")]:
        async with opened(script, budget=budget, thinking=TELL | {"opens": opens}) as door:
            # Opened by the context, it is closed at once.
            answer = await chat(door, tools=[LOOK], tool_choice="required")
            assert answer.choices[0].finish_reason == "tool_calls"
            assert marked(door, RENDERER) == [f"{START}{header}<tool>[look 3</tool><|im_end|>]"]


EFFORTS = [
    (64, None, 64), (64, "none", 0), (64, "minimal", 8), (64, "low", 16), (64, "medium", 32), (64, "high", 64),
    (64, "xhigh", 64), (64, "max", 64), (3, "minimal", 1), (0, "medium", 0), (0, "high", 0),
    (None, "none", 0), (None, "low", 50), (None, "high", None), (None, None, None),
]  # fmt: skip


@pytest.mark.parametrize(("budget", "effort", "told"), EFFORTS)
def test_an_effort_is_a_share_of_the_tickets_budget(budget: int | None, effort: str | None, told: int | None) -> None:
    allowance = Allowance(make_ticket(sampling=ROOMY, thinking_budget=budget), ThinkingSection())
    assert allowance.told(effort) == told
    cap = allowance.cap(effort)
    assert cap is None or budget is None or cap <= budget  # never more than the run allows


async def test_what_a_program_asks_for_is_told_and_kept_and_the_budget_is_its_ceiling() -> None:
    script = ["<think>one two three four</think>so", "w3"]
    async with opened([*script, *script], budget=16, thinking=SHORT) as door:
        await chat(door, reasoning_effort="low")
        assert door.session.account.num_thinking_tokens == 4
        assert "Think for at most 4 tokens" in marked(door, RENDERER)[0]
        await door.client.responses.create(
            model="m", input="Say word 3.", reasoning={"effort": "low", "summary": "auto"}
        )
        assert door.session.account.num_thinking_tokens == 8
        assert door.session.account.num_overrun_tokens == 0
        door.engine._script += ["w3"]
        answer = await door.client.responses.create(model="m", input="x", reasoning={"effort": "none"})
        assert answer.reasoning is not None
        assert answer.reasoning.effort == "none"
        assert "Answer without thinking." in marked(door, RENDERER)[2]


async def test_the_tokens_that_a_program_allows_count_its_thought() -> None:
    async with opened(["<think>one two three four</think>so"], budget=64, thinking=TELL, renderer=TAGGED) as door:
        answer = await chat(door, max_completion_tokens=5)
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.content == ""
        assert answer.usage.completion_tokens == 5
        assert door.session.outcome == "completed"  # it was the program's own wish


async def test_a_soft_budget_may_be_overrun_up_to_its_limit_and_that_is_counted() -> None:
    soft = TELL | {"soft": {"overrun_rate": 0.1, "limit": 2.0}}
    async with opened(["<think>one two three four five six seven</think>so", "w3"], budget=4, thinking=soft) as door:
        await chat(door)
        account = door.session.account
        assert (account.num_thinking_tokens, account.num_overrun_tokens, account.num_forced_stops) == (8, 4, 1)


async def test_calls_share_the_budget_of_an_episode() -> None:
    once = ["<think>one two three</think>so", "w3"]
    async with opened([*once, "w3"], budget=4, thinking=TELL | {"per": "episode"}) as door:
        await chat(door)
        assert door.session.account.num_thinking_tokens == 4
        await chat(door, [{"role": "user", "content": "Other."}])  # spent: it does not think
        assert marked(door, RENDERER)[1].endswith(f"{CLOSED}[w3<|im_end|>]")
        assert door.session.account.num_thinking_tokens == 4


async def test_an_unended_thought_is_no_answer_and_is_counted() -> None:
    async with opened(["<think>and so <tool>look 3</tool>"]) as door:
        answer = await chat(door, tools=[LOOK])
        message = answer.choices[0].message
        assert (message.content, message.tool_calls) == ("", None)
        assert message.reasoning_content == "and so <tool>look 3</tool>"
        assert door.session.num_malformed == 1


async def test_a_stop_text_ends_the_answer_and_not_the_thought() -> None:
    async with opened(["<think>\none\n\nStop here\n</think>\n\nyes\nStop and more", "so"]) as door:
        answer = await chat(door, stop=["Stop"])
        message = answer.choices[0].message
        assert (message.content, message.reasoning_content) == ("yes\n", "one\n\nStop here")
        await chat(door, [USER, message.model_dump(), USER])
        assert marked(door, RENDERER)[-1].endswith("[so<|im_end|>]")


class Thoughtful(ReferencePolicy):
    def __init__(self, task: Task) -> None:
        self._plain = WordReference(task)

    def act(self, messages: Any) -> Action:
        action = self._plain.act(messages)
        return Action(action.text, action.tool_calls, thinking="one two three four five six")


class ThoughtfulPrograms(ProgramEnvironment):
    def reference(self, task: Task) -> ReferencePolicy:
        return Thoughtful(task)


async def agent(client: AsyncOpenAI, endpoint: Endpoint) -> None:
    messages = [USER]
    while True:
        answer = await client.chat.completions.create(model=endpoint.model, messages=messages, tools=[LOOK])
        said = answer.choices[0].message
        messages.append(said.model_dump(exclude_none=True))
        if not said.tool_calls:
            return
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "w3"} for call in said.tool_calls]


async def episode(budget: int | None, script: list[str], thinking: dict[str, Any], **ticket: Any) -> Any:
    engine = ScriptedEngine(RENDERER, script)
    ticket = {"sampling": ROOMY, "thinking_budget": budget} | ticket
    async with listening(engine, thinking=thinking) as gateway:
        trajectory = await run_episode(
            make_ticket(**ticket), ThoughtfulPrograms(agent), engine, RENDERER, actor_id="a", max_model_len=2000,
            gateway=gateway,
        )  # fmt: skip
    pack_trajectories((trajectory,))  # raises unless the wire carries it
    return trajectory


async def test_a_tickets_budget_is_kept_by_its_program_and_in_the_trajectory() -> None:
    script = ["<think>one two three four</think>x", "<tool>look 3</tool>", "<think>hm</think>w3", "w3"]
    trajectory = await episode(4, script, SHORT)
    head = trajectory.head
    assert (head.num_turns, head.num_tool_calls, head.outcome) == (2, 1, "completed")
    assert (head.num_thinking_tokens, head.num_forced_stops, head.num_overrun_tokens) == (8, 2, 0)
    assert len(trajectory.segments) == 1


@pytest.mark.parametrize("budget", [None, 0, 4, 60])
async def test_demonstrations_keep_to_the_budget_as_well(budget: int | None) -> None:
    trajectory = await episode(budget, [], SHORT, mode=Mode.REFERENCE)
    head = trajectory.head
    assert (head.outcome, head.num_turns, head.num_tool_calls) == ("completed", 2, 1)
    assert head.num_forced_stops == (2 if budget == 4 else 0)
    thought = 2 * tokens(RENDERER, "\none two three four five six\n", "</think>")
    assert head.num_thinking_tokens == {None: thought, 0: 0, 4: 8, 60: thought}[budget]
    assert len(trajectory.segments) == 1


@given(
    seed=st.integers(0, 1 << 30),
    budget=st.one_of(st.none(), st.integers(0, 12)),
    per=st.sampled_from(["turn", "episode"]),
    opens=st.sampled_from(["policy", "context"]),
    tagged=st.booleans(),
    efforts=st.lists(st.sampled_from([None, "none", "low", "medium", "high"]), min_size=1, max_size=4),
    num_replies=st.integers(1, 3),
    keeps=st.booleans(),
)
@settings(deadline=None, max_examples=40)
async def test_whatever_the_policy_and_its_program_do_the_budget_holds(
    seed: int,
    budget: int | None,
    per: str,
    opens: str,
    tagged: bool,
    efforts: list[str | None],
    num_replies: int,
    keeps: bool,
) -> None:
    """Several calls at once, each with some replies, and then conversations that go on, with their thoughts or not."""
    renderer = TAGGED if tagged else RENDERER
    engine = RandomEngine(renderer, seed)
    rules = SHORT | {"per": per, "opens": opens}
    limits = {"max_turn_tokens": 30, "max_episode_tokens": 2000, "max_turns": 40}
    async with opened(engine=engine, renderer=renderer, budget=budget, thinking=rules, sampling=limits) as door:
        session, question = door.session, {"role": "user", "content": "Say word 3."}

        async def ask(messages: list[Any], effort: str | None) -> Any:
            options = {} if effort is None else {"reasoning_effort": effort}
            return await chat(door, messages, n=num_replies, **options)

        answers = await asyncio.gather(*(ask([question], effort) for effort in efforts))
        for answer, effort in zip(answers, efforts, strict=True):
            said = answer.choices[-1].message.model_dump()
            said = said if keeps else {key: value for key, value in said.items() if key != "reasoning_content"}
            await ask([question, said, question], effort)
        allowance = Allowance(session.ticket, ThinkingSection.model_validate(rules))
        for answer, effort in zip(answers, efforts, strict=True):
            told = allowance.told(effort)
            assert told is None or answer.usage.completion_tokens_details.reasoning_tokens <= told * num_replies
        account = session.account
        assert account.num_overrun_tokens == 0
        if budget is not None and per == "episode":
            assert account.num_thinking_tokens <= budget
        # Every masked token was sampled after what stands before it, and none is there twice.
        prompts = list(zip(engine.prompts, engine.sent, strict=True))
        num_trained = 0
        for segment in session.segments():
            ids, mask = segment.token_ids_T.tolist(), segment.loss_mask_T
            assert sum(run.num_tokens for run in segment.version_runs) == mask.sum()
            assert not segment.logprobs_T[~mask].any()
            num_trained += int(mask.sum())
            at = 0
            while at < len(ids):
                if not mask[at]:
                    at += 1
                    continue
                sent = [s for p, s in prompts if p == ids[:at] and s[0] == ids[at]]
                assert sent
                length = max(same_start(s, ids[at:]) for s in sent)
                assert mask[at : at + length].all()
                at += length
        assert num_trained <= sum(len(sent) for sent in engine.sent)
        assert session.num_turns == 2 * num_replies * len(efforts)


def same_start(sent: list[int], ids: list[int]) -> int:
    """How many tokens they have in common."""
    return next((i for i, (a, b) in enumerate(zip(sent, ids, strict=False)) if a != b), min(len(sent), len(ids)))


async def test_thinking_that_cannot_be_had_is_refused_by_name() -> None:
    async with opened(budget=4) as door:
        with pytest.raises(openai.BadRequestError) as caught:
            await chat(door, extra_body={"reasoning_effort": 3})
        assert caught.value.param == "reasoning_effort"
        assert "one of none, minimal, low, medium, high, xhigh, max" in str(caught.value)
        bad: Any = {"role": "assistant", "content": "x", "reasoning_content": 5}
        with pytest.raises(openai.BadRequestError) as caught:
            await chat(door, [USER, bad])
        assert caught.value.param == "messages[1].reasoning_content"


async def test_calls_in_parallel_wait_for_what_others_may_still_think() -> None:
    ticket = make_ticket(sampling=ROOMY, thinking_budget=10)
    allowance = Allowance(ticket, ThinkingSection(per="episode"))
    async with allowance.reserve(3, None, 8) as shared:
        assert shared == 3  # three replies at once, of which each could think 8
    order: list[object] = []

    async def second() -> None:
        async with allowance.reserve(1, None, 8) as most:
            order.append(most)

    async with allowance.reserve(1, None, 8) as most:
        waiting = asyncio.create_task(second())
        for _ in range(5):
            await asyncio.sleep(0)
        order.append(("first", most))
        allowance.spend(3, 0)
    await waiting
    assert order == [("first", 8), 7]
    async with allowance.reserve(1, 0, 8) as most:
        assert most == 0
