"""The office's HTML: a frame around every page, tables, forms and their fields. Everything shown is escaped here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from urllib.parse import urlencode

from envs.rows import Row

PAGE_SIZE = 8

SECTIONS = (
    ("/", "Home"),
    ("/products", "Products"),
    ("/orders", "Orders"),
    ("/tickets", "Tickets"),
    ("/people", "People"),
)


class Html(str):
    """A piece of HTML, which is not escaped again."""

    __slots__ = ()


def text(value: object) -> Html:
    """Any value as HTML."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def joined(parts: Iterable[object]) -> Html:
    """Pieces one after the other."""
    return Html("".join(text(part) for part in parts))


def link(target: str, shown: object) -> Html:
    """A link."""
    return Html(f'<a href="{escape(target)}">{text(shown)}</a>')


def heading(shown: object) -> Html:
    """The page's heading."""
    return Html(f"<h1>{text(shown)}</h1>")


def line(*parts: object) -> Html:
    """A paragraph."""
    return Html(f"<p>{joined(parts)}</p>")


def table(names: Sequence[str], rows: Iterable[Sequence[object]], name: str = "rows") -> Html:
    """A table; `name` is its id."""
    head = "".join(f"<th>{escape(each)}</th>" for each in names)
    return Html(f'<table><thead><tr>{head}</tr></thead><tbody id="{name}">{table_rows(rows)}</tbody></table>')


def table_rows(rows: Iterable[Sequence[object]]) -> Html:
    """The rows of a table."""
    return Html("".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows))


def _page_of(query: Mapping[str, str], total: int) -> tuple[int, int]:
    last = max(1, -(-total // PAGE_SIZE))
    given = query.get("page", "1")
    return (min(max(int(given), 1), last) if given.isascii() and given.isdecimal() and len(given) < 7 else 1), last


def _pager(path: str, query: Mapping[str, str], page: int, last: int) -> Html:
    def to(number: int, shown: str) -> Html:
        return link(f"{path}?{urlencode({**query, 'page': number})}", shown)

    parts: list[object] = [f"Page {page} of {last} "]
    parts += [to(page - 1, "Previous page"), " "] if page > 1 else []
    parts += [to(page + 1, "Next page")] if page < last else []
    return line(*parts)


def paged(
    path: str,
    query: Mapping[str, str],
    names: Sequence[str],
    rows: Sequence[Row],
    shown: Callable[[Row], Sequence[object]],
) -> Html:
    """A list in pages of PAGE_SIZE; the query says which one."""
    page, last = _page_of(query, len(rows))
    part = rows[(page - 1) * PAGE_SIZE : page * PAGE_SIZE]
    return joined([table(names, map(shown, part)), _pager(path, query, page, last)])


def form(target: str, button: str, *fields: object, method: str = "post") -> Html:
    """A form with its button."""
    return Html(
        f'<form action="{escape(target)}" method="{method}">{joined(fields)}'
        f'<button type="submit">{escape(button)}</button></form>'
    )


def field(name: str, label: str, value: object = "", kind: str = "text") -> Html:
    """A field of one line."""
    return Html(
        f'<p><label for="{name}">{escape(label)}</label> '
        f'<input id="{name}" name="{name}" type="{kind}" value="{escape(str(value))}" autocomplete="off"></p>'
    )


def area(name: str, label: str) -> Html:
    """A field of several lines."""
    return Html(f'<p><label for="{name}">{escape(label)}</label> <textarea id="{name}" name="{name}"></textarea></p>')


def hidden(name: str, value: object) -> Html:
    """A field that nobody sees."""
    return Html(f'<input type="hidden" name="{name}" value="{escape(str(value))}">')


def check(name: str, label: str, checked: bool = False) -> Html:
    """A box to tick."""
    state = " checked" if checked else ""
    return Html(
        f'<p><input id="{name}" name="{name}" type="checkbox"{state}> <label for="{name}">{escape(label)}</label></p>'
    )


def choice(name: str, label: str, options: Sequence[str], value: str) -> Html:
    """A selection of one of several."""
    shown = "".join(f"<option{' selected' if each == value else ''}>{escape(each)}</option>" for each in options)
    return Html(
        f'<p><label for="{name}">{escape(label)}</label> <select id="{name}" name="{name}">{shown}</select></p>'
    )


def radios(name: str, label: str, options: Sequence[str], value: str) -> Html:
    """Round buttons, of which one is chosen."""
    shown = "".join(
        f'<input id="{name}-{number}" type="radio" name="{name}" value="{escape(each)}"'
        f'{" checked" if each == value else ""}> <label for="{name}-{number}">{escape(each)}</label> '
        for number, each in enumerate(options)
    )
    return Html(f"<fieldset><legend>{escape(label)}</legend>{shown}</fieldset>")


def whole_page(title: str, body: object, message: str = "", signed_in: bool = True) -> bytes:
    """A page within its frame."""
    sections = joined(joined((link(target, name), " ")) for target, name in SECTIONS) if signed_in else Html("")
    said = Html(f'<p role="status">{escape(message)}</p>') if message else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)} - Office</title></head>'
        f"<body><nav>{sections}</nav><main>{text(said)}{text(body)}</main></body></html>"
    ).encode()
