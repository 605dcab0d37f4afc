"""The dialect of POST /v1/chat/completions: its JSON as a Question, an Answer as its JSON or its stream of chunks.

What the endpoint cannot do is refused by name. Pure; samples nothing and knows no sockets.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from actors.gateway.allowance import EFFORTS
from actors.gateway.conversation import Answer, ChatMessage, FunctionCall, Question, Reply
from actors.gateway.errors import ApiError, bad_value, not_honoured
from actors.gateway.fields import Fields, text_of
from actors.gateway.tools import check_kind, check_names, read_choice, read_tool
from envs.interface import Role, Tool

ROLES: Final[Mapping[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
Decode = Callable[[Sequence[int]], str]
MAX_REPLIES = 128
MAX_STOPS = 16
LEAVE_OUT = "leave it out"
ENGINE_ONLY = "it would distort what the policy samples, which is trained on; leave it out"
# What labels a request without changing its answer.
LABELS = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
)
# Parameters of both dialects that are honoured by their neutral values only, and the remedy for any other.
SHARED_NEUTRAL: Final[dict[str, tuple[tuple[Any, ...], str]]] = {
    "service_tier": (("auto", "default"), "there is one engine; leave it out"),
    "top_logprobs": ((0,), "the engine keeps the log-prob of the sampled token only; ask for logprobs alone"),
    "parallel_tool_calls": ((True,), "the policy writes as many calls as it likes; run the first one only"),
    "moderation": ((), LEAVE_OUT),
}
NEUTRAL: Final = SHARED_NEUTRAL | {
    "frequency_penalty": ((0, 0.0), ENGINE_ONLY),
    "presence_penalty": ((0, 0.0), ENGINE_ONLY),
    "logit_bias": (({},), ENGINE_ONLY),
    "seed": ((), "the engine has its own seed, run.seed; leave it out"),
    "response_format": (({"type": "text"},), "what the policy writes is not constrained; parse it in the program"),
    "modalities": ((["text"],), "the policy writes text only"),
    "audio": ((), "the policy writes text only"),
    "prediction": ((), LEAVE_OUT),
    "verbosity": (("medium",), "the run decides how much the policy may write; leave it out"),
    "web_search_options": ((), "the endpoint has no tools of its own; give the program one"),
    "store": ((False,), "nothing can be fetched later; leave it out"),
    "functions": ((), "it is the old form; use tools"),
    "function_call": ((), "it is the old form; use tool_choice"),
}


@dataclass(frozen=True, slots=True)
class Form:
    """How a chat completion is to be written: the model's name as asked for, and what the program wants to see."""

    model: str
    stream: bool
    include_usage: bool
    logprobs: bool


def read_request(body: object) -> tuple[Question, Form]:
    """A request's JSON. Raises ApiError, which names the parameter and the remedy."""
    fields = Fields(body)
    tools = check_names([_tool(each) for each in fields.objects("tools")])
    messages = tuple(_message(each) for each in fields.objects("messages"))
    if not messages:
        raise fields.wrong("messages", "a list with at least one message")
    options = fields.nested("stream_options")
    stream = fields.flag("stream")
    form = Form(
        fields.string("model"), stream, options is not None and options.flag("include_usage"), fields.flag("logprobs")
    )
    if options is not None:
        if not stream:
            raise ApiError(400, "stream_options needs stream = true; leave it out", param="stream_options")
        options.labels(("include_obfuscation",))
        options.finish()
    question = Question(
        messages,
        tools,
        read_choice(fields, tools, nested=True),
        fields.integer("n", 1, MAX_REPLIES) or 1,
        _max_tokens(fields),
        _stops(fields),
        read_sampling(fields),
        read_effort(fields, "reasoning_effort"),
    )
    fields.labels(LABELS)
    fields.neutral(NEUTRAL)
    fields.finish()
    return question, form


def read_sampling(fields: Fields) -> dict[str, float]:
    """The sampling parameters that the program gave."""
    asked = {"temperature": fields.number("temperature", 0, 2), "top_p": fields.number("top_p", 0, 1)}
    return {name: value for name, value in asked.items() if value is not None}


def read_effort(fields: Fields, name: str) -> str | None:
    """How much the program wants the reply to think, None where it does not say."""
    return fields.either(name, tuple(EFFORTS)) if fields.raw(name) is not None else None


def _tool(fields: Fields) -> Tool:
    check_kind(fields)
    function = fields.nested("function")
    if function is None:
        raise fields.wrong("function", "an object with name, description and parameters")
    fields.finish()
    return read_tool(function)


