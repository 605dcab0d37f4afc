"""The reference policy of the services: solves every task through the tools, whatever the faults.

It finds everything out by asking; of the task it knows the question's facts and nothing of the world.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from envs.interface import ToolCall
from envs.scripted import Script, ScriptedPolicy
from envs.services.api import FIRST_HOUR

Asking = Script[Any]
STATUS_LINE = re.compile(r"HTTP (\d+), (\d+) bytes\n(.*)", re.DOTALL)


class ServicesReference(ScriptedPolicy):
    """Reads the documentation, gets a token, does what the kind asks."""

    def __init__(self, kind: str, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self._kind = kind
        self._facts = facts
        self._token = ""
        self._password = ""
        self._num_changes = 0

    def script(self, prompt: str) -> Script[str]:
        """Solve the task."""
        self._password = prompt.split("password ")[1].split()[0].strip(".,")
        yield ToolCall("docs", {"service": "overview"})
        yield from SOLUTIONS[self._kind](self, **self._facts)
        return "done"

    def ask(self, method: str, path: str, /, **body: Any) -> Asking:
        """One request, until it has an answer."""
        if method != "GET":
            self._num_changes += 1
            body["idempotency_key"] = f"change-{self._num_changes}"
        while True:
            arguments: dict[str, Any] = {"method": method, "path": path, "token": self._token}
            if body:
                arguments["body"] = body
            status, payload = yield from self._once(arguments)
            if status == 401:
                yield from self._login()
            elif status < 300:
                return payload

    def _login(self) -> Asking:
        body = {"user": "agent", "password": self._password}
        status = 0
        while status != 200:
            status, payload = yield from self._once({"method": "POST", "path": "/auth/token", "body": body})
            if status == 200:
                self._token = payload["token"]

    def _once(self, arguments: Mapping[str, Any]) -> Asking:
        """Status and payload; 599 for an answer that was cut. Raises ValueError for a refusal, which is our mistake."""
        match = STATUS_LINE.fullmatch((yield ToolCall("http", arguments)))
        if not match:
            raise ValueError("not an answer of the tool http")
        status = int(match[1])
        if len(match[3]) != int(match[2]):
            return 599, None
        payload = json.loads(match[3])
        if status == 429:
            yield ToolCall("wait", {"seconds": int(re.findall(r"\d+", payload["error"])[0])})
        elif 400 <= status < 500 and status != 401:
            raise ValueError(f"the reference was refused: {status} {payload['error']}")
        return status, payload

    def all(self, path: str) -> Asking:
        """All items of a list."""
        items: list[Any] = []
        page, pages = 1, 1
        while page <= pages:
            joint = "&" if "?" in path else "?"
            found = yield from self.ask("GET", f"{path}{joint}page={page}")
            items += found["items"]
            page, pages = page + 1, found["pages"]
        return items


def _order(policy: ServicesReference, product: str, customer: str, quantity: int) -> Asking:
    products = yield from policy.all("/shop/products")
    (found,) = [each["id"] for each in products if each["name"] == product]
    yield from policy.ask("POST", "/shop/orders", customer=customer, product_id=found, quantity=quantity)


def _cheapest(policy: ServicesReference, category: str, customer: str, quantity: int) -> Asking:
    products = yield from policy.all(f"/shop/products?category={category}")
    found = min((each for each in products if each["stock"] >= quantity), key=lambda each: int(each["price"]))
    yield from policy.ask("POST", "/shop/orders", customer=customer, product_id=found["id"], quantity=quantity)


def _cancel(policy: ServicesReference, customer: str) -> Asking:
    orders = yield from policy.all("/shop/orders?status=open")
    for order in orders:
        if order["customer"] == customer:
            yield from policy.ask("POST", f"/shop/orders/{order['id']}/cancel")


def _reschedule(policy: ServicesReference, owner: str, title: str, day: int, hour: int) -> Asking:
    events = yield from policy.all(f"/calendar/events?owner={owner}")
    (found,) = [each["id"] for each in events if each["title"] == title]
    yield from policy.ask("PATCH", f"/calendar/events/{found}", day=day, hour=hour)


def _book(policy: ServicesReference, owners: list[str], day: int, title: str) -> Asking:
    busy = set()
    for owner in owners:
        events = yield from policy.all(f"/calendar/events?owner={owner}")
        busy |= {each["hour"] for each in events if each["day"] == day}
    hour = next(each for each in range(FIRST_HOUR, 24) if each not in busy)
    for owner in owners:
        yield from policy.ask("POST", "/calendar/events", title=title, owner=owner, day=day, hour=hour)


def _triage(policy: ServicesReference, customer: str, assignee: str) -> Asking:
    tickets = yield from policy.all("/tickets?status=open")
    for ticket in tickets:
        if ticket["customer"] == customer:
            yield from policy.ask("PATCH", f"/tickets/{ticket['id']}", priority="high", assignee=assignee)


def _refund(policy: ServicesReference, customer: str) -> Asking:
    tickets = yield from policy.all("/tickets?status=open")
    (ticket,) = [each for each in tickets if each["customer"] == customer]
    order = yield from policy.ask("GET", f"/shop/orders/{ticket['subject'].split()[1]}")
    product = yield from policy.ask("GET", f"/shop/products/{order['product_id']}")
    yield from policy.ask("POST", f"/shop/orders/{order['id']}/cancel")
    text = f"refunded {order['quantity'] * product['price']} coins"
    yield from policy.ask("POST", f"/tickets/{ticket['id']}/comments", text=text)
    yield from policy.ask("PATCH", f"/tickets/{ticket['id']}", status="closed")


def _archive(policy: ServicesReference, owner: str, folder: str) -> Asking:
    files = yield from policy.all(f"/files?owner={owner}")
    for file in files:
        if file["path"].startswith("/drafts/"):
            yield from policy.ask("PATCH", f"/files/{file['id']}", path=f"/{folder}/{file['path'].split('/')[2]}")


def _report(policy: ServicesReference, path: str, owner: str) -> Asking:
    tickets = yield from policy.all("/tickets?status=open")
    names = [each["assignee"] for each in tickets]
    content = "\n".join(f"{name}: {names.count(name)}" for name in sorted(set(names)))
    yield from policy.ask("POST", "/files", path=path, owner=owner, content=content)


SOLUTIONS: Mapping[str, Callable[..., Asking]] = {
    "order": _order,
    "reschedule": _reschedule,
    "archive": _archive,
    "cheapest": _cheapest,
    "cancel": _cancel,
    "triage": _triage,
    "book": _book,
    "refund": _refund,
    "report": _report,
}
