"""One episode's world: the API in front of its database, with authentication, a rate limit, faults and a clock.

Answers requests and keeps the state; opens no socket (serve.py does) and grades nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlsplit

import msgspec
from msgspec import Meta

from envs.faults import Fault, FaultInjector, FaultProfile
from envs.rows import Rows
from envs.services.api import ApiError, Request, Route, route_of
from envs.services.database import COLUMNS, NUMBERS, Database
from envs.snapshots import Count, Finite

MAX_BODY = 8192
MAX_DRAWN = 100_000  # requests of one episode, in a state from elsewhere
TOKEN_REQUESTS = 60
LOGIN = "/auth/token"
USER = "agent"
WRITES = ("POST", "PATCH", "DELETE")


class Clock:
    """The world's time in seconds. Simulated: a request takes one second, slow ones longer, `wait` passes it."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Seconds since the world began."""
        return self._now

    def spend(self, seconds: float) -> None:
        """So much later."""
        self._now += seconds


class RealClock(Clock):
    """The machine's time, for a world behind a real server; slow answers really are."""

    def now(self) -> float:
        """Seconds of the machine's monotonic clock."""
        return time.monotonic()

    def spend(self, seconds: float) -> None:
        """Time passes by itself; the server waits for a slow answer."""


@dataclass(frozen=True, slots=True)
class Response:
    """What arrives of an answer. text: JSON, cut where the fault says so. num_bytes: of the uncut text."""

    status: int
    text: str
    num_bytes: int
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """At most `requests` in each window of `window_s` seconds."""

    requests: int = 40
    window_s: float = 60.0


Number = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]  # what SQLite holds


