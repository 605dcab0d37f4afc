"""Requests as JSON, answers as JSON or server-sent events. Knows no keys and no dialect."""

from __future__ import annotations

import json
import logging
from typing import Any

import msgspec
from aiohttp import web

from actors.gateway.conversation import Answer
from actors.gateway.errors import ApiError, bad_value

logger = logging.getLogger(__name__)

OVERRIDDEN = "x-ergon-overridden"


async def read_json(request: web.Request) -> object:
    """The request's body. Raises ApiError where it is no JSON."""
    try:
        body = await request.read()
    except web.RequestPayloadError as error:
        raise ApiError(400, f"the request's body cannot be read: {error}; send plain JSON") from error
    try:
        return msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:
        raise bad_value("the request's body", body[:40], f"JSON ({error})") from error


def reply(body: dict[str, Any], answer: Answer | None = None) -> web.Response:
    """A JSON object as the whole answer."""
    return web.json_response(body, headers=_headers(answer), dumps=dump)


async def stream(request: web.Request, lines: list[str], answer: Answer) -> web.StreamResponse:
    """Server-sent events. The reply is whole already, so they follow each other at once."""
    response = web.StreamResponse(headers={"Cache-Control": "no-cache", **_headers(answer)})
    response.content_type = "text/event-stream"
    try:
        await response.prepare(request)
        for line in lines:
            await response.write(line.encode())
        await response.write_eof()
    except ConnectionResetError:
        logger.info("a program hung up while it was answered")
    return response


def _headers(answer: Answer | None) -> dict[str, str]:
    return {OVERRIDDEN: ", ".join(answer.overridden)} if answer is not None and answer.overridden else {}


def dump(value: Any) -> str:
    """JSON without white space."""
    return json.dumps(value, separators=(",", ":"))
