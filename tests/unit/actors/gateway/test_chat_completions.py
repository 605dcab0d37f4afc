"""POST /v1/chat/completions through the real openai SDK and a real socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.unit.actors.gateway.support import ADD, LOOK, RENDERER, opened

USER: Any = {"role": "user", "content": "Say word 3."}
START = "<|im_start|>user\nSay word 3.<|im_end|>\n<|im_start|>assistant\n"


async def test_a_conversation_with_a_tool_is_one_segment() -> None:
    async with opened(["Hm. <tool>look 3</tool>", "w3"]) as door:
        first = await door.client.chat.completions.create(model="any", messages=[USER], tools=[LOOK])
        choice = first.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Hm.")
        (call,) = choice.message.tool_calls or ()
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"word": "3"})
        assert first.model == "any"
        assert first.system_fingerprint == "ergon-1.4"
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "w3"}]}
        second = await door.client.chat.completions.create(
            model="any", messages=[USER, choice.message.model_dump(), result], tools=[LOOK]
        )
        assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("w3", "stop")
        assert second.usage is not None
        assert second.usage.prompt_tokens == len(door.engine.prompts[1])
        assert second.usage.completion_tokens == len(RENDERER.turn("w3"))
        assert door.texts == [
            f"{START}[Hm. <tool>look 3</tool><|im_end|>]\n<|im_start|>tool\nw3<|im_end|>\n"
            "<|im_start|>assistant\n[w3<|im_end|>]"
        ]
        assert (door.session.num_turns, door.session.num_tool_calls, door.session.num_malformed) == (2, 1, 0)


async def test_several_replies_are_branches_and_any_can_be_gone_on_with() -> None:
    async with opened(["one", "two", "three", "four"]) as door:
        answer = await door.client.chat.completions.create(model="m", messages=[USER], n=3)
        assert [(c.index, c.message.content) for c in answer.choices] == [(0, "one"), (1, "two"), (2, "three")]
        said: Any = answer.choices[1].message.model_dump()
        await door.client.chat.completions.create(model="m", messages=[USER, said, USER])
        assert door.texts == [
            f"{START}[one<|im_end|>]",
            f"{START}[two<|im_end|>]\n{START}[four<|im_end|>]",
            f"{START}[three<|im_end|>]",
        ]


async def test_parallel_calls_are_branches() -> None:
    async with opened(["one", "two", "three"]) as door:
        first = await door.client.chat.completions.create(model="m", messages=[USER])
        said: Any = first.choices[0].message.model_dump(exclude_none=True)
        request = {"model": "m", "messages": [USER, said, {"role": "user", "content": "More."}]}
        await asyncio.gather(*(door.client.chat.completions.create(**request) for _ in range(2)))
        assert [text.count("[") for text in door.texts] == [2, 1]


async def test_a_stream_says_the_same_as_an_answer() -> None:
    async with opened(["Hm. <tool>look 3</tool><tool>look 4</tool>"]) as door:
        stream = await door.client.chat.completions.create(
            model="m", messages=[USER], tools=[LOOK], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        calls = [call for c in chunks if c.choices for call in c.choices[0].delta.tool_calls or ()]
        assert content == "Hm."
        assert [(c.index, c.function and c.function.arguments) for c in calls] == [
            (0, '{"word": "3"}'),
            (1, '{"word": "4"}'),
        ]
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "tool_calls"
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.completion_tokens == len(RENDERER.turn("Hm. <tool>look 3</tool><tool>look 4</tool>"))
        assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_sdks_own_accumulator_understands_the_stream() -> None:
    async with opened(["yes", "no"]) as door:
        async with door.client.chat.completions.stream(model="m", messages=[USER], n=2) as stream:
            final = await stream.get_final_completion()
        assert [choice.message.content for choice in final.choices] == ["yes", "no"]


async def test_log_probs_are_those_of_every_sampled_token() -> None:
    async with opened(["yes"]) as door:
        answer = await door.client.chat.completions.create(model="m", messages=[USER], logprobs=True)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        (segment,) = door.session.segments()
        assert [e.logprob for e in logprobs.content or ()] == segment.logprobs_T[segment.loss_mask_T].tolist()
        assert "".join(e.token for e in logprobs.content or ()) == "yes<|im_end|>"


async def test_max_tokens_cut_a_reply_which_can_be_gone_on_with() -> None:
    async with opened(["one two three", "four"]) as door:
        answer = await door.client.chat.completions.create(model="m", messages=[USER], max_completion_tokens=4)
        assert answer.choices[0].finish_reason == "length"
        said: Any = answer.choices[0].message.model_dump()
        await door.client.chat.completions.create(model="m", messages=[USER, said, USER])
        assert len(door.texts) == 1
        assert door.session.outcome == "completed"  # it was the program's own wish


async def test_a_stop_text_ends_the_reply_and_nothing_beyond_it_is_recorded() -> None:
    async with opened(["Thought: hm\nObservation: made up", "so"]) as door:
        answer = await door.client.chat.completions.create(model="m", messages=[USER], stop=["\nObservation:", "zz"])
        choice = answer.choices[0]
        assert (choice.message.content, choice.finish_reason) == ("Thought: hm", "stop")
        said: Any = choice.message.model_dump()
        seen: Any = {"role": "user", "content": "Observation: real"}
        await door.client.chat.completions.create(model="m", messages=[USER, said, seen])
        assert door.texts == [
            f"{START}[Thought: hm\nObservation:]<|im_end|>\n<|im_start|>user\nObservation: real<|im_end|>\n"
            "<|im_start|>assistant\n[so<|im_end|>]"
        ]


async def test_a_program_that_puts_the_stop_text_back_goes_on_in_the_same_segment() -> None:
    async with opened(["<code>go</code> and more", "so"]) as door:
        create = door.client.chat.completions.create
        answer = await create(model="m", messages=[USER], stop=["</code>"])
        assert answer.choices[0].message.content == "<code>go"
        said: Any = {"role": "assistant", "content": "<code>go</code>"}
        await create(model="m", messages=[USER, said, USER], stop=["</code>"])
        assert door.texts == [f"{START}[<code>go</code>]<|im_end|>\n{START}[so<|im_end|>]"]


async def test_a_call_that_must_be_is_begun_for_the_policy() -> None:
    async with opened(["look 3</tool>", ' {"a": 1}</tool>', "w3"]) as door:
        create = door.client.chat.completions.create
        answer = await create(model="m", messages=[USER], tools=[LOOK], tool_choice="required")
        assert answer.choices[0].finish_reason == "tool_calls"
        named: Any = {"type": "function", "function": {"name": "add"}}
        answer = await create(model="m", messages=[USER], tools=[LOOK, ADD], tool_choice=named)
        (call,) = answer.choices[0].message.tool_calls or ()
        assert call.type == "function"
        assert (call.function.name, call.function.arguments) == ("add", '{"a": 1}')
        assert door.texts == [
            f"{START}<tool>[look 3</tool><|im_end|>]",
            f'{START}<tool>add[ {{"a": 1}}</tool><|im_end|>]',
        ]


async def test_no_call_is_parsed_where_none_is_wanted() -> None:
    async with opened(["<tool>look 3</tool>", "<tool>look 3", "<tool>look 3</tool>"]) as door:
        create = door.client.chat.completions.create
        answer = await create(model="m", messages=[USER], tools=[LOOK], tool_choice="none")
        assert answer.choices[0].message.content == "<tool>look 3</tool>"
        assert not answer.choices[0].message.tool_calls
        answer = await create(model="m", messages=[USER], tools=[LOOK])
        assert (answer.choices[0].message.content, door.session.num_malformed) == ("<tool>look 3", 1)
        answer = await create(model="m", messages=[USER])  # no tools at all
        assert (answer.choices[0].message.content, door.session.num_malformed) == ("<tool>look 3</tool>", 1)


async def test_roles_and_parts_become_the_policys_text() -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x", **_called("look", '{"word": "q"}')}]},
        {"role": "tool", "tool_call_id": "x", "content": "r"},
    ]
    async with opened(["ok"]) as door:
        await door.client.chat.completions.create(model="m", messages=messages, tools=[LOOK])
        assert door.texts == [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
            "<tool>look q</tool><|im_end|>\n<|im_start|>tool\nr<|im_end|>\n<|im_start|>assistant\n[ok<|im_end|>]"
        ]


def _called(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


async def test_tools_are_told_unless_the_run_says_otherwise() -> None:
    async with opened(["ok"], tell_tools=True) as door:
        await door.client.chat.completions.create(model="m", messages=[USER], tools=[LOOK])
        assert door.texts[0].startswith(
            "<|im_start|>system\nTools:\n<tool>look WORD</tool> Look a word up.<|im_end|>\n"
        )


async def test_the_runs_sampling_wins_and_the_answer_says_so() -> None:
    async with opened(["ok", "ok"]) as door:
        raw = await door.client.chat.completions.with_raw_response.create(
            model="m", messages=[USER], temperature=0.2, top_p=1
        )
        assert raw.headers["x-ergon-overridden"] == "temperature"
        raw = await door.client.chat.completions.with_raw_response.create(model="m", messages=[USER], temperature=1)
        assert "x-ergon-overridden" not in raw.headers


async def test_or_another_sampling_is_refused() -> None:
    async with opened(["ok"], sampling={"temperature": 0.5}) as door:
        await door.client.chat.completions.create(model="m", messages=[USER], temperature=0.5)
    async with opened(sampling={"temperature": 0.5}, otherwise="refuse") as door:
        with pytest.raises(openai.BadRequestError, match=r"this run samples with 0\.5") as caught:
            await door.client.chat.completions.create(model="m", messages=[USER], temperature=0.7)
        assert caught.value.param == "temperature"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": "2"}, "n"),
    ({"seed": 3}, "seed"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"1": 2}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"store": True}, "store"),
    ({"top_k": 5}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "name": "Eva", "content": "x"}]}, "messages[0].name"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "cache": 1}]}, "messages[0].cache"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "1st"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": 1}}}]},
     "tools[0].function.parameters"),
    ({"tools": [LOOK, LOOK]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
    ({"tools": [LOOK], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice.type"),
    ({"model": None}, "model"),
]  # fmt: skip


async def test_what_cannot_be_honoured_is_refused_by_name() -> None:
    async with opened() as door:
        for change, param in REFUSED:
            with pytest.raises(openai.BadRequestError) as caught:
                await door.client.chat.completions.create(model="m", messages=[USER], extra_body=change)
            assert caught.value.param == param, change
            message = str(caught.value.body["message"])  # type: ignore[index]
            assert param in message
            assert "; " in message or ": " in message  # a reason or a remedy
        assert door.engine.prompts == []


NEUTRAL: list[dict[str, Any]] = [
    {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}},
    {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "k", "store": False},
    {"parallel_tool_calls": True, "tools": [], "tool_choice": "auto", "n": 1, "stop": None, "seed": None},
]


async def test_neutral_values_and_labels_are_taken() -> None:
    async with opened(["ok"] * len(NEUTRAL)) as door:
        for change in NEUTRAL:
            answer = await door.client.chat.completions.create(model="m", messages=[USER], extra_body=change)
            assert answer.choices[0].message.content == "ok"


async def test_models_are_listed_and_may_be_bound() -> None:
    async with opened(["ok", "ok"]) as door:
        assert [model.id async for model in door.client.models.list()] == ["policy"]
    async with opened(["ok"], model_names=("gpt-x",)) as door:
        assert [model.id async for model in door.client.models.list()] == ["gpt-x"]
        assert door.endpoint.model == "gpt-x"
        await door.client.chat.completions.create(model="gpt-x", messages=[USER])
        with pytest.raises(openai.NotFoundError, match="there is gpt-x"):
            await door.client.chat.completions.create(model="judge", messages=[USER])
