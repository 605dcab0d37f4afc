"""The API's resources: which paths exist, what they do to the database, and the documentation made from the same table.

Owns no session: authentication, rate limits, faults and idempotency are the world's. Nothing here trusts its input.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from envs.rows import Row
from envs.services.database import COLUMNS, NUMBERS, Database

PAGE_SIZE = 10
MAX_TEXT = 2000
STATUSES = {"tickets": ("open", "pending", "closed"), "orders": ("open", "shipped", "cancelled")}
PRIORITIES = ("low", "normal", "high")
FIRST_HOUR, LAST_HOUR, LAST_DAY = 9, 16, 28


class ApiError(Exception):
    """An answer with a status of 4xx."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """A request that was let in. row_id: the number in the path."""

    query: Mapping[str, str]
    body: Mapping[str, Any]
    row_id: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """One method on one path. fields: what the body takes, `name?` where it may be left out."""

    method: str
    path: str
    act: Callable[[Database, Request], Any]
    about: str
    fields: tuple[str, ...] = ()


def _list(table: str, *filters: str) -> Callable[[Database, Request], Any]:
    def act(db: Database, request: Request) -> Any:
        where: dict[str, Any] = {}
        for name, value in request.query.items():
            if name not in (*filters, "page"):
                raise ApiError(400, f"no parameter {name}; allowed are {', '.join((*filters, 'page'))}")
            if name != "page":
                where[name] = _number(name, value) if name in NUMBERS else value
        page = _number("page", request.query.get("page", "1"))
        total = db.count(table, where)
        pages = max(1, -(-total // PAGE_SIZE))
        if not 1 <= page <= pages:
            raise ApiError(400, f"page is {page}; there are pages 1 to {pages}")
        items = db.find(table, where, PAGE_SIZE, (page - 1) * PAGE_SIZE)
        return {"items": items, "page": page, "pages": pages}

    return act


def _get(table: str) -> Callable[[Database, Request], Any]:
    return lambda db, request: _row(db, table, request.row_id)


def _row(db: Database, table: str, row_id: int) -> Row:
    found = db.find(table, {"id": row_id})
    if not found:
        raise ApiError(404, f"{table} has no {row_id}")
    return found[0]


def _number(name: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        return int(value)
    if type(value) is int and 0 <= value < 10**9:
        return value
    raise ApiError(400, f"{name} must be a whole number")


def _values(request: Request, *names: str) -> dict[str, Any]:
    """The body's values of these names, checked; a missing one is simply not there (the world saw to the needed)."""
    values: dict[str, Any] = {}
    for name in names:
        if name in request.body:
            value = request.body[name]
            if name in NUMBERS:
                value = _number(name, value)
            elif not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
                raise ApiError(400, f"{name} must be a text of 1 to {MAX_TEXT} characters")
            values[name] = value
    if not values:
        raise ApiError(400, f"give at least one of {', '.join(names)}")
    return values


