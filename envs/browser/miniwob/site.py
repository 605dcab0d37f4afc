"""MiniWoB++'s pages as a site: files of the installed package, and the episode's page only once.

A page that could be loaded again, or another one, would be a new attempt at an easier problem; so after the first
document there is no second. The package is the optional extra `miniwob`; nothing of it is imported.
"""

from __future__ import annotations

import functools
import importlib.util
from http import HTTPStatus
from pathlib import Path

from envs.browser.web import Request, Response
from envs.interface import EnvironmentOptionsError

KINDS = {
    ".css": "text/css",
    ".gif": "image/gif",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
}


@functools.cache
def pages_folder() -> Path:
    """The package's folder of pages. Raises EnvironmentOptionsError."""
    found = importlib.util.find_spec("miniwob")
    if found is None or not found.submodule_search_locations:
        raise EnvironmentOptionsError(
            "MiniWoB++'s pages are in the package miniwob, which is not installed: type `pip install ergon[miniwob]`"
        )
    return Path(found.submodule_search_locations[0]) / "html"


@functools.lru_cache(maxsize=256)
def _content(path: str) -> bytes | None:
    """A file of the folder; None for anything else."""
    folder = pages_folder().resolve()
    file = (folder / path.lstrip("/")).resolve()
    return file.read_bytes() if file.is_relative_to(folder) and file.suffix in KINDS and file.is_file() else None


class MiniwobSite:
    """The pages for one episode."""

    origin = "http://miniwob.test"

    def __init__(self, target: str) -> None:
        self._target = target
        self._shown = False

    def answer(self, request: Request) -> Response:
        """A file; of the pages only the episode's own, and that once."""
        document = Path(request.path).suffix == ".html"
        if request.method != "GET" or (document and (self._shown or request.target != self._target)):
            return Response(b"not to be had here", HTTPStatus.FORBIDDEN, "text/plain")
        content = _content(request.path)
        if content is None:
            return Response(b"no such file", HTTPStatus.NOT_FOUND, "text/plain")
        self._shown = self._shown or document
        return Response(content, kind=KINDS[Path(request.path).suffix])
