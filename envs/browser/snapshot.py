"""A page as text: from the accessibility tree, as a screen reader would have it. Pure; asks no browser.

One line for each row, item, paragraph or lone text. What can be acted on stands in brackets with its number:
`[7 link "Orders"]`, `[8 textbox "Price" = "12"]`, `[9 checkbox "Visible" checked]`. Numbers count from 1 on every page
shown, in the order of the page, so the same page has the same numbers in every process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_TEXT = 300  # characters of one text or name
MAX_OPTIONS = 40
MAX_DEPTH = 300
PART_CHARS = 4000

FIELDS = frozenset({"ColorWell", "Date", "DateTime", "InputTime", "searchbox", "slider", "spinbutton", "textbox"})
BUTTONS = frozenset({"DisclosureTriangle", "DisclosureTriangleGrouped", "button", "checkbox", "radio", "switch"})
CHOICES = frozenset({"combobox", "menuitem", "menuitemcheckbox", "menuitemradio", "option", "tab", "treeitem"})
CONTROLS = FIELDS | BUTTONS | CHOICES | {"link"}
CELLS = frozenset({"cell", "columnheader", "gridcell", "rowheader"})
OWN_LINES = frozenset({"listitem", "row"})
JOINED = frozenset({"heading", "paragraph", "term", "definition", "caption"})
PICTURES = frozenset({"Canvas", "graphics-symbol", "image", "img"})
UNSEEN = frozenset({"InlineTextBox", "ListMarker", "LineBreak"})
STATES = ("checked", "selected", "expanded", "pressed", "disabled", "readonly", "invalid")


@dataclass(frozen=True, slots=True)
class Element:
    """What a number stands for. node: the browser's id of its node. options: of a selection."""

    node: int
    role: str
    name: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A page at one instant. elements: number -> element. dialogs and the like are the page's business, not its."""

    title: str
    address: str
    lines: tuple[str, ...]
    elements: Mapping[int, Element]

    def parts(self) -> tuple[str, ...]:
        """The text in parts of about PART_CHARS characters, cut between lines."""
        parts: list[list[str]] = [[]]
        length = 0
        for line in self.lines:
            if parts[-1] and length + len(line) + 1 > PART_CHARS:
                parts.append([])
                length = 0
            parts[-1].append(line)
            length += len(line) + 1
        return tuple("\n".join(part) for part in parts)

    def text(self, part: int = 1) -> str:
        """One part, with title and address above it. Raises IndexError for one that there is not."""
        parts = self.parts()
        if not 1 <= part <= len(parts):
            raise IndexError(f"the page has the parts 1 to {len(parts)}")
        head = f"page: {self.title}\naddress: {self.address}"
        more = f"\n(part {part} of {len(parts)}; read the others with read)" if len(parts) > 1 else ""
        return f"{head}\n\n{parts[part - 1]}{more}"


def plain(text: object, limit: int = MAX_TEXT) -> str:
    """Text in one line, without what could steer a terminal, and not too long."""
    beginning = str(text)[: 10 * limit]  # enough of a text of megabytes
    joined = "".join(each if each.isprintable() else "?" for each in " ".join(beginning.split()))
    return joined if len(joined) <= limit else joined[: limit - 1] + "…"


def quoted(text: str) -> str:
    """A name or value in quotes, as JSON has it, so that it is seen where it ends."""
    return json.dumps(text, ensure_ascii=False)


def snapshot(nodes: Sequence[Mapping[str, Any]], title: str, address: str, number_texts: bool = False) -> Snapshot:
    """From what `Accessibility.getFullAXTree` returns.

    number_texts: texts and pictures get numbers too, for pages whose plain elements can be clicked.
    """
    reader = _Reader(nodes, number_texts)
    if nodes:
        reader.walk(nodes[0]["nodeId"], 0)
    reader.flush()
    return Snapshot(plain(title), plain(address), tuple(reader.lines), reader.elements)


