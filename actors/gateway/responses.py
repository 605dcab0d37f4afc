"""The dialect of POST /v1/responses: its JSON as a Question, an Answer as its JSON or its stream of events.

What the endpoint cannot do is refused by name. Pure; samples nothing, knows no sockets and keeps nothing: what
`previous_response_id` leads to is the session's.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from actors.gateway.chat_completions import (
    ENGINE_ONLY,
    LABELS,
    LEAVE_OUT,
    ROLES,
    SHARED_NEUTRAL,
    Decode,
    read_effort,
    read_sampling,
    token_logprobs,
)
from actors.gateway.conversation import Answer, ChatMessage, FunctionCall, Question, Reply
from actors.gateway.errors import ApiError, not_honoured
from actors.gateway.fields import Fields, text_of
from actors.gateway.tools import check_kind, check_names, read_choice, read_tool
from envs.interface import Tool

LOGPROBS = "message.output_text.logprobs"
NOT_STORED = "give the whole conversation as input, or previous_response_id"
ITEMS = ("message", "reasoning", "function_call", "function_call_output")
PARTS = ("input_text", "output_text", "text")
NEUTRAL: Final = SHARED_NEUTRAL | {
    "background": ((False,), "an answer is waited for; leave it out"),
    "background_options": ((), "an answer is waited for; leave it out"),
    "access_programs": ((), "leave it out"),
    "context_management": ((), "shorten the conversation in the program"),
    "conversation": ((), NOT_STORED),
    "image": ((), "the policy writes text only"),
    "max_tool_calls": ((), "the program runs the tools; let it count"),
    "prompt": ((), "nothing is stored here; send the prompt's text"),
    "text": (({}, {"format": {"type": "text"}}), "what the policy writes is not constrained; parse it in the program"),
    "truncation": (("disabled",), ENGINE_ONLY),
}
REASONING_NEUTRAL: Final = {
    "summary": (("auto",), "thoughts are not summed up, they come whole"),
    "generate_summary": (("auto",), "thoughts are not summed up, they come whole"),
    "context": (("auto",), "the policy sees the thoughts that the input holds"),
    "mode": (("standard",), LEAVE_OUT),
}


@dataclass(frozen=True, slots=True)
class Form:
    """How a response is to be written. `said`: the conversation up to the answer, without the instructions."""

    model: str
    stream: bool
    logprobs: bool
    store: bool
    said: tuple[ChatMessage, ...]
    echoed: Mapping[str, Any] = field(default_factory=dict)


def read_request(body: object, threads: Mapping[str, tuple[ChatMessage, ...]]) -> tuple[Question, Form]:
    """A request's JSON; threads: what was said up to each stored response, by its id.

    Raises ApiError, which names the parameter and the remedy.
    """
    fields = Fields(body)
    tools = check_names([_tool(each) for each in fields.objects("tools")])
    said = (*_thread(fields, threads), *_input(fields))
    instructions = fields.string("instructions", "")
    store = fields.raw("store")
    if store is not None and not isinstance(store, bool):
        raise fields.wrong("store", "true or false")
    max_tokens = fields.integer("max_output_tokens", 1, 2**31)
    requested = read_sampling(fields)
    effort = _effort(fields)
    echoed = {
        "reasoning": {"effort": effort, "summary": None},
        "instructions": instructions or None,
        "metadata": fields.raw("metadata") or {},
        "tools": fields.raw("tools") or [],
        "tool_choice": fields.raw("tool_choice") or "auto",
        "previous_response_id": fields.raw("previous_response_id"),
        "max_output_tokens": max_tokens,
    }
    form = Form(
        fields.string("model"), fields.flag("stream"), _wants_logprobs(fields), store is not False, said, echoed
    )
    messages = (ChatMessage("system", instructions), *said) if instructions else said
    question = Question(
        messages,
        tools,
        read_choice(fields, tools, nested=False),
        max_tokens=max_tokens,
        requested=requested,
        effort=effort,
    )
    fields.labels((*LABELS, "stream_options"))
    fields.neutral(NEUTRAL)
    fields.finish()
    return question, form


def _effort(fields: Fields) -> str | None:
    reasoning = fields.nested("reasoning")
    if reasoning is None:
        return None
    effort = read_effort(reasoning, "effort")
    reasoning.neutral(REASONING_NEUTRAL)
    reasoning.finish()
    return effort


def _tool(fields: Fields) -> Tool:
    check_kind(fields)
    return read_tool(fields)


def _wants_logprobs(fields: Fields) -> bool:
    wanted = fields.raw("include") or []
    for each in wanted if isinstance(wanted, list) else [wanted]:
        if each != LOGPROBS:
            raise not_honoured(fields.path("include"), each, f"there is only {LOGPROBS} to include")
    return bool(wanted)


def _thread(fields: Fields, threads: Mapping[str, tuple[ChatMessage, ...]]) -> tuple[ChatMessage, ...]:
    previous = fields.raw("previous_response_id")
    if previous is None:
        return ()
    if not isinstance(previous, str) or previous not in threads:
        raise ApiError(
            400,
            f"previous_response_id = {previous!r:.80} is no stored response of this episode; "
            "give the whole conversation as input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return threads[previous]


def _input(fields: Fields) -> list[ChatMessage]:
    value = fields.raw("input")
    if isinstance(value, str):
        return [ChatMessage("user", value)]
    if not isinstance(value, list) or not value:
        raise fields.wrong("input", "a text or a list of items that is not empty")
    messages: list[ChatMessage] = []
    for item in fields.objects("input"):
        message = _item(item)
        if messages and _goes_on(messages[-1], message):
            # A turn's thought, its text and its calls are several items here, and one turn to the policy.
            turn = messages.pop()
            content, calls = turn.content or message.content, (*turn.calls, *message.calls)
            message = ChatMessage("assistant", content, calls, turn.thought)
        messages.append(message)
    return messages


def _goes_on(turn: ChatMessage, item: ChatMessage) -> bool:
    """Whether an item belongs to the turn before it: a call, or what follows a thought."""
    if not turn.role == item.role == "assistant" or item.thought:
        return False
    return bool(item.calls) or bool(turn.thought and not turn.content and not turn.calls)


def _item(fields: Fields) -> ChatMessage:
    kind = fields.raw("type") or "message"
    if kind not in ITEMS:
        raise not_honoured(fields.path("type"), kind, f"the policy knows the items {', '.join(ITEMS)}")
    fields.labels(("id", "status", "phase"))
    if kind == "message":
        role = ROLES[fields.either("role", [role for role in ROLES if role != "tool"])]
        message = ChatMessage(role, text_of(fields, "content", PARTS))
    elif kind == "reasoning":
        message = ChatMessage("assistant", "", (), _thought(fields))
    elif kind == "function_call":
        call = FunctionCall(fields.string("call_id"), fields.string("name"), fields.string("arguments"))
        message = ChatMessage("assistant", "", (call,))
    else:
        fields.string("call_id")
        message = ChatMessage("tool", text_of(fields, "output", PARTS))
    fields.finish()
    return message


def _thought(fields: Fields) -> str:
    for name, remedy in (("summary", "what was thought is in the item's content"), ("encrypted_content", LEAVE_OUT)):
        if value := fields.raw(name):
            raise not_honoured(fields.path(name), value, f"{remedy}; the policy reads its thoughts as it wrote them")
    return text_of(fields, "content", ("reasoning_text",), "")


def new_id() -> str:
    """The id of a response."""
    return f"resp_{secrets.token_hex(16)}"


def response(
    answer: Answer, form: Form, response_id: str, sampling: Mapping[str, float], decode: Decode
) -> dict[str, Any]:
    """The answer, which has one reply, as one JSON object."""
    (reply,) = answer.replies
    cut = reply.finish == "length"
    return {
        **_frame(form, response_id, sampling),
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": _output(reply, form, decode),
        "usage": {
            "input_tokens": answer.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": answer.num_sampled,
            "output_tokens_details": {"reasoning_tokens": answer.num_thinking},
            "total_tokens": answer.num_prompt_tokens + answer.num_sampled,
        },
    }


def _frame(form: Form, response_id: str, sampling: Mapping[str, float]) -> dict[str, Any]:
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": form.model,
        "error": None,
        "incomplete_details": None,
        "output": [],
        "parallel_tool_calls": True,
        "store": form.store,
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
        "usage": None,
        **sampling,
        **form.echoed,
    }


def _output(reply: Reply, form: Form, decode: Decode) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    status = "incomplete" if reply.finish == "length" else "completed"
    if reply.message.thought:
        content = [{"type": "reasoning_text", "text": reply.message.thought}]
        items.append(
            {
                "id": f"rs_{secrets.token_hex(16)}",
                "type": "reasoning",
                "summary": [],
                "content": content,
                "status": "completed" if reply.message.content or reply.message.calls else status,
            }
        )
    if reply.message.content or not reply.message.calls:
        # This dialect has no null for the bytes of half a character.
        logprobs = [{**each, "bytes": each["bytes"] or []} for each in token_logprobs(reply, decode) if form.logprobs]
        part = {"type": "output_text", "text": reply.message.content, "annotations": [], "logprobs": logprobs}
        items.append(
            {
                "id": f"msg_{secrets.token_hex(16)}",
                "type": "message",
                "role": "assistant",
                "status": status,
                "content": [part],
            }
        )
    for call in reply.message.calls:
        items.append(
            {
                "id": f"fc_{secrets.token_hex(16)}",
                "type": "function_call",
                "status": status,
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments,
            }
        )
    return items


def events(finished: Mapping[str, Any], form: Form, sampling: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """A finished response as the events of a stream, numbered. It was sampled whole: each text comes in one piece."""
    begun = {**_frame(form, finished["id"], sampling), "status": "in_progress"}
    unnumbered: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
    ]
    for index, item in enumerate(finished["output"]):
        unnumbered += EVENTS[item["type"]](index, item)
    unnumbered.append({"type": f"response.{finished['status']}", "response": finished})
    for number, event in enumerate(unnumbered):
        yield {**event, "sequence_number": number}


def _message_events(index: int, item: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    (part,) = item["content"]
    at = {"item_id": item["id"], "output_index": index, "content_index": 0}
    empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return [
        _item_event("added", index, {**item, "status": "in_progress", "content": []}),
        {"type": "response.content_part.added", **at, "part": empty},
        {"type": "response.output_text.delta", **at, "delta": part["text"], "logprobs": part["logprobs"]},
        {"type": "response.output_text.done", **at, "text": part["text"], "logprobs": part["logprobs"]},
        {"type": "response.content_part.done", **at, "part": part},
        _item_event("done", index, item),
    ]


def _thought_events(index: int, item: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    (part,) = item["content"]
    at = {"item_id": item["id"], "output_index": index, "content_index": 0}
    return [
        _item_event("added", index, {**item, "status": "in_progress", "content": []}),
        {"type": "response.content_part.added", **at, "part": {**part, "text": ""}},
        {"type": "response.reasoning_text.delta", **at, "delta": part["text"]},
        {"type": "response.reasoning_text.done", **at, "text": part["text"]},
        {"type": "response.content_part.done", **at, "part": part},
        _item_event("done", index, item),
    ]


def _call_events(index: int, item: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    at = {"item_id": item["id"], "output_index": index}
    arguments = item["arguments"]
    return [
        _item_event("added", index, {**item, "status": "in_progress", "arguments": ""}),
        {"type": "response.function_call_arguments.delta", **at, "delta": arguments},
        {"type": "response.function_call_arguments.done", **at, "arguments": arguments, "name": item["name"]},
        _item_event("done", index, item),
    ]


def _item_event(what: str, index: int, item: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": f"response.output_item.{what}", "output_index": index, "item": item}


EVENTS: Final = {"message": _message_events, "reasoning": _thought_events, "function_call": _call_events}
