"""`ergon view`: a run's kept trajectories in the browser, of a run that goes on or of a finished one. Loopback only.

Owns the server and the thread that follows the files; renders with the report's templates, a page at a time. Writes
nothing: neither the run nor its processes know of it.
"""

from __future__ import annotations

import logging
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from broker.process.lifecycle import ErgonError
from deploy.loopback import HOST, LoopbackServer, Reply, plain
from deploy.report.kept import SORTS, Filter, Index
from deploy.report.page import CONTENT_POLICY, Pages
from deploy.report.run import find_run, read_run
from deploy.report.transcripts import Transcriber

logger = logging.getLogger(__name__)

PER_PAGE: Final = 50
MAX_TOKENS: Final = 50_000  # of a trajectory whose tokens are listed one by one
FOLLOW_S: Final = 2.0
SEARCH_PATIENCE_S: Final = 2.0  # that a search waits for texts that were not read yet
_HEADERS: Final = {"Content-Security-Policy": f"{CONTENT_POLICY}; frame-ancestors 'none'"}


class _BadQueryError(Exception):
    """The address asks for something that cannot be; the message says what can."""


class Follower(threading.Thread):
    """Keeps an index up to date, and reads what was said once somebody has searched. problem: why it cannot."""

    def __init__(self, index: Index, transcriber: Transcriber) -> None:
        super().__init__(name="follower", daemon=True)
        self._index, self._transcriber = index, transcriber
        self._ended, self._wake, self._searched = threading.Event(), threading.Event(), threading.Event()
        self._caught_up = threading.Event()
        self.problem = ""

    def run(self) -> None:
        """Until stopped."""
        while not self._ended.is_set():
            self._index.refresh()
            if self._searched.is_set() and not self.problem:
                self._read_texts()
            self._wake.wait(FOLLOW_S)
            self._wake.clear()

    def search(self) -> None:
        """Somebody searches: see that texts are read, and wait a moment for them."""
        self._caught_up.clear()
        self._searched.set()
        self._wake.set()
        self._caught_up.wait(SEARCH_PATIENCE_S)

    def stop(self) -> None:
        """End."""
        self._ended.set()
        self._wake.set()
        self.join()

    def _read_texts(self) -> None:
        try:
            while not self._ended.is_set() and (some := self._index.without_text()):
                texts = self._transcriber.texts([kept.trajectory for kept in some])
                names = [kept.trajectory.ticket.ticket_id for kept in some]
                self._index.add_texts(dict(zip(names, texts, strict=True)))
        except ErgonError as error:
            self.problem = str(error)
        self._caught_up.set()


