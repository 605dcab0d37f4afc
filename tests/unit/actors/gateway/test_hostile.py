"""What a program may do wrong, on purpose or not: it gets an error in OpenAI's shape, and harms nobody else."""

from __future__ import annotations

import asyncio
import json
import socket
import zlib
from typing import Any

import aiohttp
import openai
import pytest

from actors.engine import EngineDeadError
from actors.rollout import InfraFailureError
from tests.unit.actors.gateway.support import Open, opened
from tests.unit.actors.support import make_ticket

USER: Any = {"role": "user", "content": "Say word 3."}
ASK = {"model": "m", "messages": [USER]}


async def post(door: Open, body: bytes, path: str = "/chat/completions", **headers: str) -> tuple[int, Any]:
    sent = {"Authorization": f"Bearer {door.endpoint.key}", "Content-Type": "application/json"} | headers
    async with (
        aiohttp.ClientSession() as client,
        client.post(door.endpoint.url + path, data=body, headers=sent) as answer,
    ):
        return answer.status, await answer.json()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b"NaN",
        b'{"model": 1e999}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        json.dumps({"model": "m", "messages": [{"role": "user", "content": [["x"]]}]}).encode(),
        json.dumps({"model": "m", "messages": [None]}).encode(),
        json.dumps(ASK | {"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}).encode(),
    ],
)  # fmt: skip
async def test_a_body_that_is_no_request_is_a_400(body: bytes) -> None:
    async with opened(["ok"]) as door:
        for path in ("/chat/completions", "/responses"):
            status, answer = await post(door, body, path)
            assert status == 400
            assert answer["error"].keys() == {"message", "type", "param", "code"}
        assert door.session.failure is None
        answer = await door.client.chat.completions.create(**ASK)
        assert answer.choices[0].message.content == "ok"


async def test_a_huge_body_is_refused_before_it_is_taken() -> None:
    async with opened(max_body_mb=1) as door:
        status, answer = await post(door, b" " * (2 << 20))
        assert status == 413
        assert "gateway.max_body_mb = 1" in answer["error"]["message"]
        # Also one that is small on its way.
        bomb = zlib.compress(b" " * (64 << 20))
        status, _ = await post(door, bomb, **{"Content-Encoding": "deflate"})
        assert status in (400, 413)
        status, _ = await post(door, b"not gzip", **{"Content-Encoding": "gzip"})
        assert status == 400
        assert door.session.failure is None


async def test_a_schema_that_says_several_types_is_no_trap() -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {"type": "object", "properties": {"word": {"type": ["string", "null"]}, "n": {"anyOf": []}}},
        },
    }
    async with opened(['<tool>look {"word": null}</tool>']) as door:
        status, answer = await post(door, json.dumps({**ASK, "tools": [tool]}).encode())
        assert (status, answer["choices"][0]["finish_reason"]) == (200, "tool_calls")


async def test_keys_open_their_own_episode_only() -> None:
    async with opened(["a", "b"]) as door:
        other = door.gateway.open(make_ticket("t2"), None)
        for key in ("", "sk-wrong", door.endpoint.report_key, door.endpoint.key[:-1], "é"):
            status, answer = await post(door, json.dumps(ASK).encode(), Authorization=f"Bearer {key}")
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        status, _ = await post(door, json.dumps(ASK).encode(), Authorization=f"Basic {door.endpoint.key}")
        assert status == 401
        # The other episode's key speaks for the other episode, whoever uses it; its thread is not this one's.
        first = await door.client.responses.create(model="m", input="x")
        body = json.dumps({"model": "m", "input": "y", "previous_response_id": first.id}).encode()
        status, answer = await post(door, body, "/responses", Authorization=f"Bearer {other.key}")
        assert (status, answer["error"]["param"]) == (400, "previous_response_id")
        assert (door.session.num_turns, other.num_turns) == (1, 0)


async def test_calls_after_the_episodes_end_are_refused() -> None:
    async with opened(["a"]) as door:
        await door.client.chat.completions.create(**ASK)
        await door.gateway.shut(door.session)
        with pytest.raises(openai.AuthenticationError):
            await door.client.chat.completions.create(**ASK)
        assert len(door.engine.prompts) == 1


