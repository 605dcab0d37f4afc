"""The office's pages: lists with filters, one page for each thing, forms. Reads the store, changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from envs.browser.office.markup import (
    PAGE_SIZE,
    Html,
    area,
    check,
    choice,
    field,
    form,
    heading,
    hidden,
    joined,
    line,
    link,
    paged,
    radios,
    table,
    table_rows,
)
from envs.browser.office.rows import CATEGORIES, ORDER_STATES, PRIORITIES, TEAMS, TICKET_STATES
from envs.browser.office.store import Store
from envs.rows import Row

ALL = "all"
SORTS = ("number", "name", "price", "stock")

Made = tuple[str, Html]
View = Callable[[Store, Mapping[str, str], int], Made | None]

# The list of tickets grows in the page, without another page being loaded.
_MORE = """<script>
document.getElementById('more').onclick = async () => {
  const rows = document.querySelectorAll('#rows tr');
  const query = new URLSearchParams(location.search);
  query.set('after', rows.length);
  const answer = await fetch('/tickets/more?' + query);
  document.getElementById('rows').insertAdjacentHTML('beforeend', await answer.text());
  if (document.querySelectorAll('#rows tr').length >= TOTAL) document.getElementById('more').remove();
};
</script>"""


def nothing(said: str) -> Html:
    """A page that only says something."""
    return line(said, " ", link("/", "To the first page"))


def login() -> Html:
    """Where one signs in."""
    return joined(
        [
            heading("Sign in"),
            form("/login", "Sign in", field("user", "User"), field("password", "Password", "", "password")),
        ]
    )


def home(store: Store, _query: Mapping[str, str], _number: int) -> Made:
    """The first page."""
    orders = sum(each["status"] == "open" for each in store.all("orders"))
    tickets = sum(each["status"] == "open" for each in store.all("tickets"))
    return "Home", joined([heading("Office"), line(f"{orders} open orders, {tickets} open tickets.")])


def products(store: Store, query: Mapping[str, str], _number: int) -> Made:
    """All products, by name, category and order."""
    name, category, sort = query.get("name", ""), query.get("category", ALL), query.get("sort", SORTS[0])
    found = [
        each
        for each in store.all("products")
        if name.lower() in each["name"].lower() and category in (ALL, each["category"])
    ]
    if sort in SORTS[1:]:
        found.sort(key=lambda each: (each[sort], each["id"]))
    search = form(
        "/products",
        "Find",
        field("name", "Name", name, "search"),
        choice("category", "Category", (ALL, *CATEGORIES), category),
        choice("sort", "Sort by", SORTS, sort),
        method="get",
    )
    names = ("Product", "Category", "Price", "In stock", "In the shop")
    listed = paged(
        "/products",
        query,
        names,
        found,
        lambda each: (
            link(f"/products/{each['id']}", each["name"]),
            each["category"],
            each["price"],
            each["stock"],
            "shown" if each["shown"] else "not shown",
        ),
    )
    return "Products", joined([heading("Products"), search, listed])


def product(store: Store, _query: Mapping[str, str], number: int) -> Made | None:
    """One product, to be changed."""
    row = store.find("products", number)
    if row is None:
        return None
    fields = (
        field("price", "Price", row["price"]),
        field("stock", "In stock", row["stock"]),
        check("shown", "Shown in the shop", bool(row["shown"])),
    )
    return row["name"], joined(
        [
            heading(row["name"]),
            line(f"Category: {row['category']}"),
            form(f"/products/{number}", "Save", *fields),
            line(link(f"/products/{number}/order", "Order this product")),
        ]
    )


def order_product(store: Store, query: Mapping[str, str], number: int) -> Made | None:
    """An order of a product: first who and how many, then whether that is right."""
    row = store.find("products", number)
    if row is None:
        return None
    title = f"Order {row['name']}"
    if "quantity" not in query:
        fields = field("customer", "Customer"), field("quantity", "Quantity")
        return title, joined(
            [
                heading(title),
                line(f"{row['stock']} in stock."),
                form(f"/products/{number}/order", "Continue", *fields, method="get"),
            ]
        )
    customer, quantity = query.get("customer", ""), query["quantity"]
    kept = hidden("product_id", number), hidden("customer", customer), hidden("quantity", quantity)
    return title, joined(
        [
            heading("Is this right?"),
            line(f"{quantity} × {row['name']} for {customer}"),
            form("/orders", "Place the order", *kept),
            line(link(f"/products/{number}/order", "Change it")),
        ]
    )


def orders(store: Store, query: Mapping[str, str], _number: int) -> Made:
    """All orders, by status."""
    status = query.get("status", ALL)
    found = [each for each in store.all("orders") if status in (ALL, each["status"])]
    search = form("/orders", "Find", choice("status", "Status", (ALL, *ORDER_STATES), status), method="get")
    listed = paged(
        "/orders",
        query,
        ("Order", "Customer", "Quantity", "Status"),
        found,
        lambda each: (link(f"/orders/{each['id']}", each["id"]), each["customer"], each["quantity"], each["status"]),
    )
    return "Orders", joined([heading("Orders"), search, listed])


def order(store: Store, _query: Mapping[str, str], number: int) -> Made | None:
    """One order, and what can be done with it."""
    row = store.find("orders", number)
    if row is None:
        return None
    ordered = store.find("products", row["product_id"])
    assert ordered is not None
    parts = [
        heading(f"Order {number}"),
        line(f"Customer: {row['customer']}"),
        line("Product: ", link(f"/products/{ordered['id']}", ordered["name"])),
        line(f"Quantity: {row['quantity']}"),
        line(f"Status: {row['status']}"),
    ]
    if row["status"] == "open":
        parts.append(form(f"/orders/{number}/ship", "Ship"))
        parts.append(line(link(f"/orders/{number}/cancel", "Cancel this order")))
    return f"Order {number}", joined(parts)


def cancel_order(store: Store, _query: Mapping[str, str], number: int) -> Made | None:
    """Whether an order is really to be cancelled."""
    row = store.find("orders", number)
    if row is None:
        return None
    return f"Cancel order {number}", joined(
        [
            heading(f"Cancel order {number}?"),
            line(f"{row['quantity']} pieces for {row['customer']}; they go back into stock."),
            form(f"/orders/{number}/cancel", "Cancel the order", check("sure", "I am sure")),
            line(link(f"/orders/{number}", "Back to the order")),
        ]
    )


def _tickets(store: Store, query: Mapping[str, str]) -> list[Row]:
    return [each for each in store.all("tickets") if query.get("status", ALL) in (ALL, each["status"])]


def _ticket_row(row: Row) -> Sequence[object]:
    shown = link(f"/tickets/{row['id']}", row["subject"])
    return row["id"], shown, row["customer"], row["status"], row["priority"], row["assignee"]


def tickets(store: Store, query: Mapping[str, str], _number: int) -> Made:
    """Tickets, by status; more of them are added to the page."""
    found = _tickets(store, query)
    search = form(
        "/tickets", "Find", choice("status", "Status", (ALL, *TICKET_STATES), query.get("status", ALL)), method="get"
    )
    names = ("Number", "Subject", "Customer", "Status", "Priority", "Assigned to")
    listed = table(names, map(_ticket_row, found[:PAGE_SIZE]))
    more = Html('<button id="more" type="button">Show more</button>' + _MORE.replace("TOTAL", str(len(found))))
    above = [line(more)] if len(found) > PAGE_SIZE else []
    return "Tickets", joined([heading("Tickets"), search, line(f"{len(found)} tickets"), *above, listed])


def more_tickets(store: Store, query: Mapping[str, str]) -> Html:
    """The next rows of the list of tickets."""
    after = query.get("after", "")
    begin = int(after) if after.isascii() and after.isdecimal() and len(after) < 7 else 0
    return table_rows(map(_ticket_row, _tickets(store, query)[begin : begin + PAGE_SIZE]))


def ticket(store: Store, _query: Mapping[str, str], number: int) -> Made | None:
    """One ticket, to be changed and replied to."""
    row = store.find("tickets", number)
    if row is None:
        return None
    names = tuple(each["name"] for each in store.all("people"))
    fields = (
        choice("status", "Status", TICKET_STATES, row["status"]),
        radios("priority", "Priority", PRIORITIES, row["priority"]),
        choice("assignee", "Assigned to", names, row["assignee"]),
    )
    replies = [line("Reply: ", each["text"]) for each in store.all("replies") if each["ticket_id"] == number]
    return f"Ticket {number}", joined(
        [
            heading(f"Ticket {number}: {row['subject']}"),
            line(f"Customer: {row['customer']}"),
            form(f"/tickets/{number}", "Save", *fields),
            *replies,
            form(f"/tickets/{number}/reply", "Send", area("text", "Your reply")),
        ]
    )


def people(store: Store, query: Mapping[str, str], _number: int) -> Made:
    """Everybody, by team."""
    team = query.get("team", ALL)
    found = [each for each in store.all("people") if team in (ALL, each["team"])]
    search = form("/people", "Find", choice("team", "Team", (ALL, *TEAMS), team), method="get")
    listed = paged(
        "/people",
        query,
        ("Name", "Team", "Phone"),
        found,
        lambda each: (link(f"/people/{each['id']}", each["name"]), each["team"], each["phone"]),
    )
    return "People", joined([heading("People"), search, listed])


def person(store: Store, _query: Mapping[str, str], number: int) -> Made | None:
    """One person, to be changed."""
    row = store.find("people", number)
    if row is None:
        return None
    fields = choice("team", "Team", TEAMS, row["team"]), field("phone", "Phone", row["phone"], "tel")
    return row["name"], joined([heading(row["name"]), form(f"/people/{number}", "Save", *fields)])


VIEWS: Mapping[str, View] = {
    "/": home,
    "/products": products,
    "/products/ID": product,
    "/products/ID/order": order_product,
    "/orders": orders,
    "/orders/ID": order,
    "/orders/ID/cancel": cancel_order,
    "/tickets": tickets,
    "/tickets/ID": ticket,
    "/people": people,
    "/people/ID": person,
}
