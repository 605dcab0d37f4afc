"""The reference policy of the office: solves every task through the tools, from what the pages show.

It finds everything out by looking; of the task it knows the question's facts and nothing of the office.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from typing import Any

from envs.interface import ToolCall
from envs.scripted import Script, ScriptedPolicy

Doing = Generator[ToolCall | str, str, None]
_MORE = "Show more"


class OfficeReference(ScriptedPolicy):
    """Signs in where it must, then does what the kind asks."""

    def __init__(self, kind: str, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self._kind = kind
        self._facts = facts
        self.page = ""

    def script(self, prompt: str) -> Script[str]:
        """Solve the task."""
        self.page = prompt[prompt.index("\npage: ") :]
        if " with the password " in prompt:
            user, password = re.findall(r"Sign in as (\w+) with the password (\w+)", prompt)[0]
            yield from self.type("User", user)
            yield from self.type("Password", password)
            yield from self.click("button", "Sign in")
        yield from SOLUTIONS[self._kind](self, **self._facts)
        return "done"

    def ref(self, role: str, name: str) -> int:
        """The number of the first element of this role and name. Raises LookupError."""
        found = re.search(rf'\[(\d+) {role} "{re.escape(name)}"', self.page)
        if found is None:
            raise LookupError(f"the page has no {role} {name!r}:\n{self.page}")
        return int(found[1])

    def _call(self, name: str, **arguments: Any) -> Doing:
        self.page = yield ToolCall(name, arguments)

    def click(self, role: str, name: str) -> Doing:
        """Click an element."""
        yield from self._call("click", ref=self.ref(role, name))

    def type(self, name: str, text: object, role: str = "textbox") -> Doing:
        """Type into a field."""
        yield from self._call("type", ref=self.ref(role, name), text=str(text))

    def select(self, name: str, option: str) -> Doing:
        """Choose an option."""
        yield from self._call("select", ref=self.ref("combobox", name), option=option)

    def find(self, section: str, **choices: str) -> Doing:
        """Go to a list and filter it."""
        yield from self.click("link", section)
        for label, option in choices.items():
            yield from self.select(label.replace("_", " "), option)
        yield from self.click("button", "Find")

    def rows(self) -> list[list[str]]:
        """The cells of the table that is shown, as text; of a link the words."""
        return self._cells()[1:]

    def _cells(self) -> list[list[str]]:
        bare = re.sub(r'\[\d+ link "([^"]*)"\]', r"\1", self.page)
        return [line.split(" | ") for line in bare.splitlines() if " | " in line]

    def all_rows(self) -> Script[list[list[str]]]:
        """The rows of a list on all its pages; the last is shown afterwards."""
        found = self.rows()
        while '"Next page"' in self.page:
            yield from self.click("link", "Next page")
            found += self.rows()
        return found

    def all_tickets(self) -> Script[list[list[str]]]:
        """The rows of the list of tickets, which grows in its page."""
        while f'button "{_MORE}"' in self.page:
            yield from self.click("button", _MORE)
        rows = self.rows()
        part = 2
        while found := re.search(r"\(part \d+ of (\d+);", self.page):
            if part > int(found[1]):
                break
            yield from self._call("read", part=part)
            rows += self._cells()
            part += 1
        return rows

    def go(self, path: str) -> Doing:
        """Open a path."""
        yield from self._call("open", path=path)


def _product(policy: OfficeReference, name: str) -> Doing:
    yield from policy.click("link", "Products")
    yield from policy.type("Name", name, "searchbox")
    yield from policy.click("button", "Find")
    yield from policy.click("link", name)


def _save_product(
    policy: OfficeReference, price: int | None = None, stock: int | None = None, hide: bool = False
) -> Doing:
    if price is not None:
        yield from policy.type("Price", price)
    if stock is not None:
        yield from policy.type("In stock", stock)
    if hide:
        yield from policy.click("checkbox", "Shown in the shop")
    yield from policy.click("button", "Save")


def _reprice(policy: OfficeReference, product: str, price: int) -> Doing:
    yield from _product(policy, product)
    yield from _save_product(policy, price=price)


def _hide(policy: OfficeReference, product: str, stock: int) -> Doing:
    yield from _product(policy, product)
    yield from _save_product(policy, stock=stock, hide=True)


def _move(policy: OfficeReference, person: str, team: str, phone: str) -> Doing:
    yield from policy.click("link", "People")
    yield from policy.click("link", person)
    yield from policy.select("Team", team)
    yield from policy.type("Phone", phone)
    yield from policy.click("button", "Save")


def _ticket(policy: OfficeReference, customer: str) -> Script[list[str]]:
    """Open the one ticket of a customer; its row."""
    yield from policy.click("link", "Tickets")
    rows = yield from policy.all_tickets()
    (row,) = [each for each in rows if each[2] == customer]
    yield from policy.go(f"/tickets/{row[0]}")
    return row


def _assign(policy: OfficeReference, customer: str, assignee: str) -> Doing:
    yield from _ticket(policy, customer)
    yield from policy.select("Assigned to", assignee)
    yield from policy.click("button", "Save")


def _order(policy: OfficeReference, product: str, customer: str, quantity: int) -> Doing:
    yield from _product(policy, product)
    yield from policy.click("link", "Order this product")
    yield from policy.type("Customer", customer)
    yield from policy.type("Quantity", quantity)
    yield from policy.click("button", "Continue")
    yield from policy.click("button", "Place the order")


def _cancel_shown(policy: OfficeReference) -> Doing:
    yield from policy.click("link", "Cancel this order")
    yield from policy.click("checkbox", "I am sure")
    yield from policy.click("button", "Cancel the order")


def _cancel(policy: OfficeReference, customer: str) -> Doing:
    yield from policy.find("Orders", Status="open")
    rows = yield from policy.all_rows()
    (number,) = [each[0] for each in rows if each[1] == customer]
    yield from policy.go(f"/orders/{number}")
    yield from _cancel_shown(policy)


def _reply(policy: OfficeReference, text: str) -> Doing:
    yield from policy.type("Your reply", text)
    yield from policy.click("button", "Send")


def _value(policy: OfficeReference, field: str) -> int:
    return int(re.findall(rf'"{field}" = "(\d+)"', policy.page)[0])


def _answer(policy: OfficeReference, customer: str) -> Doing:
    row = yield from _ticket(policy, customer)
    yield from _product(policy, re.findall(r"the (.+) cost", row[1])[0])
    price = _value(policy, "Price")
    yield from policy.go(f"/tickets/{row[0]}")
    yield from _reply(policy, f"It costs {price} coins.")


def _restock(policy: OfficeReference, category: str, stock: int) -> Doing:
    yield from policy.find("Products", Category=category, Sort_by="stock")
    yield from policy.click("link", policy.rows()[0][0])
    yield from _save_product(policy, stock=stock)


def _triage(policy: OfficeReference, customer: str, assignee: str) -> Doing:
    yield from policy.find("Tickets", Status="open")
    rows = yield from policy.all_tickets()
    for number in [each[0] for each in rows if each[2] == customer]:
        yield from policy.go(f"/tickets/{number}")
        yield from policy.click("radio", "high")
        yield from policy.select("Assigned to", assignee)
        yield from policy.click("button", "Save")


def _refund(policy: OfficeReference, customer: str) -> Doing:
    row = yield from _ticket(policy, customer)
    yield from policy.go(f"/orders/{row[1].split()[1]}")
    quantity = int(re.findall(r"Quantity: (\d+)", policy.page)[0])
    product = re.findall(r'Product: \[\d+ link "([^"]+)"', policy.page)[0]
    yield from _cancel_shown(policy)
    yield from policy.click("link", product)
    price = _value(policy, "Price")
    yield from policy.go(f"/tickets/{row[0]}")
    yield from _reply(policy, f"We refund {quantity * price} coins.")
    yield from policy.select("Status", "closed")
    yield from policy.click("button", "Save")


def _rota(policy: OfficeReference, customer: str, team: str) -> Doing:
    yield from policy.find("People", Team=team)
    counts = {row[0]: 0 for row in (yield from policy.all_rows())}
    yield from policy.find("Tickets", Status="open")
    rows = yield from policy.all_tickets()
    for row in rows:
        if row[5] in counts:
            counts[row[5]] += 1
    (number,) = [row[0] for row in rows if row[2] == customer]
    yield from policy.go(f"/tickets/{number}")
    yield from policy.select("Assigned to", min(counts, key=lambda name: counts[name]))
    yield from policy.click("button", "Save")


def _clear(policy: OfficeReference, category: str, bound: int) -> Doing:
    yield from policy.find("Products", Category=category, Sort_by="stock")
    rows = yield from policy.all_rows()
    for name in [row[0] for row in rows if int(row[3]) < bound]:
        yield from _product(policy, name)
        yield from _save_product(policy, hide=True)


SOLUTIONS: Mapping[str, Callable[..., Doing]] = {
    "reprice": _reprice,
    "hide": _hide,
    "move": _move,
    "assign": _assign,
    "order": _order,
    "cancel": _cancel,
    "answer": _answer,
    "restock": _restock,
    "triage": _triage,
    "refund": _refund,
    "rota": _rota,
    "clear": _clear,
}
