"""Reference policies of MiniWoB++'s pages, one function a page: they act by what the pages show, as a policy must.

Written from what the pages ask; none of them looks into a page's code or state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from envs.interface import ToolCall
from envs.scripted import Script, ScriptedPolicy

Doing = Generator[ToolCall | str, str, None]
_QUOTED = r'"\s*(.+?)\s*"'  # the word may stand on its own between the quotes
_STRING = r'"(?:[^"\\]|\\.)*"'
_ELEMENT = re.compile(rf"\[(\d+) (\w+) ({_STRING})(?: = {_STRING})?")


@dataclass(frozen=True, slots=True)
class Seen:
    """An element as it is shown."""

    ref: int
    role: str
    name: str


class MiniwobReference(ScriptedPolicy):
    """Solves one page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self._solver = SOLVERS[page]
        self.page = ""

    def script(self, prompt: str) -> Script[str]:
        """Do it; a page that is not over by then was not solved."""
        self.page = prompt[prompt.index("\npage: ") :]
        yield from self._solver(self)
        return "done"

    def all(self, *roles: str) -> list[Seen]:
        """The elements of these roles, in their order."""
        found = [Seen(int(ref), role, json.loads(name)) for ref, role, name in _ELEMENT.findall(self.page)]
        return [each for each in found if each.role in roles]

    @property
    def query(self) -> str:
        """All texts of the page in their order, with the question first."""
        return " ".join(each.name for each in self.all("text"))

    def asked(self, pattern: str) -> tuple[str, ...]:
        """The groups of a pattern in the question."""
        found = re.search(pattern, self.query)
        if found is None:
            raise LookupError(f"nothing like {pattern!r} is asked in {self.query!r}")
        return found.groups()

    def one(self, name: str, *roles: str) -> Seen:
        """The last element of this name: the question, which may hold the name as well, comes first."""
        found = [each for each in self.all(*roles) if each.name == name]
        if not found:
            raise LookupError(f"there is no {' or '.join(roles)} {name!r}:\n{self.page}")
        return found[-1]

    def call(self, name: str, **arguments: Any) -> Doing:
        """One call."""
        self.page = yield ToolCall(name, arguments)

    def click(self, name: str, *roles: str) -> Doing:
        """Click the element of this name."""
        yield from self.call("click", ref=self.one(name, *roles).ref)

    def type_all(self, *texts: str) -> Doing:
        """Type into the fields in their order."""
        for place, text in enumerate(texts):
            fields = self.all("textbox", "searchbox", "spinbutton", "Date", "InputTime")
            yield from self.call("type", ref=fields[place].ref, text=text)


def _submit(policy: MiniwobReference, name: str = "Submit") -> Doing:
    yield from policy.click(name, "button", "text")


def _click_button(policy: MiniwobReference) -> Doing:
    (name,) = policy.asked(rf"Click on the {_QUOTED} button")
    yield from policy.click(name, "button")


def _click_sequence(policy: MiniwobReference) -> Doing:
    yield from policy.click("ONE", "button")
    yield from policy.click("TWO", "button")


def _choose(*roles: str) -> Callable[[MiniwobReference], Doing]:
    """Pages that ask to select some of several and to submit."""

    def solve(policy: MiniwobReference) -> Doing:
        (names,) = policy.asked(r"Select (.+?) and click Submit")
        for name in [] if names == "nothing" else names.split(", "):
            yield from policy.click(name, *roles)
        yield from _submit(policy)

    return solve


def _choose_list(policy: MiniwobReference) -> Doing:
    (name,) = policy.asked(r"Select (.+?) from the list")
    yield from policy.call("select", ref=policy.all("combobox")[0].ref, option=name)
    yield from _submit(policy)


def _link_behind_tabs(policy: MiniwobReference) -> Doing:
    """Look behind each tab, and click the word wherever it stands alone: what is no link does nothing."""
    (word,) = policy.asked(rf"the link {_QUOTED}")
    tabs = [each.name for each in policy.all("tab")]
    for name in ["", *tabs]:
        if name:
            yield from policy.click(name, "tab")
        for element in policy.all("text", "link"):
            if element.name == word:
                yield from policy.call("click", ref=element.ref)


def _enter(pattern: str, change: Callable[..., list[str]]) -> Callable[[MiniwobReference], Doing]:
    """Pages that ask for texts in their fields; `change` makes them of what the question says."""

    def solve(policy: MiniwobReference) -> Doing:
        yield from policy.type_all(*change(*policy.asked(pattern)))
        yield from _submit(policy, policy.all("button")[-1].name)

    return solve


def _cased(text: str, case: str) -> list[str]:
    return [text.upper() if case == "upper" else text.lower()]


def _date(month: str, day: str, year: str) -> list[str]:
    return [f"{year}-{month}-{day}"]


def _time(hour: str, minute: str, half: str) -> list[str]:
    return [f"{int(hour) % 12 + 12 * (half == 'PM'):02}:{minute}"]


def _calculated(first: str, sign: str, second: str) -> list[str]:
    a, b = int(first), int(second)
    return [str({"+": a + b, "-": a - b, "x": a * b}[sign])]


def _solved(first: str, sign: str, second: str, result: str) -> list[str]:
    """x of `x + 3 = 5` or `3 - x = 5`."""
    known, total = int(second if first == "x" else first), int(result)
    if sign == "+":
        return [str(total - known)]
    return [str(total + known if first == "x" else known - total)]