async def test_what_is_not_served_says_what_is() -> None:
    async with opened() as door:
        status, answer = await post(door, b"{}", "/embeddings")
        assert (status, answer["error"]["code"]) == (404, "unknown_url")
        assert "POST /v1/responses" in answer["error"]["message"]
        async with aiohttp.ClientSession() as client, client.get(f"{door.endpoint.url}/responses") as reply:
            assert reply.status == 405


async def test_a_program_that_hangs_up_stops_the_engine_and_keeps_what_was_sampled() -> None:
    async with opened(["<hang>", "again"]) as door:
        body = json.dumps(ASK).encode()
        host, port = door.endpoint.url.removeprefix("http://").removesuffix("/v1").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s"
                % (door.endpoint.key.encode(), len(body), body)
            )
            await door.engine.hanging.wait()
        while door.session._working:  # it ends because the engine was told to stop; nothing else would end it
            await asyncio.sleep(0)
        answer = await door.client.chat.completions.create(**ASK)
        assert answer.choices[0].message.content == "again"
        assert [segment.num_sampled for segment in door.session.segments()] == [
            1,
            answer.usage and answer.usage.completion_tokens,
        ]
        assert door.session.failure is None


async def test_more_calls_at_once_than_could_be_answered_are_sent_away() -> None:
    async with opened(["<hang>"], sampling={"max_turns": 1}) as door:
        one = asyncio.create_task(door.client.chat.completions.create(**ASK))
        await door.engine.hanging.wait()
        door.session._num_open += 8  # as by requests whose bodies never end
        with pytest.raises(openai.RateLimitError, match="9 calls of this episode are open"):
            await door.client.chat.completions.create(**ASK)
        door.session._num_open -= 8
        with pytest.raises(openai.BadRequestError, match="used up the 1 turns"):
            await door.client.chat.completions.create(**ASK)
        await door.gateway.shut(door.session)
        with pytest.raises(openai.AuthenticationError):
            await one


@pytest.mark.parametrize("error", [EngineDeadError("gone"), RuntimeError("odd")])
async def test_an_engine_that_fails_voids_the_episode(error: Exception) -> None:
    async with opened([error]) as door:
        with pytest.raises(openai.InternalServerError, match="the episode is void") as caught:
            await door.client.chat.completions.create(**ASK)
        assert caught.value.status_code == 503
        assert isinstance(door.session.failure, EngineDeadError | InfraFailureError)
        assert door.session.failed.is_set()


async def test_a_mistake_of_the_gateway_voids_the_episode_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with opened(["x"]) as door:
        door.session._stitcher = None  # type: ignore[assignment]
        with pytest.raises(openai.InternalServerError):
            await door.client.chat.completions.create(**ASK)
        assert isinstance(door.session.failure, InfraFailureError)
        assert "gateway failed" in caplog.text


async def test_the_same_is_served_on_the_unix_socket() -> None:
    async with opened(["ok"]) as door:
        connector = aiohttp.UnixConnector(door.endpoint.socket)
        headers = {"Authorization": f"Bearer {door.endpoint.key}"}
        async with (
            aiohttp.ClientSession(connector=connector, headers=headers) as client,
            client.post("http://any/v1/chat/completions", json=ASK) as reply,
        ):
            assert (await reply.json())["choices"][0]["message"]["content"] == "ok"


async def test_rewards_are_reported_with_their_own_key() -> None:
    async with opened() as door:
        key = f"Bearer {door.endpoint.report_key}"
        for body in (b"{}", b'{"reward": "1"}', b'{"reward": 1e999}', b'{"reward": 1, "components": {"a": "b"}}'):
            assert (await post(door, body, "/reward", Authorization=key))[0] == 400
        assert (await post(door, b'{"reward": 1}', "/reward"))[0] == 401
        body = b'{"reward": 0.5, "components": {"tests": 1}}'
        assert (await post(door, body, "/reward", Authorization=key))[0] == 200
        assert [(r.total, dict(r.components)) for r in door.endpoint.reports] == [(0.5, {"tests": 1.0})]
