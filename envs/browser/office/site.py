"""The office's server: who is signed in, which path is which page, and what forms do. One per episode, in memory.

Answers requests; every refused form says why and changes nothing. Its pages are made in pages.py. Grades nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus

from envs.browser.office import pages
from envs.browser.office.markup import whole_page
from envs.browser.office.rows import PRIORITIES, TEAMS, TICKET_STATES
from envs.browser.office.store import Store
from envs.browser.web import Request, Response, redirect
from envs.rows import Row, Rows

USER = "agent"
COOKIE = "office"
MAX_REPLY = 500
_NUMBER = re.compile(r"/([0-9]{1,6})(?=/|$)")


class RefusedError(Exception):
    """A form that was not filled in as it must be; the message is shown on the page."""


class OfficeSite:
    """The office of one episode. password: to sign in with, None where everybody is."""

    origin = "http://office.test"

    def __init__(self, rows: Rows, password: str | None) -> None:
        self.store = Store(rows)
        self._password = password
        self._sessions: set[str] = set()
        self._message = ""

    def answer(self, request: Request) -> Response:
        """Answer one request, whatever it is."""
        if request.path == "/login":
            return self._login(request)
        if not self._signed_in(request):
            return redirect("/login")
        shape = _NUMBER.sub("/ID", request.path)
        number = int(found[1]) if (found := _NUMBER.search(request.path)) else 0
        if request.method == "POST":
            return self._change(request, shape, number)
        if request.method != "GET":
            return self._page(
                "Not allowed", pages.nothing("This is not to be had here."), HTTPStatus.METHOD_NOT_ALLOWED
            )
        if shape == "/tickets/more":
            return Response(pages.more_tickets(self.store, request.query).encode())
        view = pages.VIEWS.get(shape)
        made = view(self.store, request.query, number) if view else None
        if made is None:
            return self._page("Not found", pages.nothing("There is no such page."), HTTPStatus.NOT_FOUND)
        return self._page(*made)

    def _page(self, title: str, body: object, status: int = HTTPStatus.OK, message: str = "") -> Response:
        said, self._message = message or self._message, ""
        return Response(whole_page(title, body, said), status)

    def _signed_in(self, request: Request) -> bool:
        return self._password is None or request.cookies.get(COOKIE, "") in self._sessions

    def _login(self, request: Request) -> Response:
        if request.method != "POST" or self._password is None:
            return Response(whole_page("Sign in", pages.login(), signed_in=False))
        given = request.form
        right = hmac.compare_digest(given.get("password", "").encode(), self._password.encode())
        if given.get("user") != USER or not right:
            body = whole_page("Sign in", pages.login(), "Wrong user or password.", signed_in=False)
            return Response(body, HTTPStatus.FORBIDDEN)
        number = str(len(self._sessions)).encode()
        session = hashlib.blake2b(number, key=self._password.encode(), digest_size=8).hexdigest()
        self._sessions.add(session)
        return redirect("/", **{"Set-Cookie": f"{COOKIE}={session}; Path=/; HttpOnly; SameSite=Strict"})

    def _change(self, request: Request, shape: str, number: int) -> Response:
        found = _FORMS.get(shape)
        table = shape.split("/")[1]
        row = self.store.find(table, number) if found and number else None
        if found is None or (number and row is None):
            return self._page("Not found", pages.nothing("There is no such page."), HTTPStatus.NOT_FOUND)
        try:
            target, self._message = found(self.store, row or {}, request.form)
        except RefusedError as error:
            made = pages.VIEWS.get(shape, pages.VIEWS[f"/{table}/ID"])(self.store, {}, number)
            title, body = made or ("Refused", pages.nothing("This cannot be done."))
            return self._page(title, body, HTTPStatus.BAD_REQUEST, f"Not saved: {error}")
        return redirect(target)


def _whole(form: Mapping[str, str], name: str, low: int, high: int, label: str) -> int:
    given = form.get(name, "").strip()
    if not re.fullmatch(r"[0-9]{1,6}", given) or not low <= int(given) <= high:
        raise RefusedError(f"{label} must be a whole number from {low} to {high}.")
    return int(given)


def _one_of(form: Mapping[str, str], name: str, allowed: tuple[str, ...], label: str) -> str:
    if form.get(name) not in allowed:
        raise RefusedError(f"{label} must be one of {', '.join(allowed)}.")
    return form[name]


def _save_product(store: Store, product: Row, form: Mapping[str, str]) -> tuple[str, str]:
    values = {
        "price": _whole(form, "price", 1, 9999, "The price"),
        "stock": _whole(form, "stock", 0, 9999, "The stock"),
        "shown": int("shown" in form),
    }
    store.change("products", product["id"], values)
    return f"/products/{product['id']}", f"{product['name']} was saved."


def _order(store: Store, _row: Row, form: Mapping[str, str]) -> tuple[str, str]:
    product = store.find("products", _whole(form, "product_id", 1, 10**6, "The product"))
    if product is None:
        raise RefusedError("there is no such product.")
    quantity = _whole(form, "quantity", 1, product["stock"], "The quantity")
    customer = form.get("customer", "").strip()
    if not 0 < len(customer) <= 60:
        raise RefusedError("a customer is needed.")
    store.change("products", product["id"], {"stock": product["stock"] - quantity})
    values = {"customer": customer, "product_id": product["id"], "quantity": quantity, "status": "open"}
    number = store.add("orders", values)
    return f"/orders/{number}", f"Order {number} was placed."


def _cancel(store: Store, order: Row, form: Mapping[str, str]) -> tuple[str, str]:
    if order["status"] != "open":
        raise RefusedError(f"the order is {order['status']}.")
    if "sure" not in form:
        raise RefusedError("tick the box to confirm.")
    product = store.find("products", order["product_id"])
    assert product is not None
    store.change("products", product["id"], {"stock": product["stock"] + order["quantity"]})
    store.change("orders", order["id"], {"status": "cancelled"})
    return f"/orders/{order['id']}", f"Order {order['id']} was cancelled."


def _ship(store: Store, order: Row, _form: Mapping[str, str]) -> tuple[str, str]:
    if order["status"] != "open":
        raise RefusedError(f"the order is {order['status']}.")
    store.change("orders", order["id"], {"status": "shipped"})
    return f"/orders/{order['id']}", f"Order {order['id']} was shipped."


def _save_ticket(store: Store, ticket: Row, form: Mapping[str, str]) -> tuple[str, str]:
    names = tuple(each["name"] for each in store.all("people"))
    values = {
        "status": _one_of(form, "status", TICKET_STATES, "The status"),
        "priority": _one_of(form, "priority", PRIORITIES, "The priority"),
        "assignee": _one_of(form, "assignee", names, "The person"),
    }
    store.change("tickets", ticket["id"], values)
    return f"/tickets/{ticket['id']}", f"Ticket {ticket['id']} was saved."


def _reply(store: Store, ticket: Row, form: Mapping[str, str]) -> tuple[str, str]:
    written = form.get("text", "").strip()
    if not 0 < len(written) <= MAX_REPLY:
        raise RefusedError(f"a reply has 1 to {MAX_REPLY} characters.")
    store.add("replies", {"ticket_id": ticket["id"], "text": written})
    return f"/tickets/{ticket['id']}", "The reply was sent."


def _save_person(store: Store, person: Row, form: Mapping[str, str]) -> tuple[str, str]:
    values = {"team": _one_of(form, "team", TEAMS, "The team"), "phone": form.get("phone", "").strip()}
    if not re.fullmatch(r"[0-9]{3}", values["phone"]):
        raise RefusedError("a phone number has three digits.")
    store.change("people", person["id"], values)
    return f"/people/{person['id']}", f"{person['name']} was saved."


_FORMS: Mapping[str, Callable[[Store, Row, Mapping[str, str]], tuple[str, str]]] = {
    "/products/ID": _save_product,
    "/orders": _order,
    "/orders/ID/cancel": _cancel,
    "/orders/ID/ship": _ship,
    "/tickets/ID": _save_ticket,
    "/tickets/ID/reply": _reply,
    "/people/ID": _save_person,
}