def _find_word(policy: MiniwobReference) -> Doing:
    (place,) = policy.asked(r"(\d+)(?:st|nd|rd|th) word")
    paragraph = policy.all("text")[-1].name
    yield from policy.type_all(re.sub(r"[^a-zA-Z]", "", paragraph.split()[int(place) - 1]))
    yield from _submit(policy)


def _table(policy: MiniwobReference) -> dict[str, str]:
    """Names and values of a table with two columns."""
    rows = re.findall(r'\[\d+ text "([^"]*)"\] \| \[\d+ text "([^"]*)"\]', policy.page)
    return dict(rows)


def _read_table(policy: MiniwobReference) -> Doing:
    (name,) = policy.asked(r"the value of (.+?) into")
    yield from policy.type_all(_table(policy)[name])
    yield from _submit(policy)


def _read_table_2(policy: MiniwobReference) -> Doing:
    labels = [each.name for each in policy.all("text") if each.name.endswith(":")]
    yield from policy.type_all(*(_table(policy)[label.rstrip(":")] for label in labels))
    yield from _submit(policy)


def _odd_or_even(policy: MiniwobReference) -> Doing:
    numbers = [int(each.name) for each in policy.all("text") if re.fullmatch(r"-?\d+", each.name)]
    for place, number in enumerate(numbers):
        buttons = policy.all("button")
        yield from policy.call("click", ref=buttons[2 * place + (number % 2 == 0)].ref)
    yield from _submit(policy)


def _autocomplete(policy: MiniwobReference) -> Doing:
    (start,) = policy.asked(rf"starts with {_QUOTED}")
    end = re.search(rf"ends with {_QUOTED}", policy.query)
    yield from policy.type_all(start)
    found = [each.name for each in policy.all("menuitem", "option", "text") if each.name.startswith(start)]
    fitting = [name for name in found if end is None or name.endswith(end[1])]
    yield from policy.type_all(fitting[-1])
    yield from policy.call("press", key="Escape")
    yield from _submit(policy)


def _spinner(policy: MiniwobReference) -> Doing:
    (number,) = policy.asked(r"Select (-?\d+) with the spinner")
    yield from policy.call("click", ref=policy.all("spinbutton", "textbox")[0].ref)
    for _ in range(abs(int(number))):
        yield from policy.call("press", key="ArrowUp" if int(number) > 0 else "ArrowDown")
    yield from _submit(policy)


def _multi_orderings(policy: MiniwobReference) -> Doing:
    genre, director, year = policy.asked(r"Search for (.+?) movies directed by (.+?) from year (\d+)")
    wanted = {"Genre": genre, "Director": director, "Year": year}
    labels = [each.name for each in policy.all("text") if each.name in wanted]
    yield from policy.type_all(*(wanted[label] for label in labels))
    yield from _submit(policy)


def _phone_book(policy: MiniwobReference) -> Doing:
    person, what = policy.asked(r"Find (\w+) in the contact book and click on their (\w+)")
    while not any(each.name == person for each in policy.all("text")):
        yield from policy.click(">", "link", "text")
    names = [each.name for each in policy.all("text", "link")]
    yield from policy.click(names[names.index(f"{what.capitalize()}:") + 1], "text", "link")


SOLVERS: Mapping[str, Callable[[MiniwobReference], Doing]] = {
    "choose-list": _choose_list,
    "click-button": _click_button,
    "click-button-sequence": _click_sequence,
    "click-checkboxes": _choose("checkbox"),
    "click-checkboxes-large": _choose("checkbox"),
    "click-checkboxes-transfer": _choose("checkbox"),
    "click-collapsible-2": _link_behind_tabs,
    "click-collapsible-2-nodelay": _link_behind_tabs,
    "click-link": _link_behind_tabs,
    "click-option": _choose("radio"),
    "click-tab-2": _link_behind_tabs,
    "click-tab-2-easy": _link_behind_tabs,
    "click-tab-2-hard": _link_behind_tabs,
    "click-tab-2-medium": _link_behind_tabs,
    "enter-date": _enter(r"Enter (\d+)/(\d+)/(\d+)", _date),
    "enter-password": _enter(rf"password {_QUOTED}", lambda word: [word, word]),
    "enter-text": _enter(rf"Enter {_QUOTED}", lambda word: [word]),
    "enter-text-2": _enter(rf"Type {_QUOTED} in all (upper|lower)", _cased),
    "enter-text-dynamic": _enter(rf"Enter {_QUOTED}", lambda word: [word]),
    "enter-time": _enter(r"Enter (\d+):(\d+)\s(AM|PM)", _time),
    "find-word": _find_word,
    "login-user": _enter(rf"username {_QUOTED} and the password {_QUOTED}", lambda user, word: [user, word]),
    "multi-orderings": _multi_orderings,
    "odd-or-even": _odd_or_even,
    "phone-book": _phone_book,
    "read-table": _read_table,
    "read-table-2": _read_table_2,
    "simple-algebra": _enter(r"(x|\d) ([-+]) (x|\d) = (\d+)", _solved),
    "simple-arithmetic": _enter(r"(\d) ([-+x]) (\d) =", _calculated),
    "unicode-test": _click_button,
    "use-autocomplete-nodelay": _autocomplete,
    "use-spinner": _spinner,
}
