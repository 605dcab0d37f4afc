"""POST /v1/responses through the real openai SDK and a real socket."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.unit.actors.gateway.support import opened

LOOK: Any = {
    "type": "function",
    "name": "look",
    "description": "Look a word up.",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    "strict": True,
}
START = "<|im_start|>user\nSay word 3.<|im_end|>\n<|im_start|>assistant\n"
WHOLE = [
    f"{START}[Hm. <tool>look 3</tool><|im_end|>]\n<|im_start|>tool\nw3<|im_end|>\n<|im_start|>assistant\n[w3<|im_end|>]"
]


async def test_a_thread_by_previous_response_id_is_one_segment() -> None:
    async with opened(["Hm. <tool>look 3</tool>", "w3"]) as door:
        first = await door.client.responses.create(model="m", input="Say word 3.", tools=[LOOK])
        message, call = first.output
        assert (message.type, call.type, first.status, first.output_text) == (
            "message",
            "function_call",
            "completed",
            "Hm.",
        )
        assert (call.name, call.arguments) == ("look", '{"word": "3"}')
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "w3"}
        second = await door.client.responses.create(
            model="m", previous_response_id=first.id, input=[output], tools=[LOOK]
        )
        assert second.output_text == "w3"
        assert second.previous_response_id == first.id
        assert second.usage is not None
        assert second.usage.input_tokens == len(door.engine.prompts[1])
        assert door.texts == WHOLE


async def test_a_thread_by_the_programs_own_list_is_one_segment_too() -> None:
    async with opened(["Hm. <tool>look 3</tool>", "w3"]) as door:
        said: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Say word 3."}]}]
        first = await door.client.responses.create(model="m", input=said, tools=[LOOK], store=False)
        said += [item.model_dump() for item in first.output]
        call = first.output[-1]
        assert call.type == "function_call"
        output = [{"type": "input_text", "text": "w3"}]
        said.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
        await door.client.responses.create(model="m", input=said, tools=[LOOK], store=False)
        assert door.texts == WHOLE


async def test_instructions_are_the_system_message_of_their_call_only() -> None:
    async with opened(["a", "b"]) as door:
        first = await door.client.responses.create(model="m", instructions="Be brief.", input="x")
        await door.client.responses.create(model="m", instructions="Be kind.", input="y", previous_response_id=first.id)
        end = "<|im_end|>\n<|im_start|>"
        assert door.texts == [
            f"<|im_start|>system\nBe brief.{end}user\nx{end}assistant\n[a<|im_end|>]",
            f"<|im_start|>system\nBe kind.{end}user\nx{end}assistant\na{end}user\ny{end}assistant\n[b<|im_end|>]",
        ]


async def test_the_sdks_own_accumulator_understands_the_events() -> None:
    async with opened(["Hm. <tool>look 3</tool>"]) as door:
        async with door.client.responses.stream(model="m", input="Say word 3.", tools=[LOOK]) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
        assert events[-1].type == "response.completed"
        numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
        assert numbers == sorted(numbers)
        assert final.output_text == "Hm."
        assert [item.type for item in final.output] == ["message", "function_call"]
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert deltas == ['{"word": "3"}']


async def test_a_cut_response_is_incomplete() -> None:
    async with opened(["one two three four"]) as door:
        stream = await door.client.responses.create(model="m", input="x", max_output_tokens=3, stream=True)
        last = [event async for event in stream][-1]
        assert last.type == "response.incomplete"
        assert last.response.incomplete_details is not None
        assert last.response.incomplete_details.reason == "max_output_tokens"


async def test_log_probs_are_included_where_asked_for() -> None:
    async with opened(["yes"]) as door:
        answer = await door.client.responses.create(model="m", input="x", include=["message.output_text.logprobs"])
        (item,) = answer.output
        assert item.type == "message"
        (part,) = item.content
        assert part.type == "output_text"
        (segment,) = door.session.segments()
        assert [each.logprob for each in part.logprobs or ()] == segment.logprobs_T[segment.loss_mask_T].tolist()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_of_another_episode"}, "previous_response_id"),
    ({"background": True}, "background"),
    ({"conversation": "c"}, "conversation"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
    ({"text": {"format": {"type": "json_object"}}}, "text"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["reasoning.encrypted_content"]}, "include"),
    ({"max_tool_calls": 1}, "max_tool_calls"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"input": []}, "input"),
    ({"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}]}, "input[0].summary"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    ({"input": [{"type": "item_reference"}]}, "input[0].type"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"store": "yes"}, "store"),
    ({"n": 2}, "n"),
]


async def test_what_cannot_be_honoured_is_refused_by_name() -> None:
    async with opened() as door:
        for change, param in REFUSED:
            with pytest.raises(openai.BadRequestError) as caught:
                await door.client.responses.create(model="m", input="x", extra_body=change)
            assert caught.value.param == param, change
        assert door.engine.prompts == []


async def test_a_response_that_was_not_stored_cannot_be_gone_on_with() -> None:
    async with opened(["a"]) as door:
        first = await door.client.responses.create(model="m", input="x", store=False)
        with pytest.raises(openai.BadRequestError, match="no stored response"):
            await door.client.responses.create(model="m", input="y", previous_response_id=first.id)
