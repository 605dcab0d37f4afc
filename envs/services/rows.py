"""Random rows for a world before anything is asked of it: consistent, seeded by the caller. Knows no task."""

from __future__ import annotations

import random

from envs.rows import Rows
from envs.services.api import FIRST_HOUR, LAST_HOUR, STATUSES

PEOPLE = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Finn", "Gita", "Hugo", "Ines", "Jon", "Kira", "Liam", "Mona", "Nils")
FIRMS = tuple(
    f"{first} {second}"
    for first in ("Alder", "Birch", "Cedar", "Elm", "Fir", "Hazel", "Larch", "Maple", "Oak", "Pine")
    for second in ("Bakery", "Books", "Dental", "Farm", "Hotel", "Studio")
)
CATEGORIES = ("desk", "lamp", "chair", "shelf")
COLOURS = ("red", "blue", "green", "white", "black", "grey", "brown", "amber", "ivory", "teal")
TITLES = ("budget", "hiring", "launch", "review", "safety", "supply", "travel", "training", "audit", "design")
PROBLEMS = ("late parcel", "wrong colour", "invoice unclear", "missing screws", "login fails", "scratched top")
SIZES = {1: 12, 2: 25, 3: 40}  # rows of each table, by level


def make_rows(source: random.Random, size: int) -> Rows:
    """Random but consistent rows: unique product names and prices, no two events of an owner at once."""
    names = source.sample([(colour, category) for colour in COLOURS for category in CATEGORIES], min(size, 36))
    prices = source.sample(range(20, 400), len(names))
    products = [
        {
            "id": number,
            "name": f"{colour} {category}",
            "category": category,
            "price": price,
            "stock": source.randrange(5, 60),
        }
        for number, ((colour, category), price) in enumerate(zip(names, prices, strict=True), 1)
    ]
    firms, people = source.sample(FIRMS, 8), source.sample(PEOPLE, 6)
    orders = [
        {
            "id": number,
            "customer": source.choice(firms),
            "product_id": source.randrange(1, len(products) + 1),
            "quantity": source.randrange(1, 10),
            "status": source.choice(STATUSES["orders"]),
        }
        for number in range(1, size + 1)
    ]
    slots = [(owner, day, hour) for owner in people for day in range(1, 8) for hour in range(FIRST_HOUR, LAST_HOUR + 1)]
    events = [
        {"id": number, "title": f"{source.choice(TITLES)} {number + 10}", "owner": owner, "day": day, "hour": hour}
        for number, (owner, day, hour) in enumerate(source.sample(slots, size), 1)
    ]
    tickets = [
        {
            "id": number,
            "subject": source.choice(PROBLEMS),
            "customer": source.choice(firms),
            "status": source.choice(STATUSES["tickets"]),
            "priority": source.choice(("low", "normal")),
            "assignee": source.choice(people),
        }
        for number in range(1, size + 1)
    ]
    files = [
        {
            "id": number,
            "path": f"/{source.choice(('drafts', 'notes', 'shared'))}/{source.choice(TITLES)}-{number}.txt",
            "owner": source.choice(people),
            "content": f"{source.choice(TITLES)} {source.randrange(1000)}",
        }
        for number in range(1, size + 1)
    ]
    return {
        "products": products,
        "orders": orders,
        "events": events,
        "tickets": tickets,
        "comments": [],
        "files": files,
    }
