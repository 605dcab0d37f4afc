"""The services' world over a real socket and over MCP: the same answers, the same grade."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from envs.faults import FaultProfile
from envs.services import ServicesEnvironment
from envs.services.environment import grade, make_world
from envs.services.serve import http_server, mcp_server
from envs.services.world import RealClock, World


def ask(url: str, method: str, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
    """One request of a client that knows nothing of Ergon."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Authorization": f"Bearer {token}"}, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_an_agent_with_its_own_http_client_solves_a_task() -> None:
    task = ServicesEnvironment(faults="none").task("train", 0)
    facts = task.secret["facts"]
    world = make_world(task, RealClock())
    with http_server(world) as url:
        with urllib.request.urlopen(f"{url}/docs/shop") as page:
            assert b"POST /shop/orders" in page.read()
        assert ask(url, "GET", "/files")[0] == 401
        assert ask(url, "POST", "/auth/token", [1])[0] == 400
        token = ask(url, "POST", "/auth/token", {"user": "agent", "password": task.secret["password"]})[1]["token"]
        products = ask(url, "GET", "/shop/products", None, token)[1]
        products = products["items"] + ask(url, "GET", "/shop/products?page=2", None, token)[1]["items"]
        (found,) = [each["id"] for each in products if each["name"] == facts["product"]]
        body = {"customer": facts["customer"], "product_id": found, "quantity": facts["quantity"]}
        assert grade(task, world).total == 0.0
        assert ask(url, "POST", "/shop/orders", body, token)[0] == 201
    assert grade(task, world).total == 1.0
    world.close()


def test_a_cut_answer_ends_the_connection_early_and_a_slow_one_is_waited_for() -> None:
    waited: list[float] = []
    profile = FaultProfile(partial=1.0, slow=1.0, slow_s=3.0, max_in_a_row=10)
    world = World({}, "seed", "secret", profile, clock=RealClock())
    with http_server(world, sleep=waited.append) as url, pytest.raises(http.client.IncompleteRead):
        ask(url, "POST", "/auth/token", {"user": "agent", "password": "secret"})
    assert len(waited) == 1
    assert 0 < waited[0] <= 3
    world.close()


async def test_an_mcp_client_reaches_the_same_world() -> None:
    from mcp import Client

    environment = ServicesEnvironment(faults="none")
    task = environment.task("train", 0)
    episode = environment.episode(task)
    async with Client(mcp_server(episode)) as client:
        tools = await client.list_tools()
        assert {tool.name for tool in tools.tools} == {"docs", "http", "wait"}
        body = {"user": "agent", "password": task.secret["password"]}
        answer = await client.call_tool("http", {"method": "POST", "path": "/auth/token", "body": body})
        assert answer.content[0].text.startswith("HTTP 200")
        refused = await client.call_tool("wait", {"seconds": 1000})
        assert refused.content[0].text == "error: seconds must be 1 to 120"
        unknown = await client.call_tool("docs", {"service": "weather"})
        assert unknown.content[0].text == "error: no documentation of weather"
    assert (await episode.grade()).components == {"correct": 0.0, "finished": 0.0, "untouched": 1.0}
    await episode.close()
