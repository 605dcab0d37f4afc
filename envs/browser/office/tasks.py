"""Which office and which task stand behind an index, and the state that solves it, computed here and never by a page.

A task belongs to a split by the hash of its instruction, so no instruction is in two splits. The office of an index is
its own; draws are seeded with text, so they are the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from envs.browser.office.rows import CATEGORIES, CUSTOMERS, NAMES, SIZES, TEAMS, make_rows
from envs.interface import Split
from envs.plans import Kind, Plan, Problem, draw_problem
from envs.rows import Rows


def _reprice(source: random.Random, rows: Rows) -> Plan:
    product, price = source.choice(rows["products"]), source.randrange(300, 900)
    return Plan(
        f"Set the price of the product {product['name']} to {price} coins.",
        (("products", product["id"], {"price": price}),),
        {"product": product["name"], "price": price},
    )


def _hide(source: random.Random, rows: Rows) -> Plan:
    product, stock = source.choice(rows["products"]), source.randrange(120, 1000)
    return Plan(
        f"The product {product['name']} must not be shown in the shop any more, and its stock is {stock}.",
        (("products", product["id"], {"shown": 0, "stock": stock}),),
        {"product": product["name"], "stock": stock},
    )


def _move(source: random.Random, rows: Rows) -> Plan:
    person, phone = source.choice(rows["people"]), str(source.randrange(100, 1000))
    team = source.choice([each for each in TEAMS if each != person["team"]])
    return Plan(
        f"{person['name']} is now in the team {team} and has the phone number {phone}.",
        (("people", person["id"], {"team": team, "phone": phone}),),
        {"person": person["name"], "team": team, "phone": phone},
    )


def _assign(source: random.Random, rows: Rows) -> Plan:
    ticket = source.choice(rows["tickets"])
    # Nobody else's name, so that there is one such ticket.
    ticket["customer"] = f"{source.choice(NAMES)} of {source.choice(CUSTOMERS)}"
    names = [each["name"] for each in rows["people"] if each["name"] != ticket["assignee"]]
    assignee = source.choice(names)
    return Plan(
        f"Assign the ticket of {ticket['customer']} to {assignee}.",
        (("tickets", ticket["id"], {"assignee": assignee}),),
        {"customer": ticket["customer"], "assignee": assignee},
    )


def _order(source: random.Random, rows: Rows) -> Plan:
    product, customer = source.choice(rows["products"]), source.choice(CUSTOMERS)
    quantity = source.randrange(1, product["stock"] + 1)
    order = {"customer": customer, "product_id": product["id"], "quantity": quantity, "status": "open"}
    return Plan(
        f"Order {quantity} pieces of the product {product['name']} for the customer {customer}.",
        (("products", product["id"], {"stock": product["stock"] - quantity}), ("orders", None, order)),
        {"product": product["name"], "customer": customer, "quantity": quantity},
    )


def _cancel(source: random.Random, rows: Rows) -> Plan | None:
    customer = source.choice([each["customer"] for each in rows["orders"]])
    mine = [each for each in rows["orders"] if each["customer"] == customer and each["status"] == "open"]
    if len(mine) != 1:
        return None
    product = rows["products"][mine[0]["product_id"] - 1]
    stock = product["stock"] + mine[0]["quantity"]
    return Plan(
        f"Cancel the open order of the customer {customer}.",
        (("orders", mine[0]["id"], {"status": "cancelled"}), ("products", product["id"], {"stock": stock})),
        {"customer": customer},
    )


def _answer(source: random.Random, rows: Rows) -> Plan:
    product, ticket = source.choice(rows["products"]), source.choice(rows["tickets"])
    customer = f"{source.choice(NAMES)} of {source.choice(CUSTOMERS)}"
    ticket |= {"customer": customer, "subject": f"what does the {product['name']} cost?", "status": "open"}
    return Plan(
        f"Reply to the open ticket of {customer}, which asks for a price, with the text 'It costs N coins.' where N is "
        "that price.",
        (("replies", None, {"ticket_id": ticket["id"], "text": f"It costs {product['price']} coins."}),),
        {"customer": customer},
    )


def _restock(source: random.Random, rows: Rows) -> Plan | None:
    category, stock = source.choice(CATEGORIES), source.randrange(120, 1000)
    fitting = [each for each in rows["products"] if each["category"] == category]
    if len(fitting) < 2:
        return None
    product = min(fitting, key=lambda each: int(each["stock"]))
    return Plan(
        f"Set the stock of one product to {stock}: the one of the category {category} of which least is in stock.",
        (("products", product["id"], {"stock": stock}),),
        {"category": category, "stock": stock},
    )


def _triage(source: random.Random, rows: Rows) -> Plan | None:
    customer = source.choice([each["customer"] for each in rows["tickets"]])
    assignee = source.choice([each["name"] for each in rows["people"]])
    mine = [each for each in rows["tickets"] if each["customer"] == customer and each["status"] == "open"]
    if not 1 < len(mine) < 5:
        return None
    return Plan(
        f"Give every open ticket of the customer {customer} the priority high and assign it to {assignee}.",
        tuple(("tickets", each["id"], {"priority": "high", "assignee": assignee}) for each in mine),
        {"customer": customer, "assignee": assignee},
    )


def _refund(source: random.Random, rows: Rows) -> Plan | None:
    orders = [each for each in rows["orders"] if each["status"] == "open"]
    if not orders:
        return None
    order, ticket = source.choice(orders), source.choice(rows["tickets"])
    customer = f"{source.choice(NAMES)} of {source.choice(CUSTOMERS)}"
    ticket |= {"subject": f"order {order['id']} came broken", "customer": customer, "status": "open"}
    product = rows["products"][order["product_id"] - 1]
    return Plan(
        f"{customer} has an open ticket about a broken order. Cancel the order that it names, reply to the ticket with "
        "the text 'We refund N coins.' where N is the order's quantity times the product's price, and close the "
        "ticket.",
        (
            ("orders", order["id"], {"status": "cancelled"}),
            ("products", product["id"], {"stock": product["stock"] + order["quantity"]}),
            (
                "replies",
                None,
                {"ticket_id": ticket["id"], "text": f"We refund {order['quantity'] * product['price']} coins."},
            ),
            ("tickets", ticket["id"], {"status": "closed"}),
        ),
        {"customer": customer},
    )


def _rota(source: random.Random, rows: Rows) -> Plan | None:
    ticket, team = source.choice(rows["tickets"]), source.choice(TEAMS)
    customer = f"{source.choice(NAMES)} of {source.choice(CUSTOMERS)}"
    ticket |= {"customer": customer, "status": "open"}
    counts = {each["name"]: 0 for each in rows["people"] if each["team"] == team}
    for each in rows["tickets"]:
        if each["status"] == "open" and each["assignee"] in counts and each is not ticket:
            counts[each["assignee"]] += 1
    ranked = sorted(counts.items(), key=lambda each: each[1])
    if len(ranked) < 2 or ranked[0][1] == ranked[1][1] or ticket["assignee"] in counts:
        return None
    return Plan(
        f"Assign the open ticket of {customer} to the person of the team {team} who has the fewest open tickets.",
        (("tickets", ticket["id"], {"assignee": ranked[0][0]}),),
        {"customer": customer, "team": team},
    )


def _clear(source: random.Random, rows: Rows) -> Plan | None:
    category, bound = source.choice(CATEGORIES), source.randrange(10, 40)
    low = [each for each in rows["products"] if each["category"] == category and each["stock"] < bound]
    if not 1 < len(low) < 5:
        return None
    return Plan(
        f"Of the category {category}, no product of which fewer than {bound} are in stock may be shown in the shop.",
        tuple(("products", each["id"], {"shown": 0}) for each in low),
        {"category": category, "bound": bound},
    )


KINDS = (
    Kind("reprice", 1, _reprice),
    Kind("hide", 1, _hide),
    Kind("move", 1, _move),
    Kind("assign", 1, _assign),
    Kind("order", 2, _order),
    Kind("cancel", 2, _cancel),
    Kind("answer", 2, _answer),
    Kind("restock", 2, _restock),
    Kind("triage", 3, _triage),
    Kind("refund", 3, _refund),
    Kind("rota", 3, _rota),
    Kind("clear", 3, _clear),
)


def problem(kinds: Sequence[Kind], split: Split, index: int) -> Problem:
    """The task of this split and index; kinds take turns."""
    return draw_problem("office", lambda source, level: make_rows(source, SIZES[level]), kinds, split, index)


def password_of(split: Split, index: int) -> str:
    """The password of a task's office."""
    return f"{random.Random(f'office password|{split}|{index}').randrange(16**6):06x}"
