"""The office's site without a browser: its answers, its tasks, and the verifier of what it leaves."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

import pytest

from envs.browser import BrowserEnvironment
from envs.browser.office.site import OfficeSite
from envs.browser.office.tasks import KINDS, problem
from envs.browser.office.verifier import MAX_ARTIFACT, verify
from envs.browser.web import Request, Response
from envs.rows import Rows, applied, differences

ROWS: Rows = {
    "products": [
        {"id": n, "name": f"<b>{n}", "category": "mugs", "price": n, "stock": 5, "shown": 1} for n in range(1, 20)
    ],
    "orders": [
        {"id": 1, "customer": "A", "product_id": 2, "quantity": 3, "status": "open"},
        {"id": 2, "customer": "B", "product_id": 2, "quantity": 3, "status": "shipped"},
    ],
    "tickets": [{"id": 1, "subject": "s", "customer": "A", "status": "open", "priority": "low", "assignee": "Ada"}],
    "replies": [],
    "people": [{"id": 1, "name": "Ada", "team": "sales", "phone": "123"}],
}


class Visitor:
    """Asks one office."""

    def __init__(self, password: str | None = None) -> None:
        self.site = OfficeSite(ROWS, password)
        self.cookie = ""

    def __call__(self, method: str, target: str, **form: object) -> Response:
        headers = {"cookie": self.cookie} if self.cookie else {}
        return self.site.answer(Request(method, target, headers, urlencode(form)))

    def changed(self) -> dict[str, Any]:
        return differences(ROWS, json.loads(self.site.store.artifact()))


def test_without_signing_in_nothing_is_shown_or_done() -> None:
    visitor = Visitor("secret")
    for method, target in (("GET", "/products"), ("POST", "/orders/1/ship"), ("GET", "/tickets/more?after=0")):
        assert (visitor(method, target).status, visitor(method, target).headers["Location"]) == (303, "/login")
    for form in ({}, {"user": "agent"}, {"user": "agent", "password": "Secret"}, {"user": "x", "password": "secret"}):
        assert visitor("POST", "/login", **form).status == 403
    visitor.cookie = "office=x"
    assert visitor("GET", "/").status == 303
    answer = visitor("POST", "/login", user="agent", password="secret")
    visitor.cookie = answer.headers["Set-Cookie"].split(";")[0]
    assert visitor("GET", "/products").status == 200
    assert visitor.changed() == {}


def test_what_is_shown_is_escaped_and_comes_in_pages() -> None:
    visitor = Visitor()
    first, second = (visitor("GET", f"/products?page={page}").body.decode() for page in (1, 2))
    assert "&lt;b&gt;1<" in first
    assert "<b>" not in first
    assert ("Page 1 of 3" in first, "Previous page" in first, "Previous page" in second) == (True, False, True)
    for page in ("0", "-1", "x", "99999999999", "²"):
        assert visitor("GET", f"/products?page={page}").status == 200


@pytest.mark.parametrize(
    ("target", "form", "status"),
    [
        ("/products/1", {"price": 0, "stock": 1}, 400),
        ("/products/1", {"price": "1.5", "stock": 1}, 400),
        ("/products/1", {"price": "٣", "stock": 1}, 400),
        ("/products/1", {}, 400),
        ("/products/99", {"price": 1, "stock": 1}, 404),
        ("/orders", {"product_id": 1, "customer": "A", "quantity": 6}, 400),
        ("/orders", {"product_id": 99, "customer": "A", "quantity": 1}, 400),
        ("/orders", {"product_id": 1, "customer": " ", "quantity": 1}, 400),
        ("/orders/1/cancel", {}, 400),
        ("/orders/2/cancel", {"sure": "on"}, 400),
        ("/orders/2/ship", {}, 400),
        ("/tickets/1", {"status": "gone", "priority": "low", "assignee": "Ada"}, 400),
        ("/tickets/1", {"status": "open", "priority": "low", "assignee": "Eve"}, 400),
        ("/tickets/1/reply", {"text": " "}, 400),
        ("/tickets/1/reply", {"text": "x" * 501}, 400),
        ("/people/1", {"team": "sales", "phone": "12"}, 400),
        ("/nowhere", {}, 404),
        ("/", {}, 404),
        ("/products/1/order", {}, 404),
    ],
)
def test_a_wrong_form_is_refused_and_changes_nothing(target: str, form: dict[str, object], status: int) -> None:
    visitor = Visitor()
    answer = visitor("POST", target, **form)
    assert answer.status == status
    assert visitor.changed() == {}
    assert status != 400 or b"Not saved" in answer.body
    assert b"Not saved" not in visitor("GET", "/").body


def test_forms_change_what_they_say() -> None:
    visitor = Visitor()
    assert visitor("POST", "/products/1", price=7, stock=9).headers["Location"] == "/products/1"
    assert b"was saved" in visitor("GET", "/products/1").body
    assert b"was saved" not in visitor("GET", "/products/1").body
    assert visitor("POST", "/orders", product_id=3, customer="C", quantity=5).headers["Location"] == "/orders/3"
    visitor("POST", "/orders/1/cancel", sure="on")
    visitor("POST", "/tickets/1", status="closed", priority="high", assignee="Ada")
    visitor("POST", "/tickets/1/reply", text=" hm ")
    visitor("POST", "/people/1", team="stores", phone="999")
    changed = visitor.changed()
    products = {row["id"]: (row["price"], row["stock"], row["shown"]) for row in changed["products"]}
    assert products == {1: (7, 9, 0), 2: (2, 8, 1), 3: (3, 0, 1)}
    assert [row.get("status") for row in changed["orders"]] == ["cancelled", "open"]
    assert changed["replies"] == [{"ticket_id": 1, "text": "hm"}]
    assert (changed["tickets"][0]["status"], changed["people"][0]["phone"]) == ("closed", "999")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD", "TRACE"])
def test_other_methods_do_nothing(method: str) -> None:
    visitor = Visitor()
    assert visitor(method, "/products/1").status == 405
    assert visitor.changed() == {}


def test_tasks_are_distinct_and_no_instruction_is_in_two_splits() -> None:
    train = [problem(KINDS, "train", index) for index in range(240)]
    heldout = [problem(KINDS, "heldout", index) for index in range(240)]
    asked = [{each.plan.instruction for each in split} for split in (train, heldout)]
    assert not asked[0] & asked[1]
    assert min(map(len, asked)) > 216
    assert len({repr((each.plan.instruction, each.rows)) for each in (*train, *heldout)}) == 480
    assert {each.kind.name for each in train[:12]} == {kind.name for kind in KINDS}
    assert all(differences(each.rows, each.expected) for each in (*train, *heldout))


def test_levels_are_chosen_and_options_are_checked() -> None:
    kinds = {BrowserEnvironment(levels=[2]).task("train", index).kind for index in range(8)}
    assert kinds == {kind.name for kind in KINDS if kind.level == 2}
    assert [BrowserEnvironment(levels=[level]).task("train", 0).secret["password"] is None for level in (1, 2, 3)] == [
        True,
        True,
        False,
    ]
    for options in (
        {"levels": []},
        {"levels": [1, 1]},
        {"levels": [4]},
        {"action_timeout_s": 0},
        {"warm_pages": -1},
        {"max_pages": 0},
    ):
        with pytest.raises(ValueError):
            BrowserEnvironment(**options)  # type: ignore[arg-type]


def test_the_prompt_holds_nothing_of_the_state() -> None:
    task = BrowserEnvironment().task("train", 3)
    assert "products" not in repr(task)
    assert "expected" not in repr(task)


def test_the_verifier_needs_nothing_but_the_artifact() -> None:
    found = problem(KINDS, "train", 4)
    secret = {"rows": found.rows, "expected": found.expected}
    artifact = json.dumps(found.expected).encode()
    assert verify(secret, artifact).total == 1.0
    assert verify(secret, json.dumps(found.rows).encode()).components["finished"] == 0.0
    more = applied(found.expected, [("people", 1, {"phone": "0"})])
    reward = verify(secret, json.dumps(more).encode())
    assert (reward.total, reward.components["finished"], reward.components["untouched"]) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    "artifact",
    [
        b"",
        b"{",
        b"[]",
        b'{"products": 1}',
        b'{"products": [{}]}',
        b'{"products": [{"id": []}]}',
        b"[" * 9999,
        b"1" * (MAX_ARTIFACT + 1),
    ],
)
def test_what_is_no_state_is_worth_nothing(artifact: bytes) -> None:
    found = problem(KINDS, "train", 0)
    reward = verify({"rows": found.rows, "expected": found.expected}, artifact)
    assert (reward.total, reward.components["readable"]) == (0.0, 0.0)
