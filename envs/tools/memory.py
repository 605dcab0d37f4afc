"""A memory of bounded size as tools: write, search, list, delete. Outlives a cleared context, never an episode.

An environment gives its episode a `memory` and its ToolSet these functions (`MEMORY_TOOLS`).
"""

from __future__ import annotations

import re
from typing import Annotated, Protocol

from envs.tools.typed import ToolError

MAX_KEY, MAX_TEXT, MAX_FOUND = 40, 200, 5


class Memory:
    """Texts under keys. capacity: characters of all keys and texts together."""

    def __init__(self, capacity: int) -> None:
        if capacity < MAX_KEY + MAX_TEXT:
            raise ValueError(f"a memory's capacity is {capacity}; it must be {MAX_KEY + MAX_TEXT} or more characters")
        self._capacity = capacity
        self._entries: dict[str, str] = {}

    def write(self, key: str, text: str) -> str:
        """Store or replace. Raises ToolError where it does not fit."""
        if not 0 < len(key) <= MAX_KEY or not 0 < len(text) <= MAX_TEXT or not (key + text).isprintable():
            raise ToolError(
                f"a key has 1 to {MAX_KEY} characters and a text 1 to {MAX_TEXT}, all printable, in one line"
            )
        left = self._capacity - sum(len(each) + len(self._entries[each]) for each in self._entries if each != key)
        if len(key) + len(text) > left:
            raise ToolError(f"the memory is full: {left} characters are left for key and text; delete something")
        self._entries[key] = text
        return f"stored; {left - len(key) - len(text)} characters are left"

    @property
    def entries(self) -> dict[str, str]:
        """Texts by key, in the order in which the keys came."""
        return dict(self._entries)

    def search(self, query: str) -> str:
        """The entries that share most words with the query, best first."""
        wanted = _words(query)
        scored = [(len(wanted & _words(f"{key} {text}")), key) for key, text in self._entries.items()]
        found = sorted((-score, key) for score, key in scored if score)[:MAX_FOUND]
        return "\n".join(f"{key}: {self._entries[key]}" for _, key in found) or "nothing found"

    def keys(self) -> str:
        """All keys, one a line."""
        return "\n".join(sorted(self._entries)) or "the memory is empty"

    def delete(self, key: str) -> str:
        """Forget one entry. Raises ToolError where there is none."""
        if key not in self._entries:
            raise ToolError(f"there is no key {key[:MAX_KEY]!r}")
        del self._entries[key]
        return "deleted"


class Remembering(Protocol):
    """An episode with a memory."""

    memory: Memory


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def memory_write(
    episode: Remembering, key: Annotated[str, "a short name"], text: Annotated[str, "what to remember, one line"]
) -> str:
    """Store a text under a key; what was stored under this key before is replaced."""
    return episode.memory.write(key, text)


def memory_search(episode: Remembering, query: Annotated[str, "some words"]) -> str:
    """The up to five stored texts that share most words with the query."""
    return episode.memory.search(query)


def memory_list(episode: Remembering) -> str:
    """All keys of the memory."""
    return episode.memory.keys()


def memory_delete(episode: Remembering, key: str) -> str:
    """Forget what is stored under a key."""
    return episode.memory.delete(key)


MEMORY_TOOLS = (memory_write, memory_search, memory_list, memory_delete)
