"""Reference policies of MiniWoB++'s pages, one function a page: they act by what the pages show, as a policy must.

Written from what the pages ask; none of them looks into a page's code or state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from envs.interface import ToolCall
from envs.scripted import Script, ScriptedPolicy

Doing = Generator[ToolCall | str, str, None]
_ELEMENT = re.compile(r'\[(\d+) (\w+) "([^"]*)"(?: = "([^"]*)")?( of [^\]]*)?([^\]]*)\]')


@dataclass(frozen=True, slots=True)
class Seen:
    """An element as it is shown."""

    ref: int
    role: str
    name: str
    value: str
    states: str


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
        found = [Seen(int(ref), role, name, value, states) for ref, role, name, value, _, states in self._found()]
        return [each for each in found if each.role in roles]

    def _found(self) -> list[tuple[str, ...]]:
        return [match.groups(default="") for match in _ELEMENT.finditer(self.page)]

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


SOLVERS: Mapping[str, Callable[[MiniwobReference], Doing]] = {}
