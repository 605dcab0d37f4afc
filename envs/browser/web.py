"""What a browser asks a site and what the site answers, as plain values. Opens no socket, knows no browser.

A page's requests are handed to its episode's site in this process and answered there, so a site is a function from
requests to responses with state of its own, and no other site, port or file is to be had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from typing import Protocol
from urllib.parse import parse_qsl, urlsplit

MAX_BODY = 64 << 10


@dataclass(frozen=True, slots=True)
class Request:
    """One request. target: the path with its query. headers: by lower-case name."""

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""

    @property
    def path(self) -> str:
        """The path alone."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        """The query's fields; of several with one name the last."""
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    @property
    def form(self) -> dict[str, str]:
        """The fields of a sent form; of several with one name the last."""
        return dict(parse_qsl(self.body, keep_blank_values=True))

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies that came along; none where they cannot be read."""
        try:
            return {name: morsel.value for name, morsel in SimpleCookie(self.headers.get("cookie", "")).items()}
        except CookieError:
            return {}


@dataclass(frozen=True, slots=True)
class Response:
    """One answer."""

    body: bytes = b""
    status: int = HTTPStatus.OK
    kind: str = "text/html; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


def redirect(target: str, **headers: str) -> Response:
    """Go there, with GET."""
    return Response(status=HTTPStatus.SEE_OTHER, headers={"Location": target, **headers})


class Site(Protocol):
    """A site of one episode. origin: scheme and host, to which all its pages belong."""

    origin: str

    def answer(self, request: Request) -> Response:
        """Answer one request, whatever it is; at once, since it runs on the event loop."""


class EmptySite:
    """Answers everything with an empty document."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def answer(self, request: Request) -> Response:
        """Nothing."""
        return Response()