def _message(fields: Fields) -> ChatMessage:
    role = ROLES[fields.either("role", tuple(ROLES))]
    calls: tuple[FunctionCall, ...] = ()
    thought = ""
    if role == "assistant":
        thought = fields.string("reasoning_content", "")
        calls = tuple(_call(each) for each in fields.objects("tool_calls"))
        content = text_of(fields, "content", ("text",), "")
        fields.labels(("annotations", "name"))
    else:
        content = text_of(fields, "content", ("text",))
    if role == "tool":
        fields.string("tool_call_id")
        fields.labels(("name",))  # the tool's, which the call has named already
    if (name := fields.raw("name")) is not None and role in ("system", "user"):
        raise not_honoured(fields.path("name"), name, "the policy is told roles, not names; put it into the content")
    fields.finish()
    return ChatMessage(role, content, calls, thought)


def _call(fields: Fields) -> FunctionCall:
    check_kind(fields)
    function = fields.nested("function")
    if function is None:
        raise fields.wrong("function", "an object with name and arguments")
    call = FunctionCall(fields.string("id"), function.string("name"), function.string("arguments"))
    function.finish()
    fields.labels(("index",))
    fields.finish()
    return call


def _max_tokens(fields: Fields) -> int | None:
    old, new = (fields.integer(name, 1, 2**31) for name in ("max_tokens", "max_completion_tokens"))
    if old is not None and new is not None and old != new:
        raise bad_value("max_tokens", old, "absent where max_completion_tokens is given")
    return new if new is not None else old


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise fields.wrong("stop", f"a text or a list of up to {MAX_STOPS} texts, none of them empty")
    return tuple(stops)


def completion(answer: Answer, form: Form, decode: Decode, fingerprint: str) -> dict[str, Any]:
    """The whole answer as one JSON object."""
    choices = [
        {
            "index": index,
            "message": {
                "role": "assistant",
                "content": reply.message.content or (None if reply.message.calls else ""),
                "refusal": None,
                **({"reasoning_content": reply.message.thought} if reply.message.thought else {}),
                **({"tool_calls": [_call_object(call) for call in reply.message.calls]} if reply.message.calls else {}),
            },
            "logprobs": _logprobs(reply, decode) if form.logprobs else None,
            "finish_reason": reply.finish,
        }
        for index, reply in enumerate(answer.replies)
    ]
    return {**_head("chat.completion", form, fingerprint), "choices": choices, "usage": usage(answer)}


def chunks(answer: Answer, form: Form, decode: Decode, fingerprint: str) -> Iterator[dict[str, Any]]:
    """The answer as the chunks of a stream. It was sampled whole, so that each part of it comes in one piece."""
    head = _head("chat.completion.chunk", form, fingerprint)

    def chunk(index: int, delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice], **({"usage": None} if form.include_usage else {})}

    for index, reply in enumerate(answer.replies):
        yield chunk(index, {"role": "assistant", "content": "" if reply.message.content else None, "refusal": None})
        if reply.message.thought:
            yield chunk(index, {"reasoning_content": reply.message.thought})
        logprobs = _logprobs(reply, decode) if form.logprobs else None
        if reply.message.content or logprobs:
            yield chunk(index, {"content": reply.message.content}, logprobs=logprobs)
        for number, call in enumerate(reply.message.calls):
            yield chunk(index, {"tool_calls": [{"index": number, **_call_object(call)}]})
        yield chunk(index, {}, reply.finish)
    if form.include_usage:
        yield {**head, "choices": [], "usage": usage(answer)}


def usage(answer: Answer) -> dict[str, Any]:
    """Tokens of the prompt, once, and of all replies."""
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_sampled,
        "total_tokens": answer.num_prompt_tokens + answer.num_sampled,
        "completion_tokens_details": {"reasoning_tokens": answer.num_thinking},
    }


def _head(kind: str, form: Form, fingerprint: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": form.model,
        "system_fingerprint": fingerprint,
    }


def _call_object(call: FunctionCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(reply: Reply, decode: Decode) -> dict[str, Any]:
    return {"content": token_logprobs(reply, decode), "refusal": None}


def token_logprobs(reply: Reply, decode: Decode) -> list[dict[str, Any]]:
    """Every sampled token with its log-prob. `bytes` is null for a token that is part of a character."""
    entries = []
    for token_id, logprob in reply.turn.sampled():
        token = decode([token_id])
        whole = None if "\ufffd" in token else list(token.encode())
        entries.append({"token": token, "logprob": logprob, "bytes": whole, "top_logprobs": []})
    return entries
