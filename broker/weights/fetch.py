"""From an announced version to verified bytes: what to ask for next, and what to make of each answer.

`ChunkPlan` is which chunks are missing, requested and held. `Fetch` drives one version into a sink, event by event,
over reconnections and restarts of the server. Neither has a socket, a thread or a clock: `send` and events are given.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from broker.process.signing import Signers
from broker.protocol import weight_messages as messages
from broker.protocol.commands import ErrorBody, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Buffer, Bytes, Manifest
from broker.weights import metrics
from broker.weights.chain import Payload
from broker.weights.sinks import DeltaRefusedError, Sink
from broker.weights.vouching import WeightsCorruptError, check_signed

logger = logging.getLogger(__name__)

MAX_CORRUPT = 3  # wrong answers for one chunk before the fetch is given up


class WeightsSupersededError(Exception):
    """The version is no longer held upstream; `newest` is the one to fetch instead."""

    def __init__(self, version: PolicyVersion, newest: PolicyVersion) -> None:
        super().__init__(f"version {tuple(version)} is no longer held; the newest is {tuple(newest)}")
        self.newest = newest


@dataclass(frozen=True, slots=True)
class Reconnected:
    """Requests may have been lost: the connection is new, or nothing has come for long. Repeating them is harmless."""


@dataclass(frozen=True, slots=True)
class Announced:
    """The server has said what its newest version is."""

    newest: PolicyVersion | None


Event = Message | Reconnected | Announced


class Verdict(Enum):
    """What became of a chunk."""

    STORE = "store"  # new and right: the caller stores it
    DUPLICATE = "duplicate"  # already held, or never a part of this version's plan
    CORRUPT = "corrupt"  # wrong length or hash: it will be asked for again


class ChunkPlan:
    """Which chunks of one version are missing, requested and held. At most `credit` are requested at a time."""

    def __init__(self, manifest: Manifest, credit: int) -> None:
        self.manifest = manifest
        self._credit = credit
        self._missing = deque(range(manifest.num_chunks))
        self._requested: set[int] = set()
        self._held: set[int] = set()
        self._num_corrupt: dict[int, int] = {}

    @property
    def complete(self) -> bool:
        """Whether every chunk is held."""
        return len(self._held) == self.manifest.num_chunks

    @property
    def num_requested(self) -> int:
        """Chunks requested and not yet received."""
        return len(self._requested)

    def next_requests(self) -> list[int]:
        """Indices to request now; they count as requested from here on."""
        num = min(self._credit - len(self._requested), len(self._missing))
        indices = [self._missing.popleft() for _ in range(max(num, 0))]
        self._requested.update(indices)
        return indices

    def accept(self, index: int, data: Buffer) -> Verdict:
        """Judge an arrived chunk. Raises WeightsCorruptError at the third wrong answer for the same chunk."""
        if index >= self.manifest.num_chunks or index in self._held:
            return Verdict.DUPLICATE
        if self.manifest.chunk_fits(index, data):
            if index not in self._requested:  # a late answer to a request that was already repeated
                self._missing.remove(index)
            self._requested.discard(index)
            self._held.add(index)
            return Verdict.STORE
        self._num_corrupt[index] = self._num_corrupt.get(index, 0) + 1
        if self._num_corrupt[index] >= MAX_CORRUPT:
            version = self.manifest.version
            raise WeightsCorruptError(
                f"chunk {index} of version ({version.lineage}, {version.version}) arrived {MAX_CORRUPT} times with "
                "wrong bytes; the old version stays in use: look at the upstream's memory and at the network between"
            )
        if index in self._requested:
            self._requested.discard(index)
            self._missing.appendleft(index)
        return Verdict.CORRUPT

    def forget_requests(self) -> None:
        """What was requested is lost (a reconnection, a stall): ask for it again, oldest first."""
        self._missing.extendleft(sorted(self._requested, reverse=True))
        self._requested.clear()


class Fetch:
    """One version on its way into a sink, as a delta to what the sink has or as an anchor: the server decides.

    A version the server does not hold is superseded only when the server announces a newer one. Otherwise it is waited
    for: a relay that was killed comes back empty and soon holds it again, and the chunks held already still count.
    """

    def __init__(
        self,
        version: PolicyVersion,
        run_id: str,
        sink: Sink,
        credit: int,
        send: Callable[[Message], None],
        signers: Signers | None = None,
    ) -> None:
        self._signers = signers
        self._version, self._run_id, self._sink, self._credit, self._send = version, run_id, sink, credit, send
        self._plan: ChunkPlan | None = None
        self._newest: PolicyVersion | None = None  # as announced since the last reconnection
        self._absent = False  # the server said NOT_FOUND and has announced nothing newer since

    @property
    def complete(self) -> bool:
        """Whether every chunk is in the sink; `finish` is due."""
        return self._plan is not None and self._plan.complete

    def start(self, pushed: Payload | None = None) -> None:
        """Ask for the manifest, or begin with what came unasked: what of that is damaged is asked for."""
        if pushed is None:
            self._send(messages.manifest_request(self._version, self._sink.have))
            return
        self._check(pushed.manifest)
        self._begin(pushed.manifest)
        if self._plan is None:
            return
        for index in range(pushed.manifest.num_chunks):
            self._judge(index, pushed.chunk(index))
        self._request()

    def handle(self, event: Event) -> None:
        """Take one event. Raises WeightsSupersededError, WeightsCorruptError, ProtocolError and the sink's errors."""
        if isinstance(event, Announced):
            self._on_announced(event.newest)
        elif isinstance(event, Reconnected):
            self._newest = None
            self._ask_again()
        elif event.command == messages.ManifestReply.COMMAND:
            self._on_manifest(messages.read_manifest(event))
        elif event.command == messages.ChunkReply.COMMAND:
            self._on_chunk(messages.read_chunk(event))
        else:
            self._on_error(parse_body(event, ErrorBody))

    def finish(self) -> Manifest | None:
        """Verify the whole and make it visible. None where a delta did not give what was promised: then the anchor has
        been asked for, and the fetch goes on. Raises WeightsCorruptError."""
        assert self._plan is not None
        try:
            self._sink.finish()
        except DeltaRefusedError as error:
            self._refuse_delta(error)
            return None
        return self._plan.manifest

    def _refuse_delta(self, error: DeltaRefusedError) -> None:
        logger.warning("delta refused reason=%s next=anchor", error)
        metrics.refused_deltas.inc()
        self._sink.abort()
        self._sink.forget()
        self._plan = None
        self.start()

    def _ask_again(self) -> None:
        if self._plan is None or self._absent:
            self._absent = False
            self.start()
        else:
            self._plan.forget_requests()
            self._request()
        if self._plan is not None:
            metrics.resumed_fetches.inc()

    def _request(self) -> None:
        assert self._plan is not None
        for index in self._plan.next_requests():
            self._send(messages.chunk_request(self._version, self._plan.manifest.parent, index))

    def _on_announced(self, newest: PolicyVersion | None) -> None:
        self._newest = newest
        if not self._absent or newest is None:
            return
        if newest > self._version:
            raise WeightsSupersededError(self._version, newest)
        if newest == self._version:
            self._absent = False
            self.start()

    def _on_manifest(self, manifest: Manifest) -> None:
        if manifest.version != self._version:
            return  # an answer to an earlier fetch
        self._check(manifest)
        if manifest.parent not in (None, self._sink.have):
            return  # a late answer, to an earlier fetch or from before that version was lost or its delta refused
        if self._plan is None or _payload_of(self._plan.manifest) != _payload_of(manifest):
            self._begin(manifest)
        else:
            self._plan.forget_requests()
        if self._plan is not None:
            self._request()

    def _check(self, manifest: Manifest) -> None:
        if manifest.run_id != self._run_id:
            raise ProtocolError(
                ErrorCode.WRONG_RUN, f"the manifest's run_id is {manifest.run_id!r:.80}, this is run {self._run_id!r}"
            )
        check_signed(manifest, self._signers)

    def _begin(self, manifest: Manifest) -> None:
        """A plan for this payload; none where it is a delta that cannot be used, and then the anchor is asked for."""
        if self._plan is not None:
            self._sink.abort()
        try:
            self._sink.begin(manifest)
        except DeltaRefusedError as error:
            self._refuse_delta(error)
        else:
            self._plan = ChunkPlan(manifest, self._credit)

    def _on_chunk(self, chunk: messages.Chunk) -> None:
        if self._plan is None or (chunk.version, chunk.parent) != (self._version, self._plan.manifest.parent):
            return  # an answer to an earlier fetch, or to an earlier manifest
        self._judge(chunk.index, chunk.data)
        if not self._absent:
            self._request()

    def _judge(self, index: int, data: Bytes) -> None:
        """Store a chunk that is right and missing."""
        assert self._plan is not None
        verdict = self._plan.accept(index, data)
        if verdict is Verdict.STORE:
            self._sink.write(index, data)
            metrics.fetched_bytes.labels(metrics.kind(self._plan.manifest.parent)).inc(data.size)
        elif verdict is Verdict.CORRUPT:
            metrics.verify_failures.inc()

    def _on_error(self, error: ErrorBody) -> None:
        if error.known_code != ErrorCode.NOT_FOUND:
            raise ProtocolError(error.known_code, error.message)
        if error.about != messages.version_text(self._version):
            return  # an answer to an earlier fetch
        if self._newest is not None and self._newest > self._version:
            raise WeightsSupersededError(self._version, self._newest)
        self._absent = True


def _payload_of(manifest: Manifest) -> tuple[object, ...]:
    """What tells one payload of a version from another."""
    return manifest.parent, manifest.chunk_bytes, manifest.chunk_hashes, manifest.total_hash
