"""Which requests of a page are answered, which refused, and when a page is at rest; without a browser."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from envs.browser.rest import Rest
from envs.browser.traffic import Traffic
from envs.browser.web import Request, Response


class Echo:
    """Says what it was asked; breaks at /broken."""

    origin = "http://echo.test"

    def answer(self, request: Request) -> Response:
        if request.path == "/broken":
            raise KeyError("x")
        return Response(f"{request.method} {request.target} {request.form} {request.cookies}".encode(), 201)


class Answered:
    """The commands that a page's traffic sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.notes: list[str] = []
        self.traffic = Traffic(lambda method, **values: self.sent.append((method, values)), self.notes.append)
        self.traffic.site = Echo()

    def ask(self, url: str, **asked: Any) -> dict[str, Any]:
        """What becomes of a request for a document of the page itself."""
        event = {"requestId": "7", "frameId": "main", "resourceType": "Document"}
        self.traffic.answer({**event, "request": {"method": "GET", "url": url, **asked}}, "main")
        method, values = self.sent[-1]
        assert values.pop("requestId") == "7"
        return {"method": method, **values}


def test_the_own_site_is_asked() -> None:
    found = Answered().ask("http://echo.test/a?b=1", method="POST", postData="c=d+e", headers={"Cookie": "f=g"})
    assert found["method"] == "Fetch.fulfillRequest"
    assert found["responseCode"] == 201
    assert base64.b64decode(found["body"]) == b"POST /a?b=1 {'c': 'd e'} {'f': 'g'}"


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/",
        "https://echo.test/",
        "http://echo.test:8080/",
        "http://echo.test.example/",
        "http://echo.test@example/",
        "http://user@echo.test/",
        "file:///etc/passwd",
        "data:text/html,x",
        "chrome://version",
    ],
)
def test_everything_else_is_refused(url: str) -> None:
    page = Answered()
    assert page.ask(url) == {"method": "Fetch.failRequest", "errorReason": "Aborted"}
    assert page.notes == [f"refused: {url} is not part of this site"]
    event = {"requestId": "8", "frameId": "main", "resourceType": "Image", "request": {"method": "GET", "url": url}}
    page.traffic.answer(event, "main")
    assert page.sent[-1][1]["errorReason"] == "BlockedByClient"


def test_before_there_is_a_site_everything_is_refused() -> None:
    page = Answered()
    page.traffic.site = None
    assert page.ask("http://echo.test/")["method"] == "Fetch.failRequest"


def test_a_body_that_is_too_large_or_not_told_never_reaches_the_site() -> None:
    page = Answered()
    for asked in ({"postData": "x" * 70_000}, {"hasPostData": True}):
        assert page.ask("http://echo.test/broken", method="POST", **asked)["responseCode"] == 413
    assert page.traffic.failure is None


def test_a_site_that_breaks_is_remembered() -> None:
    page = Answered()
    assert page.ask("http://echo.test/broken")["responseCode"] == 500
    assert isinstance(page.traffic.failure, KeyError)


def test_cookies_that_cannot_be_read_are_none() -> None:
    assert Request("GET", "/", {"cookie": "a=\x00;;"}).cookies == {}


async def test_a_page_is_at_rest_when_it_has_loaded_and_nothing_is_asked_for() -> None:
    rest = Rest("main")
    forever = asyncio.get_running_loop().time() + 60
    await rest.wait(forever, lambda: True)
    rest.take("Page.frameStartedLoading", {"frameId": "main"})
    rest.take("Network.requestWillBeSent", {"requestId": "1"})
    waiting = asyncio.create_task(rest.wait(forever, lambda: True))
    for method, event in (
        ("Page.frameStoppedLoading", {"frameId": "another"}),
        ("Page.frameStoppedLoading", {"frameId": "main"}),
        ("Network.loadingFailed", {"requestId": "2"}),
    ):
        rest.take(method, event)
        await asyncio.sleep(0)
        assert not waiting.done()
    rest.take("Network.loadingFinished", {"requestId": "1"})
    await waiting


async def test_nobody_waits_for_a_page_that_is_gone_or_longer_than_allowed() -> None:
    rest = Rest("main")
    rest.take("Network.requestWillBeSent", {"requestId": "1"})
    await rest.wait(asyncio.get_running_loop().time(), lambda: True)
    rest.take("Page.frameStartedLoading", {"frameId": "main"})
    gone = False
    waiting = asyncio.create_task(rest.wait(asyncio.get_running_loop().time() + 60, lambda: not gone))
    await asyncio.sleep(0)
    gone = True
    rest.take("closed", {})
    await waiting
