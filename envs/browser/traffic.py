"""A page's requests: those to its own site are answered by it, in this process; all others are refused.

Chromium holds every request until it is told what comes of it, and has no network besides. Owns which requests were
refused and whether the site broke; knows no page.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from envs.browser.web import MAX_BODY, Request, Response, Site


class Traffic:
    """Answers the held requests of one page.

    post: sends a command to the page. note: takes down what the policy should know. failure: what the site raised.
    """

    def __init__(self, post: Callable[..., Any], note: Callable[[str], None]) -> None:
        self.site: Site | None = None
        self.failure: BaseException | None = None
        self._post = post
        self._note = note

    def answer(self, event: Mapping[str, Any], main_frame: str) -> None:
        """Answer one `Fetch.requestPaused`. main_frame: the page's own, whose documents are what it navigates to."""
        asked = event["request"]
        parts = urlsplit(asked["url"])
        if self.site is None or f"{parts.scheme}://{parts.netloc}" != self.site.origin:
            document = event.get("resourceType") == "Document" and event.get("frameId") == main_frame
            self._note(f"refused: {asked['url'][:100]} is not part of this site")
            # An aborted navigation leaves the page where it is.
            reason = "Aborted" if document else "BlockedByClient"
            self._post("Fetch.failRequest", requestId=event["requestId"], errorReason=reason)
            return
        target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        response = self._answered(target, asked)
        shown = {"Content-Type": response.kind, "Cache-Control": "no-store", **response.headers}
        self._post(
            "Fetch.fulfillRequest",
            requestId=event["requestId"],
            responseCode=int(response.status),
            responseHeaders=[{"name": name, "value": value} for name, value in shown.items()],
            body=base64.b64encode(response.body).decode(),
        )

    def _answered(self, target: str, asked: Mapping[str, Any]) -> Response:
        assert self.site is not None
        body = asked.get("postData", "")
        if len(body) > MAX_BODY or (asked.get("hasPostData") and not body):
            return Response(b"too large", 413, "text/plain")
        headers = {name.lower(): value for name, value in asked.get("headers", {}).items()}
        try:
            return self.site.answer(Request(asked["method"], target, headers, body))
        except Exception as error:  # noqa: BLE001  raised to the episode when the page has come to rest
            self.failure = error
            return Response(b"the site broke", 500, "text/plain")
