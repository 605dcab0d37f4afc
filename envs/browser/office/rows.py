"""Random rows of an office before anything is asked of it: consistent, seeded by the caller. Knows no task."""

from __future__ import annotations

import random

from envs.rows import Rows

NAMES = (
    "Alba", "Bruno", "Carla", "Dario", "Elena", "Fabio", "Greta", "Henri", "Irene", "Jonas", "Karin", "Lukas",
    "Marta", "Nadia", "Oscar", "Paula",
)  # fmt: skip
TEAMS = ("sales", "stores", "support", "transport")
CUSTOMERS = tuple(
    f"{first} {second}"
    for first in ("Arden", "Brook", "Cliff", "Dale", "Field", "Glen", "Heath", "Lake", "Marsh", "Ridge")
    for second in ("Clinic", "College", "Garage", "Inn", "Library", "Mill")
)
CATEGORIES = ("bags", "clocks", "mugs", "rugs")
PLACES = ("Bergen", "Cadiz", "Delft", "Essen", "Fermo", "Genoa", "Halle", "Izmir", "Jena", "Kotor")
SUBJECTS = ("broken on arrival", "wrong size", "no invoice", "late parcel", "colour differs", "part is missing")
ORDER_STATES = ("open", "shipped", "cancelled")
TICKET_STATES = ("open", "waiting", "closed")
PRIORITIES = ("low", "normal", "high")
SIZES = {1: 10, 2: 18, 3: 28}  # rows of a table, by level


def make_rows(source: random.Random, size: int) -> Rows:
    """Random but consistent rows: names, prices and stocks of products are unique, and so are people's names."""
    names = source.sample([f"{place} {category[:-1]}" for place in PLACES for category in CATEGORIES], size)
    prices, stocks = source.sample(range(12, 300), size), source.sample(range(1, 120), size)
    products = [
        {
            "id": number,
            "name": name,
            "category": f"{name.split()[1]}s",
            "price": price,
            "stock": stock,
            "shown": 1,
        }
        for number, (name, price, stock) in enumerate(zip(names, prices, stocks, strict=True), 1)
    ]
    customers, people = source.sample(CUSTOMERS, 9), source.sample(NAMES, 8)
    orders = [
        {
            "id": number,
            "customer": source.choice(customers),
            "product_id": source.randrange(1, size + 1),
            "quantity": source.randrange(1, 9),
            "status": source.choice(ORDER_STATES),
        }
        for number in range(1, size + 1)
    ]
    tickets = [
        {
            "id": number,
            "subject": source.choice(SUBJECTS),
            "customer": source.choice(customers),
            "status": source.choice(TICKET_STATES),
            "priority": source.choice(PRIORITIES[:2]),
            "assignee": source.choice(people),
        }
        for number in range(1, size + 1)
    ]
    staff = [
        {"id": number, "name": name, "team": source.choice(TEAMS), "phone": str(source.randrange(100, 1000))}
        for number, name in enumerate(people, 1)
    ]
    return {"products": products, "orders": orders, "tickets": tickets, "replies": [], "people": staff}