class WorldState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Everything that a world with a simulated clock knows at one moment. rows: values by table, in the order of
    COLUMNS. last_ids: see Database. window: its number, and requests in it. tokens: requests that each is still good
    for. kept: by idempotency key, what was asked (as a text), the status and the payload."""

    rows: dict[str, list[list[Number | str]]]
    last_ids: dict[str, Count]
    now_s: Finite
    num_drawn: Annotated[int, Meta(ge=0, le=MAX_DRAWN)]
    num_in_a_row: Count
    window: tuple[int, Count]
    tokens: dict[str, Count]
    kept: dict[str, tuple[tuple[str, str, str], int, Any]]


class World:
    """The services of one episode. Same seed, same requests: same answers. Safe to call from several threads."""

    def __init__(
        self,
        rows: Rows,
        seed: str,
        password: str,
        faults: FaultProfile,
        limits: Limits | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._db = Database(rows)
        self._seed = seed
        self._password = password
        self._faults = FaultInjector(faults, seed)
        self._limits = limits or Limits()
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._window = (-1, 0)
        self._tokens: dict[str, int] = {}
        self._kept: dict[str, tuple[tuple[Any, ...], int, Any]] = {}

    def request(self, method: str, target: str, body: Mapping[str, Any] | None, token: str) -> Response:
        """Answer one request, whatever it is."""
        with self._lock:
            self._clock.spend(1.0)
            fault = self._faults.draw()
            self._clock.spend(fault.delay_s)
            wait_s = self._over_limit()
            if wait_s:
                return _response(429, {"error": f"too many requests; wait {wait_s} seconds"}, Fault())
            if fault.kind == "error":
                return _response(fault.status, {"error": "the service is not available at the moment"}, fault)
            status, payload = self._answered(method, target, dict(body or {}), token)
            if fault.kind == "lost":
                return _response(fault.status, {"error": "the service did not answer in time"}, fault)
            return _response(status, payload, fault)

    def wait(self, seconds: float) -> None:
        """Let simulated time pass."""
        self._clock.spend(seconds)

    def rows(self) -> Rows:
        """The whole state, for the grader."""
        with self._lock:
            return self._db.rows()

    def state(self) -> WorldState:
        """All of it. The clock must be a simulated one."""
        with self._lock:
            num_drawn, num_in_a_row = self._faults.position
            rows = {table: [list(row.values()) for row in found] for table, found in self._db.rows().items()}
            return WorldState(
                rows=rows,
                last_ids=self._db.last_ids,
                now_s=self._clock.now(),
                num_drawn=num_drawn,
                num_in_a_row=num_in_a_row,
                window=self._window,
                tokens=dict(self._tokens),
                kept=dict(self._kept),
            )

    def set_state(self, state: WorldState) -> None:
        """Of a fresh world with the same seed: be as the one that this is the state of. Raises ValueError where there
        can be no such world."""
        rows: Rows = {}
        for table, found in state.rows.items():
            names = COLUMNS.get(table, ())
            if not all(_is_row(names, values) for values in found):
                raise ValueError(f"no rows of a table {table:.40}")
            rows[table] = [dict(zip(names, values, strict=True)) for values in found]
        if not state.last_ids.keys() <= COLUMNS.keys():
            raise ValueError("ids of unknown tables")
        try:
            db = Database(rows)
            db.set_last_ids(state.last_ids)
        except sqlite3.Error as error:
            raise ValueError(str(error)) from error
        with self._lock:
            self._db.close()
            self._db = db
            self._clock.spend(state.now_s - self._clock.now())
            self._faults.go_to(state.num_drawn, state.num_in_a_row)
            self._window, self._tokens, self._kept = state.window, dict(state.tokens), dict(state.kept)

    def close(self) -> None:
        """Forget everything; idempotent."""
        self._db.close()

    def _over_limit(self) -> int:
        """Seconds to wait if the window is full, else 0."""
        now = self._clock.now()
        window = int(now // self._limits.window_s)
        number = self._window[1] + 1 if self._window[0] == window else 1
        self._window = window, min(number, self._limits.requests + 1)
        if number <= self._limits.requests:
            return 0
        return int((window + 1) * self._limits.window_s - now) + 1

    def _answered(self, method: str, target: str, body: dict[str, Any], token: str) -> tuple[int, Any]:
        try:
            parts = urlsplit(target)
            if parts.path == LOGIN:
                return 200, self._login(method, body)
            self._check_token(token)
            route, row_id = route_of(method, parts.path)
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            return self._act(route, Request(query, body, row_id), target)
        except ApiError as error:
            return error.status, {"error": str(error)}
        except ValueError:
            return 400, {"error": "not a path"}

    def _login(self, method: str, body: Mapping[str, Any]) -> Any:
        if method != "POST":
            raise ApiError(405, f"{LOGIN} takes POST")
        given = body.get("password")
        if body.get("user") != USER or not isinstance(given, str) or not given.isascii():
            raise ApiError(403, "wrong user or password")
        if not hmac.compare_digest(given, self._password):
            raise ApiError(403, "wrong user or password")
        number = len(self._tokens)
        token = hashlib.blake2b(
            f"{self._seed}|{number}".encode(), key=self._password.encode(), digest_size=6
        ).hexdigest()
        self._tokens = {**dict.fromkeys(self._tokens, 0), token: TOKEN_REQUESTS}
        return {"token": token, "requests": TOKEN_REQUESTS}

    def _check_token(self, token: str) -> None:
        left = self._tokens.get(token, 0)
        if left <= 0:
            raise ApiError(401, f"no valid token: get one with POST {LOGIN}")
        self._tokens[token] = left - 1

    def _act(self, route: Route, request: Request, target: str) -> tuple[int, Any]:
        if route.method not in WRITES:
            return 200, route.act(self._db, request)
        key = request.body.get("idempotency_key")
        if key is not None and (not isinstance(key, str) or not 0 < len(key) <= 64):
            raise ApiError(400, "idempotency_key must be a text of 1 to 64 characters")
        body = {name: value for name, value in request.body.items() if name != "idempotency_key"}
        self._check_fields(route, body)
        sent = (route.method, target, json.dumps(body, sort_keys=True))
        if key is not None and key in self._kept:
            before, status, payload = self._kept[key]
            if before != sent:
                raise ApiError(422, f"idempotency_key {key} was used for another request")
            return status, payload
        with self._db:
            payload = route.act(self._db, Request(request.query, body, request.row_id))
        status = 201 if route.method == "POST" else 200
        if key is not None:
            self._kept[key] = sent, status, payload
        return status, payload

    @staticmethod
    def _check_fields(route: Route, body: Mapping[str, Any]) -> None:
        known = [name.removesuffix("?") for name in route.fields]
        for name in body:
            if name not in known:
                raise ApiError(400, f"the body has no field {str(name)[:40]}; it takes: {', '.join(known) or 'none'}")
        for name in route.fields:
            if not name.endswith("?") and name not in body:
                raise ApiError(400, f"the body needs {name}")


def _is_row(names: Sequence[str], values: Sequence[int | str]) -> bool:
    kinds = [int if name == "id" or name in NUMBERS else str for name in names]
    return [type(value) for value in values] == kinds


def _response(status: int, payload: Any, fault: Fault) -> Response:
    text = json.dumps(payload)
    return Response(status, fault.cut(text), len(text), fault.delay_s)
