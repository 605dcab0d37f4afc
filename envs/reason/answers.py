"""Answers of a given type, read from text strictly: one `<answer>...</answer>` that matches its pattern, else None.

Nothing here evaluates what it reads; a number is digits, a list is split at commas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_LENGTH = 400
_TAGGED = re.compile(r"<answer>([^<>]*)</answer>")
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_WORD = re.compile(r"[A-Za-z]{1,60}")


def tagged(text: str | None) -> str | None:
    """What stands in the one pair of tags of a text; None where there is none, or more than one."""
    if text is None or text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    match = _TAGGED.search(text)
    return match[1] if match and len(match[1]) <= MAX_LENGTH else None


def integer(body: str) -> int | None:
    """`-12`; no sign +, no blanks, no decimal point, ASCII digits only."""
    return int(body) if _INTEGER.fullmatch(body) else None


def integers(body: str) -> tuple[int, ...] | None:
    """`3, -1, 4`; blanks around the commas do not matter."""
    parts = [integer(part.strip(" ")) for part in body.split(",")]
    return tuple(part for part in parts if part is not None) if None not in parts else None


def word(body: str) -> str | None:
    """ASCII letters, upper and lower case being different."""
    return body if _WORD.fullmatch(body) else None


def words(body: str) -> tuple[str, ...] | None:
    """`Ada, Ben`; blanks around the commas do not matter."""
    parts = [word(part.strip(" ")) for part in body.split(",")]
    return tuple(part for part in parts if part is not None) if None not in parts else None


PARSERS: Mapping[str, Callable[[str], Any]] = {"integer": integer, "integers": integers, "word": word, "words": words}


def parse(kind: str, text: str | None) -> Any:
    """The answer of this type in the text; None for anything else."""
    body = tagged(text)
    return None if body is None else PARSERS[kind](body)