class _Reader:
    """Walks the tree once and writes lines."""

    def __init__(self, nodes: Sequence[Mapping[str, Any]], number_texts: bool) -> None:
        self.lines: list[str] = []
        self.elements: dict[int, Element] = {}
        self._nodes = {node["nodeId"]: node for node in nodes}
        self._number_texts = number_texts
        self._cells: list[list[str]] | None = None  # of the line that is being written
        self._prefix = ""
        self._in_label = 0

    def walk(self, node_id: str, depth: int) -> None:
        """Write a node and what is below it."""
        node = self._nodes.get(node_id)
        if node is None or depth > MAX_DEPTH:
            return
        role = _value(node.get("role"))
        if node.get("ignored"):
            self._children(node, depth)
        elif role in CONTROLS:
            self._control(node, role)
            if role == "treeitem":
                self._children(node, depth)
        elif role == "StaticText":
            self._text(node, "text")
        elif role in PICTURES:
            self._picture(node)
        elif role not in UNSEEN:
            self._container(node, role, depth)

    def _container(self, node: Mapping[str, Any], role: str, depth: int) -> None:
        """Write what is below a node that only holds others, on lines as befits it."""
        own_line = role in OWN_LINES or (role in JOINED and self._cells is None)
        if own_line:
            self.flush()
            self._cells, self._prefix = [[]], "# " if role == "heading" else ""
        elif role in CELLS and self._cells is not None and self._cells[-1]:
            self._cells.append([])
        self._in_label += role == "LabelText"
        self._children(node, depth)
        self._in_label -= role == "LabelText"
        if own_line:
            self.flush()

    def flush(self) -> None:
        """End the line that is being written."""
        cells, self._cells = self._cells, None
        prefix, self._prefix = self._prefix, ""
        text = " | ".join(" ".join(cell) for cell in cells or [] if cell)
        if text:
            self.lines.append(prefix + text)

    def _children(self, node: Mapping[str, Any], depth: int) -> None:
        for child in node.get("childIds", ()):
            self.walk(child, depth + 1)

    def _write(self, text: str) -> None:
        if self._cells is None:
            self.lines.append(text)
        else:
            self._cells[-1].append(text)

    def _numbered(self, node: Mapping[str, Any], role: str, name: str, options: tuple[str, ...] = ()) -> int:
        number = len(self.elements) + 1
        self.elements[number] = Element(node.get("backendDOMNodeId", 0), role, name, options)
        return number

    def _text(self, node: Mapping[str, Any], role: str) -> None:
        name = plain(_value(node.get("name")))
        if not name or (self._in_label and not self._number_texts):
            return  # a label is its control's name
        if self._number_texts:
            self._write(f"[{self._numbered(node, role, name)} {role} {quoted(name)}]")
        else:
            self._write(name)

    def _picture(self, node: Mapping[str, Any]) -> None:
        name = plain(_value(node.get("name")))
        if self._number_texts:
            self._write(f"[{self._numbered(node, 'image', name)} image {quoted(name)}]")
        elif name:
            self._write(f"image {quoted(name)}")

    def _control(self, node: Mapping[str, Any], role: str) -> None:
        name = plain(_value(node.get("name")))
        options = tuple(self._options(node)) if role == "combobox" else ()
        shown = f"{self._numbered(node, role, name, options)} {role} {quoted(name)}"
        value = plain(_value(node.get("value")))
        if role in FIELDS or (role == "combobox" and value):
            shown += f" = {quoted(value)}"
        if options:
            more = ", …" if len(options) > MAX_OPTIONS else ""
            shown += f" of {', '.join(options[:MAX_OPTIONS])}{more}"
        self._write(f"[{shown}{self._states(node)}]")

    def _states(self, node: Mapping[str, Any]) -> str:
        values = {each["name"]: _value(each.get("value")) for each in node.get("properties", ())}
        shown = []
        for state in STATES:
            value = values.get(state)
            if value in (True, "true", "mixed"):
                shown.append(state if value != "mixed" else f"half {state}")
        return "".join(f" {each}" for each in shown)

    def _options(self, node: Mapping[str, Any]) -> list[str]:
        """The names of a selection's options, wherever they are below it."""
        found: list[str] = []
        waiting = list(reversed(node.get("childIds", ())))
        while waiting:
            child = self._nodes.get(waiting.pop())
            if child is None:
                continue
            if _value(child.get("role")) in ("option", "MenuListOption", "menuitem"):
                found.append(plain(_value(child.get("name"))))
            else:
                waiting += reversed(child.get("childIds", ()))
        return found


def _value(holder: Any) -> Any:
    value = holder.get("value", "") if holder else ""
    return "" if value is None else value
