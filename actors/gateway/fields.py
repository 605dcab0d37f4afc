"""Reads the JSON object of a request field by field; each mistake is an ApiError that names the field's path.

Owns the rule that nothing is ignored silently: `finish` refuses what nobody has asked for. Knows no dialect.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from actors.gateway.errors import ApiError, bad_value, not_honoured


class Fields:
    """One JSON object, read once. A field that is null counts as absent, as OpenAI's clients mean it."""

    def __init__(self, value: object, path: str = "") -> None:
        """Raises ApiError where the value is no JSON object."""
        if not isinstance(value, dict):
            raise bad_value(path or "the request's body", value, "a JSON object")
        self._values: Mapping[str, Any] = value
        self._path = path
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        """Where a field stands in the request."""
        return f"{self._path}.{name}" if self._path else name

    def raw(self, name: str) -> Any:
        """A field's value as it is, None where it is absent."""
        self._read.add(name)
        return self._values.get(name)

    def string(self, name: str, default: str | None = None) -> str:
        """A text; without a default it must be there."""
        value = self.raw(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def integer(self, name: str, least: int, most: int) -> int | None:
        """A whole number within bounds, None where it is absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        """A number within bounds, None where it is absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """A truth value; False where it is absent."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def objects(self, name: str) -> Iterator[Fields]:
        """The objects of a list, which is empty where it is absent."""
        value = self.raw(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "a list of objects")
        for number, each in enumerate(value or ()):
            yield Fields(each, f"{self.path(name)}[{number}]")

    def nested(self, name: str) -> Fields | None:
        """An object, None where it is absent."""
        value = self.raw(name)
        return None if value is None else Fields(value, self.path(name))

    def either(self, name: str, allowed: Collection[str], default: str | None = None) -> str:
        """One of several words."""
        value = self.raw(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in allowed:
            raise self.wrong(name, f"one of {', '.join(allowed)}")
        return value

    def labels(self, names: Sequence[str]) -> None:
        """Take fields that only label a request and change nothing in its answer."""
        for name in names:
            self.raw(name)

    def neutral(self, table: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
        """Take fields that are honoured by their neutral values only; the table has those, and a remedy for others."""
        for name, (values, remedy) in table.items():
            value = self.raw(name)
            if value is not None and not any(type(value) is type(each) and value == each for each in values):
                raise not_honoured(self.path(name), value, remedy)

    def finish(self) -> None:
        """Refuse every field that nothing above has read; null is as good as absent."""
        for name, value in self._values.items():
            if value is not None and name not in self._read:
                raise ApiError(
                    400,
                    f"{self.path(name)} is not known here; leave it out",
                    param=self.path(name),
                    code="unknown_parameter",
                )

    def wrong(self, name: str, allowed: str) -> ApiError:
        """The error for a field's value."""
        return bad_value(self.path(name), self.raw(name), allowed)


def text_of(fields: Fields, name: str, kinds: Collection[str], default: str | None = None) -> str:
    """A text, or a list of text parts, each of one of the `kinds`, joined."""
    value = fields.raw(name)
    if value is None and default is not None:
        return default
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise fields.wrong(name, "a string or a list of text parts")
    return "".join(_text_part(each, kinds) for each in fields.objects(name))


def _text_part(part: Fields, kinds: Collection[str]) -> str:
    kind = part.raw("type")
    if kind not in kinds:
        raise not_honoured(
            part.path("type"), kind, f"the policy reads text only; send parts of type {', '.join(kinds)}"
        )
    text = part.string("text")
    part.labels(("annotations", "logprobs"))  # a reply's own parts, sent back
    part.finish()
    return text