class ViewServer(LoopbackServer):
    """Serves the list, a trajectory, and the report as it would be written now."""

    def __init__(self, place: Path, port: int, model: Path | None = None) -> None:
        self.place = place
        config, directory, settings = find_run(place)
        self.name = settings.run.name
        self.index = Index(directory)
        self.index.refresh()
        self._transcriber = Transcriber(config, model)
        self._pages = Pages(self._transcriber)
        self._follower = Follower(self.index, self._transcriber)
        super().__init__(port)
        self._follower.start()

    def server_close(self) -> None:
        """Close the socket, end what follows the files."""
        super().server_close()
        if hasattr(self, "_follower") and self._follower.is_alive():
            self._follower.stop()
            self._transcriber.close()
            self.index.close()

    def reply(self, path: str) -> Reply:
        """See LoopbackServer."""
        parts = urllib.parse.urlsplit(path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        pages: Mapping[str, Callable[[Mapping[str, str]], Reply]] = {
            "/": self._list,
            "/trajectory": self._trajectory,
            "/report": self._report,
        }
        if parts.path not in pages:
            return plain(404, "not found; the list is at /")
        try:
            return pages[parts.path](query)
        except _BadQueryError as error:
            return plain(400, str(error))
        except ErgonError as error:
            return plain(409, str(error))

    def _list(self, query: Mapping[str, str]) -> Reply:
        chosen, sort, descending, page = parse(query)
        if chosen.text:
            self._follower.search()
        count = self.index.count(chosen)
        last = max(1, -(-count // PER_PAGE))
        page = min(page, last)
        rows = self.index.page(chosen, sort, (page - 1) * PER_PAGE, PER_PAGE, descending=descending)
        follows = query.get("follow") == "1"
        text = self._pages.render(
            "list.html",
            run_name=self.name,
            rows=rows,
            count=count,
            total=self.index.count(),
            page=page,
            last=last,
            query=query,
            links={n: address(query, page=n) for n in {1, page - 1, page + 1, last} if 1 <= n <= last},
            columns={
                each: address(query, sort=each, up="0" if sort != each or not descending else "1") for each in SORTS
            },
            sort=sort,
            descending=descending,
            choices=self.index.choices(),
            follows=follows,
            follow_link=address(query, follow="" if follows else "1"),
            num_with_text=self.index.num_with_text() if chosen.text else None,
            problem=self._follower.problem if chosen.text else "",
            num_damaged=self.index.num_damaged,
        )
        return _html(text, {"Refresh": "5"} if follows else {})

    def _trajectory(self, query: Mapping[str, str]) -> Reply:
        ticket_id = query.get("id", "")
        kept = self.index.load(ticket_id)
        if kept is None:
            return plain(404, f"no trajectory of the ticket {ticket_id!r:.300} is kept, or not any more")
        siblings = self.index.page(Filter(group=kept.trajectory.ticket.group_id), "finished_at", 0, PER_PAGE)
        shown = self._pages.shown(kept, max_tokens=MAX_TOKENS)
        return _html(self._pages.render("trajectory.html", run_name=self.name, shown=shown, siblings=siblings))

    def _report(self, _query: Mapping[str, str]) -> Reply:
        return _html(self._pages.report(read_run(self.place), self.index))


def parse(query: Mapping[str, str]) -> tuple[Filter, str, bool, int]:
    """(what is chosen, what it is sorted by, whether the highest is first, the page's number) of an address."""
    kinds = {each.name: str(each.type) for each in fields(Filter)}
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        if text := query.get(name, "").strip():
            values[name] = text if kind == "str" else _number(name, text, int if "int" in kind else float)
    sort = query.get("sort") or SORTS[0]
    if sort not in SORTS:
        raise _BadQueryError(f"sort = {sort!r:.80}; allowed: {', '.join(SORTS)}")
    page = _number("page", query.get("page") or "1", int)
    return Filter(**values), sort, query.get("up") != "1", int(max(1, page))


def address(query: Mapping[str, str], **changes: str | int) -> str:
    """The list's address with these changes; another order begins at its first page."""
    kept = dict(query) if "page" in changes or "follow" in changes else {k: v for k, v in query.items() if k != "page"}
    merged = {name: str(value) for name, value in (kept | changes).items() if str(value)}
    return "/?" + urllib.parse.urlencode(merged)


def _number(name: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        value = kind(text)
        if not abs(value) < 2**62:  # nor is NaN
            raise ValueError
    except ValueError:
        raise _BadQueryError(f"{name} = {text!r:.80} is no number") from None
    return value


def _html(text: str, headers: Mapping[str, str] = {}) -> Reply:
    return Reply(200, "text/html; charset=utf-8", text.encode("utf-8", "replace"), {**_HEADERS, **headers})


def view(place: Path, port: int, model: Path | None, wait: Callable[[], object]) -> None:
    """Serve a run's trajectories until `wait` returns. Raises ErgonError where there is no such run."""
    with ViewServer(place, port, model) as server:
        thread = threading.Thread(target=server.serve_forever, name="view", daemon=True)
        thread.start()
        number, port = server.index.count(), server.server_address[1]
        logger.info("viewing run=%s trajectories=%d page=http://%s:%d/", server.name, number, HOST, port)
        wait()
        server.shutdown()
        thread.join()
