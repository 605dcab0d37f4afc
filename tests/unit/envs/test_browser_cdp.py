"""The pipe to Chromium: answers find who asked, whatever is broken, too large or late."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from typing import Any

import pytest

from envs.browser import cdp
from envs.browser.cdp import CdpError, Connection
from envs.interface import SandboxError


class Peer:
    """The other end of the pipe."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._loop = asyncio.get_running_loop()

    async def asked(self) -> dict[str, Any]:
        text = b""
        while not text.endswith(b"\0"):
            text += await self._loop.sock_recv(self._end, 1)
        return json.loads(text[:-1])

    async def say(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._end, data)

    def end(self) -> None:
        self._end.close()


async def pair() -> tuple[Connection, Peer]:
    ours, theirs = socket.socketpair()
    return await Connection.over(ours), Peer(theirs)


async def test_answers_find_who_asked_in_any_order_and_any_pieces() -> None:
    connection, peer = await pair()
    first, second = connection.post("A.a", "s", x=1), connection.post("B.b")
    assert await peer.asked() == {"id": 1, "method": "A.a", "params": {"x": 1}, "sessionId": "s"}
    assert await peer.asked() == {"id": 2, "method": "B.b", "params": {}}
    for piece in (b'{"id":2,"result":{"b":', b'2}}\0{"id":1,"err', b'or":{"message":"no"}}\0'):
        await peer.say(piece)
        await asyncio.sleep(0)
    assert await second == {"b": 2}
    with pytest.raises(CdpError, match=r"A\.a: no"):
        await first
    connection.close()
    peer.end()


async def test_events_go_to_their_session_and_to_nobody_else() -> None:
    connection, peer = await pair()
    seen: list[tuple[str, str]] = []

    def listener(session: str) -> Any:
        def on_event(method: str, _event: Mapping[str, Any]) -> None:
            seen.append((session, method))

        return on_event

    connection.listen("a", listener("a"))
    connection.listen("b", listener("b"))
    connection.forget("b")
    answer = connection.post("X.x")
    await peer.say(b'{"method":"E","sessionId":"a"}\0{"method":"E","sessionId":"b"}\0{"id":1,"result":{}}\0')
    await answer
    assert seen == [("a", "E")]
    peer.end()
    await connection.closed.wait()
    assert seen == [("a", "E"), ("a", "closed")]


async def test_the_end_of_chromium_ends_all_waiting() -> None:
    connection, peer = await pair()
    waiting = connection.post("X.x")
    await peer.asked()
    peer.end()
    with pytest.raises(SandboxError, match="has ended"):
        await waiting
    with pytest.raises(SandboxError, match="has ended"):
        await connection.send("Y.y")


async def test_who_waits_for_a_session_that_is_given_up_is_told_so() -> None:
    connection, peer = await pair()
    of_it, of_another = connection.post("X.x", "a"), connection.post("Y.y", "b")
    connection.give_up("a", CdpError("the page crashed"))
    with pytest.raises(CdpError, match="the page crashed"):
        await of_it
    await peer.say(b'{"id":1,"result":{}}\0{"id":2,"result":{"fine":1}}\0')
    assert await of_another == {"fine": 1}
    connection.close()
    peer.end()


async def test_no_answer_in_time_is_a_time_out_and_a_late_one_is_nobody_s() -> None:
    connection, peer = await pair()
    with pytest.raises(TimeoutError):
        await connection.send("X.x", limit_s=0.01)
    await peer.say(b'{"id":1,"result":{}}\0{"id":77,"result":{}}\0')
    after = connection.post("Y.y")
    await peer.say(b'{"id":2,"result":{"fine":1}}\0')
    assert await after == {"fine": 1}
    connection.close()
    peer.end()


async def test_a_message_that_is_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cdp, "MAX_MESSAGE", 1 << 20)
    connection, peer = await pair()
    large, small = connection.post("X.x"), connection.post("Y.y")
    await peer.say(b'{"id":1,"result":"' + b"x" * (3 << 20) + b'"}\0{"id":2,"result":{"fine":1}}\0')
    assert await small == {"fine": 1}
    with pytest.raises(CdpError, match="more than 1 MiB"):
        await large
    connection.close()
    peer.end()