def _one_of(values: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> None:
    if name in values and values[name] not in allowed:
        raise ApiError(400, f"{name} must be one of {', '.join(allowed)}")


def _order(db: Database, request: Request) -> Row:
    values = _values(request, "customer", "product_id", "quantity")
    product = _row(db, "products", values["product_id"])
    if not 1 <= values["quantity"] <= product["stock"]:
        raise ApiError(409, f"quantity must be 1 to {product['stock']}, what is in stock")
    db.update("products", product["id"], {"stock": product["stock"] - values["quantity"]})
    return db.insert("orders", {**values, "status": "open"})


def _cancel(db: Database, request: Request) -> Row:
    order = _row(db, "orders", request.row_id)
    if order["status"] != "open":
        raise ApiError(409, f"order {order['id']} is {order['status']}; only open ones can be cancelled")
    product = _row(db, "products", order["product_id"])
    db.update("products", product["id"], {"stock": product["stock"] + order["quantity"]})
    return db.update("orders", order["id"], {"status": "cancelled"})


def _placed(values: Mapping[str, Any]) -> None:
    if not 1 <= values.get("day", 1) <= LAST_DAY or not FIRST_HOUR <= values.get("hour", FIRST_HOUR) <= LAST_HOUR:
        raise ApiError(400, f"day must be 1 to {LAST_DAY}, hour {FIRST_HOUR} to {LAST_HOUR}")


def _book(db: Database, request: Request) -> Row:
    values = _values(request, "title", "owner", "day", "hour")
    _placed(values)
    return _unless_taken(lambda: db.insert("events", values), "the owner has an event at that time")


def _move(db: Database, request: Request) -> Row:
    values = _values(request, "day", "hour")
    _placed(values)
    _row(db, "events", request.row_id)
    return _unless_taken(lambda: db.update("events", request.row_id, values), "the owner has an event at that time")


def _unless_taken(act: Callable[[], Row], complaint: str) -> Row:
    try:
        return act()
    except sqlite3.IntegrityError:
        raise ApiError(409, complaint) from None


def _edit_ticket(db: Database, request: Request) -> Row:
    values = _values(request, "status", "priority", "assignee")
    _one_of(values, "status", STATUSES["tickets"])
    _one_of(values, "priority", PRIORITIES)
    _row(db, "tickets", request.row_id)
    return db.update("tickets", request.row_id, values)


def _comment(db: Database, request: Request) -> Row:
    _row(db, "tickets", request.row_id)
    return db.insert("comments", {"ticket_id": request.row_id, **_values(request, "text")})


def _comments(db: Database, request: Request) -> Any:
    _row(db, "tickets", request.row_id)
    return {"items": db.find("comments", {"ticket_id": request.row_id})}


def _path(values: Mapping[str, Any]) -> None:
    if "path" in values and not re.fullmatch(r"(/[A-Za-z0-9_.-]+)+", values["path"]):
        raise ApiError(400, "path must look like /folder/name")


def _write_file(db: Database, request: Request) -> Row:
    values = _values(request, "path", "owner", "content")
    _path(values)
    return _unless_taken(lambda: db.insert("files", values), "there is a file of that path")


def _edit_file(db: Database, request: Request) -> Row:
    values = _values(request, "path", "content")
    _path(values)
    _row(db, "files", request.row_id)
    return _unless_taken(lambda: db.update("files", request.row_id, values), "there is a file of that path")


def _delete(table: str) -> Callable[[Database, Request], Any]:
    def act(db: Database, request: Request) -> Any:
        _row(db, table, request.row_id)
        db.delete(table, request.row_id)
        return {"deleted": request.row_id}

    return act


ROUTES: Mapping[str, tuple[Route, ...]] = {
    "shop": (
        Route("GET", "/shop/products", _list("products", "category"), "products; filter: category"),
        Route("GET", "/shop/products/ID", _get("products"), "one product"),
        Route("GET", "/shop/orders", _list("orders", "status"), "orders; filter: status (open, shipped, cancelled)"),
        Route("GET", "/shop/orders/ID", _get("orders"), "one order"),
        Route("POST", "/shop/orders", _order, "order; stock goes down", ("customer", "product_id", "quantity")),
        Route("POST", "/shop/orders/ID/cancel", _cancel, "cancel an open order; its quantity goes back into stock"),
    ),
    "calendar": (
        Route("GET", "/calendar/events", _list("events", "owner"), "events of one hour each; filter: owner"),
        Route("GET", "/calendar/events/ID", _get("events"), "one event"),
        Route("POST", "/calendar/events", _book, "day 1-28, hour 9-16", ("title", "owner", "day", "hour")),
        Route("PATCH", "/calendar/events/ID", _move, "move an event", ("day?", "hour?")),
        Route("DELETE", "/calendar/events/ID", _delete("events"), "remove an event"),
    ),
    "tickets": (
        Route("GET", "/tickets", _list("tickets", "status"), "tickets; filter: status (open, pending, closed)"),
        Route("GET", "/tickets/ID", _get("tickets"), "one ticket"),
        Route(
            "PATCH", "/tickets/ID", _edit_ticket, "priority: low, normal, high", ("status?", "priority?", "assignee?")
        ),
        Route("GET", "/tickets/ID/comments", _comments, "the ticket's comments"),
        Route("POST", "/tickets/ID/comments", _comment, "comment on a ticket", ("text",)),
    ),
    "files": (
        Route("GET", "/files", _list("files", "owner"), "files; filter: owner"),
        Route("GET", "/files/ID", _get("files"), "one file"),
        Route("POST", "/files", _write_file, "a new file", ("path", "owner", "content")),
        Route("PATCH", "/files/ID", _edit_file, "rename or rewrite a file", ("path?", "content?")),
        Route("DELETE", "/files/ID", _delete("files"), "remove a file"),
    ),
}

OVERVIEW = f"""The services are {", ".join(ROUTES)}; ask for the documentation of each by its name.
Get a token: POST /auth/token with the body {{"user": ..., "password": ...}}; give it with every other request. It
expires after a number of requests (401): get another one.
Lists come in pages of {PAGE_SIZE}: add ?page=2 and so on up to the answer's `pages`; filters are added likewise
(?page=2&owner=Eva).
429: too many requests; wait for the seconds it names. 5xx: try again. After a 504 the request may have been carried out
nevertheless: put an `idempotency_key` (any text of yours, one per change) into the body of every POST, PATCH
and DELETE, and the same request with the same key is carried out once, however often it is sent. An answer that is
shorter than its stated number of bytes was cut on its way: ask again."""


def document(service: str) -> str:
    """The documentation of one service, or the overview."""
    if service == "overview":
        return OVERVIEW
    lines = []
    for route in ROUTES[service]:
        fields = f" body: {', '.join(route.fields)}" if route.fields else ""
        lines.append(f"{route.method} {route.path}: {route.about}{fields}")
    tables = {
        table for table in COLUMNS if any(route.path.startswith(f"/{service}/{table}") for route in ROUTES[service])
    }
    tables |= {service} & set(COLUMNS)
    shapes = [f"fields of {table}: {', '.join(COLUMNS[table])}" for table in COLUMNS if table in tables]
    return "\n".join([*lines, "(? may be left out)", *shapes])


def route_of(method: str, path: str) -> tuple[Route, int]:
    """The route of a request and the number in its path. Raises ApiError 404 or 405."""
    shape = re.sub(r"/[0-9]{1,9}(?=/|$)", "/ID", path)
    number = re.search(r"/([0-9]{1,9})(?=/|$)", path)
    on_path = [route for routes in ROUTES.values() for route in routes if route.path == shape]
    for route in on_path:
        if route.method == method:
            return route, int(number[1]) if number else 0
    if on_path:
        raise ApiError(405, f"{path} takes {', '.join(route.method for route in on_path)}")
    raise ApiError(404, f"no such path {path[:80]}; see the documentation")
