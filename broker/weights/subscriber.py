"""The end of the weight channel that actors and relays hold: `WeightSubscriber`.

It owns its connection and says what the newest version is; it fetches when asked to and adopts nothing. A destination
holds a version only when it is complete and verified.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from broker.client.connection import Connection, ConnectionClosedError
from broker.process.keys import Identity
from broker.process.security import OPEN, Security
from broker.protocol import weight_messages as messages
from broker.protocol import weights
from broker.protocol.commands import parse_body
from broker.protocol.errors import ProtocolError
from broker.protocol.frames import Limits, Message
from broker.protocol.proofs import Proof
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Bytes, Manifest
from broker.weights import metrics
from broker.weights.basefile import BaseFile
from broker.weights.chain import Payload
from broker.weights.fetch import Announced, Event, Fetch, Reconnected, WeightsSupersededError
from broker.weights.news import News
from broker.weights.pushed import PushSlot
from broker.weights.sinks import Sink, StoreSink
from broker.weights.store import WeightStore
from broker.weights.vouching import WeightsCorruptError

REPLY_LIMITS = Limits(max_frames=4, max_envelope_bytes=64 << 20, max_array_bytes=weights.MAX_CHUNK_BYTES)


class WeightsTimeoutError(Exception):
    """The version did not arrive whole in time."""


class WeightSubscriber:
    """Knows the newest version announced at `endpoint` and fetches versions from there. Thread-safe.

    `on_announce(version)` is called from the connection's thread for each newer version, `on_push(delta)` before that
    for one that came unasked, and `on_part(part)` for what came ahead of that, neither of which is verified; they must
    not block.
    `on_failure(exc)` is called once if the server refuses this peer for good (another protocol or run, or its key).
    `server` is whose key the server must have, where `security` has keys. `push_bytes`: deltas up to this size may come
    with their announcement, and the newest one waits in memory until it is fetched; 0: all are asked for.
    """

    def __init__(
        self,
        endpoint: str,
        run_id: str,
        peer_id: str,
        *,
        role: Literal["relay", "actor", "operator"] = "actor",
        credit: int = 8,
        push_bytes: int = 16 << 20,
        heartbeat_s: float = 1.0,
        liveness: int = 15,
        on_announce: Callable[[PolicyVersion], None] | None = None,
        on_push: Callable[[Payload], None] | None = None,
        on_part: Callable[[messages.Part], None] | None = None,
        on_failure: Callable[[Exception], None] | None = None,
        security: Security = OPEN,
        server: Identity = Identity.RELAY,
    ) -> None:
        self.endpoint = endpoint
        self._run_id = run_id
        self._credit = credit
        self._stall_s = heartbeat_s * liveness
        self._on_announce, self._on_failure_given = on_announce, on_failure
        self._on_push, self._on_part = on_push, on_part
        self._on_seal: Callable[[], None] | None = None
        self._signers = security.signers
        self.seal: tuple[PolicyVersion, Proof] | None = None  # announced last; neither is verified
        self._fetching = threading.Lock()  # one fetch at a time; the credit belongs to the connection
        self._news = News(lambda: self._connection.failure, self._coming)
        self._have: PolicyVersion | None = None
        self._inbox: queue.SimpleQueue[Event | _PartCame | Exception] | None = None
        self._pushed = PushSlot(push_bytes)
        hello = messages.Hello(role=messages.Role(role), peer_id=peer_id, run_id=run_id, session=uuid.uuid4().hex)
        self._connection = Connection(
            endpoint,
            hello=hello.pack,
            on_welcome=self._on_welcome,
            on_message=self._on_message,
            on_failure=self._on_failure,
            heartbeat_s=heartbeat_s,
            liveness=liveness,
            name=f"weights-{role}",
            limits=REPLY_LIMITS,
            security=security,
            server=server,
        )
        self._connection.start()

    @property
    def connected(self) -> bool:
        """Whether the server has welcomed the present connection."""
        return self._connection.connected

    @property
    def failure(self) -> Exception | None:
        """Why this peer was refused for good, or None."""
        return self._connection.failure

    def wait_connected(self, timeout_s: float) -> None:
        """Block until the first WELCOME. Raises ErgonError when nobody answers, ProtocolError when refused."""
        self._connection.wait_welcome(timeout_s)

    def on_seal(self, call: Callable[[], None]) -> None:
        """Call this, from the connection's thread, whenever `seal` has come. It must not block."""
        self._on_seal = call

    def latest(self) -> PolicyVersion | None:
        """The newest version announced so far; survives reconnections."""
        return self._news.latest

    def wait_newer(self, than: PolicyVersion | None, timeout_s: float) -> PolicyVersion | None:
        """Block until a version newer than this one is announced; None when the time is up. Raises `failure`."""
        return self._news.wait_newer(than, timeout_s)

    def wait_coming(self, than: PolicyVersion | None, timeout_s: float) -> PolicyVersion | None:
        """As `wait_newer`, but also one of which the first bytes have come, as a delta to what was fetched last: to be
        fetched by `fetch_base`, which then applies it while it is still being made."""
        return self._news.wait_coming(than, timeout_s)

    def fetch_base(self, version: PolicyVersion, base: BaseFile, timeout_s: float) -> Manifest:
        """Make `base` hold this version, the cheapest way from what it holds; at once where it does already.

        What of it comes ahead is applied as it comes; where the rest does not, and nobody has announced the version,
        that is taken back, and the version counts as superseded. Blocks; survives reconnections and restarts of the
        server. Raises WeightsSupersededError, WeightsTimeoutError, WeightsCorruptError,
        ErgonError (the file cannot be written), ProtocolError (refused for good); `base.version` says whether the
        former version is still there.
        """
        if base.version == version and base.manifest is not None:
            return base.manifest
        return self._fetch(version, base, timeout_s, base.apply_ahead)

    def fetch_into(self, version: PolicyVersion, store: WeightStore, timeout_s: float) -> Manifest:
        """Make `store` hold and serve this version, and keep the delta it came as. Raises as `fetch_base` does, and
        OutOfBudgetError."""
        return self._fetch(version, StoreSink(store), timeout_s)

    def close(self) -> None:
        """End the connection; a fetch in progress ends with WeightsTimeoutError. Idempotent."""
        self._connection.close(flush_s=0.2)
        self._post(WeightsTimeoutError("the subscriber was closed during the fetch"))

    # --- the fetch, in the caller's thread --------------------------------------------------------------------------

    def _fetch(
        self, version: PolicyVersion, sink: Sink, timeout_s: float, ahead: Callable[[Bytes], None] | None = None
    ) -> Manifest:
        deadline = time.monotonic() + timeout_s
        if not self._fetching.acquire(timeout=timeout_s):
            raise WeightsTimeoutError(f"another fetch was still running after {timeout_s:g} s")
        try:
            self._inbox = queue.SimpleQueue()
            if ahead is not None and (version, sink.have) == self._pushed.coming():
                self._take_ahead(version, ahead, deadline, timeout_s)
            started = time.monotonic()
            fetch = Fetch(version, self._run_id, sink, self._credit, self._send, self._signers)
            fetch.start(self._pushed.take(version, sink.have))
            moved = time.monotonic()
            while True:
                if fetch.complete:
                    arrived = time.monotonic()
                    if (manifest := fetch.finish()) is not None:
                        break
                event = self._next_event(version, deadline, timeout_s, moved + self._stall_s)
                if isinstance(event, _PartCame):
                    continue
                if not isinstance(event, Announced):  # these come all the time, whatever becomes of our requests
                    moved = time.monotonic()
                fetch.handle(event)
        except WeightsCorruptError:
            metrics.verify_failures.inc()
            raise
        except WeightsSupersededError:
            metrics.superseded_fetches.inc()
            raise
        finally:
            self._inbox = None
            try:
                sink.abort()
            finally:
                self._have = sink.have
                self._fetching.release()
        self._watch()  # the server may let go of what this peer no longer fetches
        metrics.fetched_versions.labels(metrics.kind(manifest.parent)).inc()
        metrics.transfer_seconds.observe(arrived - started)
        metrics.fetch_seconds.observe(time.monotonic() - started)
        return manifest

    def _take_ahead(
        self, version: PolicyVersion, ahead: Callable[[Bytes], None], deadline: float, timeout_s: float
    ) -> None:
        """Hand over what has come of the delta to this version, and what comes, until it is announced. Raises
        WeightsSupersededError where it is not, and nothing comes any more: then nobody has it."""
        num_bytes, usable, moved = 0, True, time.monotonic()
        while self._news.latest is None or self._news.latest < version:
            for part in self._pushed.parts(version, num_bytes):
                if usable and part.start == num_bytes:
                    num_bytes, moved = num_bytes + part.data.size, time.monotonic()
                    try:
                        ahead(part.data)
                    except ProtocolError:  # whoever sent it is found out when the whole is verified
                        usable = False
            self._next_event(version, deadline, timeout_s, moved + self._stall_s)
            if time.monotonic() - moved >= self._stall_s:
                self._pushed.forget_parts()
                raise WeightsSupersededError(version, self._news.latest or version)

    def _next_event(
        self, version: PolicyVersion, deadline: float, timeout_s: float, stalled_at: float
    ) -> Event | _PartCame:
        assert self._inbox is not None
        try:
            event = self._inbox.get(timeout=max(min(deadline, stalled_at) - time.monotonic(), 0.0))
        except queue.Empty:
            if deadline > stalled_at:
                return Reconnected()  # nothing for so long: requests must have been lost
            raise WeightsTimeoutError(
                f"version {tuple(version)} did not arrive from {self.endpoint} within {timeout_s:g} s"
            ) from None
        if isinstance(event, Exception):
            raise event
        return event

    def _send(self, message: Message) -> None:
        # False: not connected at this moment; the event that follows the next WELCOME repeats what matters.
        try:
            self._connection.send(message)
        except ConnectionClosedError as error:
            raise self.failure or WeightsTimeoutError(f"the subscriber of {self.endpoint} is closed") from error

    def _watch(self) -> None:
        # During a fetch nothing is to be pushed: what comes next will be a delta to another version.
        push_bytes = self._pushed.max_bytes if self._inbox is None else 0
        with contextlib.suppress(ConnectionClosedError):  # closed meanwhile: nobody watches any more
            self._connection.send(messages.Watch(have=self._have, push_bytes=push_bytes).pack())

    # --- callbacks, in the connection's thread ----------------------------------------------------------------------

    def _on_welcome(self, _welcome: Message, _first: bool) -> None:
        self._watch()
        self._post(Reconnected())

    def _on_message(self, message: Message) -> None:
        if message.command == messages.Announce.COMMAND:
            news = parse_body(message, messages.Announce)
            self._on_newest(messages.policy_version(news.newest))
            if news.newest is not None and news.proof is not None:
                self.seal = (PolicyVersion(*news.newest), news.proof)
                if self._on_seal is not None:
                    self._on_seal()
        elif message.command == messages.PushPart.COMMAND:
            part = messages.read_part(message)
            if self._pushed.put_part(part):
                self._news.stir()
                self._post(_PartCame())
                if self._on_part is not None:
                    self._on_part(part)
        elif message.command == messages.Push.COMMAND:
            pushed = messages.read_push(message)
            delta = self._pushed.put(pushed)
            if delta is not None and self._on_push is not None:
                self._on_push(delta)
            self._on_newest(pushed.manifest.version)
        else:
            self._post(message)

    def _on_newest(self, newest: PolicyVersion | None) -> None:
        newer = self._news.announce(newest)
        if newer is not None:
            metrics.announced_lineage.set(newer.lineage)
            metrics.announced_version.set(newer.version)
            if self._on_announce is not None:
                self._on_announce(newer)
        self._post(Announced(newest))

    def _on_failure(self, error: Exception) -> None:
        self._news.stir()
        self._post(error)
        if self._on_failure_given is not None:
            self._on_failure_given(error)

    def _post(self, event: Event | _PartCame | Exception) -> None:
        inbox = self._inbox
        if inbox is not None:
            inbox.put(event)

    def _coming(self) -> PolicyVersion | None:
        version, parent = self._pushed.coming() or (None, None)
        return version if version is not None and parent == self._have else None


@dataclass(frozen=True, slots=True)
class _PartCame:
    """More of a delta that is still being made."""
