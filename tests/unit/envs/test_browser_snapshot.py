"""The accessibility tree as text: what a policy sees of a page, and which numbers stand for what."""

from __future__ import annotations

from typing import Any

import pytest

from envs.browser.snapshot import PART_CHARS, Snapshot, plain, snapshot


class Tree:
    """Builds what `Accessibility.getFullAXTree` returns."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []

    def add(self, role: str, *children: str, name: str = "", ignored: bool = False, **more: Any) -> str:
        number = str(len(self.nodes))
        properties = [{"name": key, "value": {"value": value}} for key, value in more.items() if key != "value"]
        node = {
            "nodeId": number,
            "role": {"value": role},
            "name": {"value": name},
            "childIds": list(children),
            "ignored": ignored,
            "backendDOMNodeId": 100 + len(self.nodes),
            "properties": properties,
        }
        if "value" in more:
            node["value"] = {"value": more["value"]}
        self.nodes.append(node)
        return number

    def text(self, said: str) -> str:
        return self.add("StaticText", self.add("InlineTextBox", name=said), name=said)

    def shown(self, *children: str, number_texts: bool = False) -> Snapshot:
        self.add("RootWebArea", *children)
        return snapshot([self.nodes[-1], *self.nodes[:-1]], "Title", "/path", number_texts)


def test_a_page_is_lines_with_numbered_controls() -> None:
    tree = Tree()
    link = tree.add("link", tree.text("Orders"), name="Orders")
    heading = tree.add("heading", tree.text("Order 3"), name="Order 3")
    paragraph = tree.add("paragraph", tree.text("Product:"), tree.add("link", name="Oslo mug"))
    price = tree.add("textbox", name="Price", value="12")
    box = tree.add("checkbox", name="Shown", checked="true")
    options = [tree.add("option", name=each) for each in ("open", "closed")]
    status = tree.add("combobox", tree.add("MenuListPopup", *options), name="Status", value="open", expanded=False)
    button = tree.add("button", name="Save", disabled=True)
    page = tree.shown(link, tree.add("generic", heading, paragraph, ignored=True), price, box, status, button)
    assert page.lines == (
        '[1 link "Orders"]',
        "# Order 3",
        'Product: [2 link "Oslo mug"]',
        '[3 textbox "Price" = "12"]',
        '[4 checkbox "Shown" checked]',
        '[5 combobox "Status" = "open" of open, closed]',
        '[6 button "Save" disabled]',
    )
    assert (page.elements[5].role, page.elements[5].options) == ("combobox", ("open", "closed"))
    assert page.elements[1].node == 102
    assert page.text() == "page: Title\naddress: /path\n\n" + "\n".join(page.lines)


def test_a_row_is_one_line_and_a_label_is_its_control_s_name() -> None:
    tree = Tree()
    cells = [tree.add("cell", tree.text(each)) for each in ("3", "open")]
    linked = tree.add("cell", tree.add("link", name="Oslo mug"))
    label = tree.add("LabelText", tree.text("Name"))
    page = tree.shown(
        tree.add("table", tree.add("row", cells[0], linked, cells[1])), label, tree.add("textbox", name="Name")
    )
    assert page.lines == ('3 | [1 link "Oslo mug"] | open', '[2 textbox "Name" = ""]')


def test_texts_and_pictures_have_numbers_where_they_can_be_clicked() -> None:
    tree = Tree()
    page = tree.shown(
        tree.text("a b"), tree.add("image", name=""), tree.add("LabelText", tree.text("c")), number_texts=True
    )
    assert page.lines == ('[1 text "a b"]', '[2 image ""]', '[3 text "c"]')


def test_the_same_tree_has_the_same_numbers_whatever_the_browser_calls_its_nodes() -> None:
    def page(first: int) -> Snapshot:
        tree = Tree()
        shown = tree.shown(tree.add("link", name="a"), tree.add("button", name="b"))
        for node in tree.nodes:
            node["backendDOMNodeId"] += first
        return shown

    assert page(1).text() == page(5000).text()


def test_what_a_page_says_cannot_steer_a_terminal_or_fill_a_context() -> None:
    assert plain("a\x1b[31m\n\tb") == "a?[31m b"
    assert plain("x" * 1000) == "x" * 299 + "…"
    tree = Tree()
    page = tree.shown(*(tree.text(f"{number} {'y' * 90}") for number in range(200)))
    parts = page.parts()
    assert len(parts) == 5
    assert all(len(part) <= PART_CHARS for part in parts)
    assert "\n".join(parts) == "\n".join(page.lines)
    assert "(part 5 of 5; read the others with read)" in page.text(5)
    for part in (0, 6):
        with pytest.raises(IndexError, match="parts 1 to 5"):
            page.text(part)


def test_a_deep_tree_is_cut_and_an_empty_one_is_empty() -> None:
    tree = Tree()
    below = tree.text("deep")
    for _ in range(5000):
        below = tree.add("generic", below)
    assert tree.shown(below).lines == ()
    assert snapshot([], "", "/").text() == "page: \naddress: /\n\n"
