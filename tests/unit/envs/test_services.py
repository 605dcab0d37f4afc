"""Services: the API's answers, tasks that are distinct and disjoint, and a grade that looks at the state only."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from envs.faults import PROFILES, FaultProfile
from envs.interface import Action, EnvironmentFailureError, ToolCall
from envs.play import play
from envs.rows import Rows, differences
from envs.services import ServicesEnvironment
from envs.services.environment import ServicesEpisode
from envs.services.tasks import KINDS, problem
from envs.services.world import Limits, World

ROWS: Rows = {
    "products": [{"id": n, "name": f"p{n}", "category": "desk", "price": n, "stock": 5} for n in range(1, 24)],
    "orders": [{"id": 1, "customer": "Oak", "product_id": 2, "quantity": 3, "status": "open"}],
    "events": [
        {"id": 1, "title": "a", "owner": "Ada", "day": 1, "hour": 9},
        {"id": 2, "title": "b", "owner": "Ada", "day": 1, "hour": 10},
    ],
    "tickets": [{"id": 1, "subject": "s", "customer": "Oak", "status": "open", "priority": "low", "assignee": "Ada"}],
    "files": [{"id": 1, "path": "/a/b", "owner": "Ada", "content": "c"}],
}


class Client:
    """Asks one world."""

    def __init__(self, faults: FaultProfile = PROFILES["none"], requests: int = 10**6) -> None:
        self.world = World(ROWS, "seed", "secret", faults, Limits(requests))
        self.token = ""

    def __call__(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        answer = self.world.request(method, path, body, self.token)
        return answer.status, json.loads(answer.text)

    def changed(self) -> dict[str, Any]:
        return differences(ROWS | {"comments": []}, self.world.rows())


@pytest.fixture
def ask() -> Client:
    client = Client()
    client.token = client("POST", "/auth/token", {"user": "agent", "password": "secret"})[1]["token"]
    return client


def test_without_a_token_nothing_is_told() -> None:
    ask = Client()
    assert ask("GET", "/files")[0] == 401
    for body in (
        {},
        {"user": "agent"},
        {"user": "agent", "password": "Secret"},
        {"user": "agent", "password": ["secret"]},
    ):
        assert ask("POST", "/auth/token", body)[0] == 403
    assert ask("GET", "/auth/token")[0] == 405


def test_a_token_expires_and_a_new_one_replaces_it(ask: Client) -> None:
    assert {ask("GET", "/files")[0] for _ in range(60)} == {200}
    assert ask("GET", "/files")[0] == 401
    old, ask.token = ask.token, ask("POST", "/auth/token", {"user": "agent", "password": "secret"})[1]["token"]
    assert ask.token != old
    assert ask("GET", "/files")[0] == 200


def test_lists_come_in_pages_and_can_be_filtered(ask: Client) -> None:
    pages = [ask("GET", f"/shop/products?page={page}")[1] for page in (1, 2, 3)]
    assert [len(page["items"]) for page in pages] == [10, 10, 3]
    assert {page["pages"] for page in pages} == {3}
    assert [item["id"] for page in pages for item in page["items"]] == list(range(1, 24))
    assert ask("GET", "/tickets?status=closed")[1] == {"items": [], "page": 1, "pages": 1}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/shop/products?page=4", None, 400),
        ("GET", "/shop/products?page=-1", None, 400),
        ("GET", "/shop/products?page=x", None, 400),
        ("GET", "/shop/products?colour=red", None, 400),
        ("GET", "/shop/products?id=1 OR 1=1", None, 400),
        ("GET", "/shop/products/99", None, 404),
        ("GET", "/nowhere", None, 404),
        ("GET", "http://[", None, 400),
        ("PATCH", "/shop/products/1", {"stock": 1}, 405),
        ("POST", "/shop/orders", {"customer": "Oak", "product_id": 1}, 400),
        ("POST", "/shop/orders", {"customer": "Oak", "product_id": 1, "quantity": 6}, 409),
        ("POST", "/shop/orders", {"customer": "Oak", "product_id": 1, "quantity": -1}, 400),
        ("POST", "/shop/orders", {"customer": "Oak", "product_id": 1, "quantity": 1.5}, 400),
        ("POST", "/shop/orders", {"customer": "Oak", "product_id": True, "quantity": 1}, 400),
        ("POST", "/shop/orders", {"customer": {}, "product_id": 1, "quantity": 1}, 400),
        ("POST", "/calendar/events", {"title": "t", "owner": "Ada", "day": 1, "hour": 9}, 409),
        ("POST", "/calendar/events", {"title": "t", "owner": "Ada", "day": 0, "hour": 9}, 400),
        ("PATCH", "/calendar/events/1", {"hour": 10}, 409),
        ("PATCH", "/calendar/events/1", {}, 400),
        ("PATCH", "/tickets/1", {"status": "gone"}, 400),
        ("PATCH", "/tickets/1", {"subject": "x"}, 400),
        ("POST", "/files", {"path": "/a/b", "owner": "Ada", "content": "x"}, 409),
        ("POST", "/files", {"path": "../b", "owner": "Ada", "content": "x"}, 400),
        ("POST", "/files", {"path": "/b", "owner": "Ada", "content": "x" * 2001}, 400),
        ("DELETE", "/files/2", None, 404),
        ("DELETE", "/files/1", {"idempotency_key": ""}, 400),
    ],
)
def test_a_wrong_request_is_refused_and_changes_nothing(
    ask: Client, method: str, path: str, body: dict[str, Any] | None, status: int
) -> None:
    answered, payload = ask(method, path, body)
    assert (answered, list(payload)) == (status, ["error"])
    assert ask.changed() == {}


def test_writes_change_what_they_say(ask: Client) -> None:
    assert (
        ask("POST", "/shop/orders", {"customer": "'; DROP TABLE files; --", "product_id": 1, "quantity": 5})[0] == 201
    )
    assert ask("POST", "/shop/orders/1/cancel")[0] == 201
    assert ask("POST", "/shop/orders/1/cancel")[0] == 409
    assert ask("POST", "/tickets/1/comments", {"text": "hm"})[0] == 201
    assert ask("DELETE", "/files/1")[0] == 200
    products = {row["id"]: row["stock"] for row in ask.changed()["products"]}
    assert products == {1: 0, 2: 8}
    assert ask.changed()["comments"] == [{"ticket_id": 1, "text": "hm"}]
    assert ask.changed()["files"] == [{"gone": 1}]


def test_one_idempotency_key_is_one_change(ask: Client) -> None:
    body = {"path": "/n", "owner": "Ada", "content": "x", "idempotency_key": "k"}
    assert ask("POST", "/files", body) == ask("POST", "/files", body)
    assert ask("POST", "/files", body | {"content": "y"})[0] == 422
    assert len(ask.changed()["files"]) == 1


def test_a_lost_answer_was_carried_out_and_a_refused_one_was_not() -> None:
    login = {"user": "agent", "password": "secret"}
    lost = Client(FaultProfile(lost=1.0, max_in_a_row=1))
    assert lost("POST", "/auth/token", login)[0] == 504
    lost.token = lost("POST", "/auth/token", login)[1]["token"]
    assert lost("DELETE", "/files/1")[0] == 504
    assert lost.changed() == {"files": [{"gone": 1}]}
    refused = Client(FaultProfile(error=1.0, max_in_a_row=1))
    assert refused("POST", "/auth/token", login)[0] in (500, 502, 503)
    refused.token = refused("POST", "/auth/token", login)[1]["token"]
    assert refused("DELETE", "/files/1")[0] in (500, 502, 503)
    assert refused.changed() == {}


def test_too_many_requests_wait_for_the_seconds_they_are_told() -> None:
    ask = Client(requests=5)
    assert [ask("GET", "/files")[0] for _ in range(6)] == [401] * 5 + [429]
    seconds = int(ask("GET", "/files")[1]["error"].split()[-2])
    ask.world.wait(seconds - 3)
    assert ask("GET", "/files")[0] == 429
    ask.world.wait(3)
    assert ask("GET", "/files")[0] == 401


def test_tasks_are_distinct_and_no_instruction_is_in_two_splits() -> None:
    train = [problem(KINDS, "train", index) for index in range(120)]
    heldout = [problem(KINDS, "heldout", index) for index in range(60)]
    worlds = {repr((each.plan.instruction, each.rows)) for each in (*train, *heldout)}
    assert len(worlds) == 180
    asked = [{each.plan.instruction for each in split} for split in (train, heldout)]
    assert not asked[0] & asked[1]
    assert len(asked[0]) > 108
    assert {each.kind.name for each in train[:9]} == {kind.name for kind in KINDS}
    assert all(differences(each.rows, each.expected) for each in (*train, *heldout))


def test_options_are_checked() -> None:
    assert {ServicesEnvironment(levels=[1]).task("train", index).kind for index in range(9)} == {
        kind.name for kind in KINDS if kind.level == 1
    }
    for options in ({"levels": []}, {"levels": [4]}, {"faults": "x"}):
        with pytest.raises(ValueError):
            ServicesEnvironment(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("faults", ["none", "hostile"])
async def test_the_reference_solves_every_kind_whatever_the_faults(faults: str) -> None:
    environment = ServicesEnvironment(faults=faults)
    rewards = Counter[tuple[str, float]]()
    for index in range(2 * len(KINDS)):
        task = environment.task("heldout", index)
        played = await play(environment, task, environment.reference(task))
        rewards[task.kind, played.reward.total] += 1
    assert rewards == {(kind.name, 1.0): 2 for kind in KINDS}


async def _solved(environment: ServicesEnvironment) -> ServicesEpisode:
    """An episode whose task is done, and which goes on."""
    task = environment.task("train", 0)
    episode = environment.episode(task)
    reference = environment.reference(task)
    messages = list(await episode.start())
    while not episode.final_text:
        action = reference.act(messages)
        if not action.tool_calls:
            return episode
        messages += (await episode.step(action)).messages
    raise AssertionError


async def test_one_change_too_many_is_no_success_and_words_do_not_count() -> None:
    environment = ServicesEnvironment(faults="none")
    episode = await _solved(environment)
    assert (await episode.grade()).total == 1.0
    token = episode.world.request(
        "POST", "/auth/token", {"user": "agent", "password": episode.task.secret["password"]}, ""
    )
    call = ToolCall("http", {"method": "DELETE", "path": "/files/1", "token": json.loads(token.text)["token"]})
    assert "200" in (await episode.step(Action("", (call,)))).messages[0].content
    await episode.step(Action("done, everything is correct, reward 1"))
    reward = await episode.grade()
    assert reward.total == 0.0
    assert (reward.components["finished"], reward.components["untouched"]) == (1.0, 0.0)
    await episode.close()
    with pytest.raises(EnvironmentFailureError, match="closed"):
        await episode.grade()


def test_the_prompt_does_not_hold_the_state() -> None:
    task = ServicesEnvironment().task("train", 2)
    assert "rows" not in repr(task)
    assert "expected" not in repr(task)
