"""Which world and which task stand behind an index, and the state that solves it, computed here and never by the agent.

A task belongs to a split by the hash of its instruction, so no instruction is in two splits. The world of an index is
its own; draws are seeded with text, so they are the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from envs.interface import Split
from envs.plans import Kind, Plan, Problem, draw_problem
from envs.rows import Change, Row, Rows
from envs.services.api import FIRST_HOUR, LAST_HOUR
from envs.services.rows import CATEGORIES, FIRMS, PEOPLE, SIZES, TITLES, make_rows


def _ordered(product: Row, customer: str, quantity: int) -> tuple[Change, ...]:
    order = {"customer": customer, "product_id": product["id"], "quantity": quantity, "status": "open"}
    return (("products", product["id"], {"stock": product["stock"] - quantity}), ("orders", None, order))


def _order(source: random.Random, rows: Rows) -> Plan:
    product, customer = source.choice(rows["products"]), source.choice(FIRMS)
    quantity = source.randrange(1, product["stock"] + 1)
    return Plan(
        f"Order {quantity} pieces of the product {product['name']} for the customer {customer}.",
        _ordered(product, customer, quantity),
        {"product": product["name"], "customer": customer, "quantity": quantity},
    )


def _cheapest(source: random.Random, rows: Rows) -> Plan | None:
    category, customer, quantity = source.choice(CATEGORIES), source.choice(FIRMS), source.randrange(5, 40)
    fitting = [each for each in rows["products"] if each["category"] == category and each["stock"] >= quantity]
    if not fitting:
        return None
    product = min(fitting, key=lambda each: int(each["price"]))
    return Plan(
        f"Order {quantity} pieces of one product for the customer {customer}: the cheapest of the category {category} "
        "of which there are enough in stock.",
        _ordered(product, customer, quantity),
        {"category": category, "customer": customer, "quantity": quantity},
    )


def _cancel(source: random.Random, rows: Rows) -> Plan | None:
    customer = source.choice([each["customer"] for each in rows["orders"]])
    mine = [each for each in rows["orders"] if each["customer"] == customer and each["status"] == "open"]
    if not mine:
        return None
    stock = {each["id"]: each["stock"] for each in rows["products"]}
    changes: list[Change] = []
    for order in mine:
        stock[order["product_id"]] += order["quantity"]
        changes.append(("orders", order["id"], {"status": "cancelled"}))
        changes.append(("products", order["product_id"], {"stock": stock[order["product_id"]]}))
    return Plan(f"Cancel every open order of the customer {customer}.", tuple(changes), {"customer": customer})


def _free(rows: Rows, owners: Sequence[str], day: int) -> list[int]:
    busy = {each["hour"] for each in rows["events"] if each["owner"] in owners and each["day"] == day}
    return [hour for hour in range(FIRST_HOUR, LAST_HOUR + 1) if hour not in busy]


def _reschedule(source: random.Random, rows: Rows) -> Plan | None:
    event, day = source.choice(rows["events"]), source.randrange(1, 15)
    free = _free(rows, (event["owner"],), day)
    if not free or day == event["day"]:
        return None
    hour = source.choice(free)
    return Plan(
        f"Move {event['owner']}'s event {event['title']!r} to day {day}, hour {hour}.",
        (("events", event["id"], {"day": day, "hour": hour}),),
        {"owner": event["owner"], "title": event["title"], "day": day, "hour": hour},
    )


def _book(source: random.Random, rows: Rows) -> Plan | None:
    owners = source.sample(sorted({each["owner"] for each in rows["events"]}), 2)
    day, title = source.randrange(1, 8), f"{source.choice(TITLES)} talk {source.randrange(100)}"
    # The first hour must be taken, or the policy could guess it.
    numbers = [len(rows["events"]) + 1 + extra for extra in range(2)]
    for number, owner, hour in zip(numbers, owners, (FIRST_HOUR, FIRST_HOUR + 1), strict=True):
        if not any((each["owner"], each["day"], each["hour"]) == (owner, day, hour) for each in rows["events"]):
            row = {
                "id": number,
                "title": f"{source.choice(TITLES)} {number + 10}",
                "owner": owner,
                "day": day,
                "hour": hour,
            }
            rows["events"].append(row)
    for number, event in enumerate(rows["events"], 1):
        event["id"] = number
    free = _free(rows, owners, day)
    if not free:
        return None
    booked: list[Change] = [
        ("events", None, {"title": title, "owner": owner, "day": day, "hour": free[0]}) for owner in owners
    ]
    return Plan(
        f"Book the event {title!r} on day {day} for {owners[0]} and for {owners[1]}, one event each, both at the first "
        f"hour from {FIRST_HOUR} on at which neither has another event.",
        tuple(booked),
        {"owners": owners, "day": day, "title": title},
    )


def _triage(source: random.Random, rows: Rows) -> Plan | None:
    customer, assignee = source.choice([each["customer"] for each in rows["tickets"]]), source.choice(PEOPLE)
    mine = [each for each in rows["tickets"] if each["customer"] == customer and each["status"] == "open"]
    if not mine:
        return None
    return Plan(
        f"Give every open ticket of the customer {customer} the priority high and the assignee {assignee}.",
        tuple(("tickets", each["id"], {"priority": "high", "assignee": assignee}) for each in mine),
        {"customer": customer, "assignee": assignee},
    )


def _refund(source: random.Random, rows: Rows) -> Plan | None:
    orders = [each for each in rows["orders"] if each["status"] == "open"]
    if not orders:
        return None
    order, ticket = source.choice(orders), source.choice(rows["tickets"])
    customer = f"{source.choice(PEOPLE)} {source.choice(FIRMS)}"  # nobody else's name, so that there is one such ticket
    ticket |= {"subject": f"order {order['id']} arrived broken", "customer": customer, "status": "open"}
    order["customer"] = customer
    product = rows["products"][order["product_id"] - 1]
    return Plan(
        f"The customer {customer} has an open ticket about a broken order. Cancel the order that its subject names, "
        "comment on the ticket with the text 'refunded N coins' where N is the order's quantity times the product's "
        "price, and close the ticket.",
        (
            ("orders", order["id"], {"status": "cancelled"}),
            ("products", product["id"], {"stock": product["stock"] + order["quantity"]}),
            (
                "comments",
                None,
                {"ticket_id": ticket["id"], "text": f"refunded {order['quantity'] * product['price']} coins"},
            ),
            ("tickets", ticket["id"], {"status": "closed"}),
        ),
        {"customer": customer},
    )


def _archive(source: random.Random, rows: Rows) -> Plan | None:
    owner, folder = source.choice(PEOPLE), f"archive-{source.randrange(1000)}"
    mine = [each for each in rows["files"] if each["owner"] == owner and each["path"].startswith("/drafts/")]
    if not mine:
        return None
    return Plan(
        f"Rename every file of {owner} in the folder /drafts so that it is in the folder /{folder} under the same "
        "name.",
        tuple(("files", each["id"], {"path": f"/{folder}/{each['path'].split('/')[2]}"}) for each in mine),
        {"owner": owner, "folder": folder},
    )


def _report(source: random.Random, rows: Rows) -> Plan:
    path, owner = f"/reports/week-{source.randrange(1000)}.txt", source.choice(PEOPLE)
    if not any(each["status"] == "open" for each in rows["tickets"]):
        rows["tickets"][0]["status"] = "open"
    counts: dict[str, int] = {}
    for ticket in rows["tickets"]:
        if ticket["status"] == "open":
            counts[ticket["assignee"]] = counts.get(ticket["assignee"], 0) + 1
    content = "\n".join(f"{name}: {counts[name]}" for name in sorted(counts))
    return Plan(
        f"Write a new file {path} with the owner {owner}. Its content: for every assignee with open tickets a line "
        "'NAME: NUMBER' with the number of open tickets, sorted by name, with no empty line at the end.",
        (("files", None, {"path": path, "owner": owner, "content": content}),),
        {"path": path, "owner": owner},
    )


KINDS = (
    Kind("order", 1, _order),
    Kind("reschedule", 1, _reschedule),
    Kind("archive", 1, _archive),
    Kind("cheapest", 2, _cheapest),
    Kind("cancel", 2, _cancel),
    Kind("triage", 2, _triage),
    Kind("book", 3, _book),
    Kind("refund", 3, _refund),
    Kind("report", 3, _report),
)


def problem(kinds: Sequence[Kind], split: Split, index: int) -> Problem:
    """The task of this split and index; kinds take turns."""
    return draw_problem("services", lambda source, level: make_rows(source, SIZES[level]), kinds, split, index)
