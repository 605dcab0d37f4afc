"""A tree of weight stores without a network: a publisher, two relays one behind the other, actors, and messages that
the test delivers, loses, repeats, reorders, damages and holds back as it likes.

Everything is the real thing but the sockets: publisher, stores, folds, fetches, sinks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from broker.protocol import weight_messages as messages
from broker.protocol.commands import error_message, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weight_messages import Part, Pushed
from broker.protocol.weights import DTYPES, describe_delta, lay_out, safetensors_header
from broker.weights.basefile import BaseFile
from broker.weights.chain import FoldJob, Payload
from broker.weights.fetch import Announced, Event, Fetch, Reconnected, WeightsSupersededError
from broker.weights.publisher import WeightPublisher
from broker.weights.pushed import PushSlot
from broker.weights.sinks import StoreSink
from broker.weights.store import OutOfBudgetError, WeightStore
from broker.weights.vouching import WeightsCorruptError

CHUNK = 4096
LAYOUTS = (
    (("a", "bfloat16", (60, 80)), ("b", "float32", (1500,)), ("c", "uint8", (1001,))),
    (("a", "bfloat16", (60, 80)), ("b", "float32", (1501,)), ("c", "uint8", (997,))),  # as many bytes
    (("a", "float16", (60, 80)), ("b", "float32", (1500,)), ("d", "int64", (200,))),
)
MAX_BYTES = 60_000
MAX_DELTA_BYTES = 8_000
MAX_PUSH_BYTES = 4_000


def answer(store: WeightStore, request: Message) -> Message:
    """What a server that serves this store answers, the fold made at once."""
    if request.command == "MANIFEST":
        asked = parse_body(request, messages.ManifestRequest)
        have = messages.policy_version(asked.have)
        while isinstance(found := store.find(asked.policy_version, have), FoldJob):
            try:
                made = found.run()
            except ProtocolError:  # one of the deltas was damaged; the anchor follows
                made = None
            store.add_fold(found, made)
        if found is not None:
            return messages.manifest_reply(found.manifest)
        version = asked.policy_version
    else:
        chunk = parse_body(request, messages.ChunkRequest)
        version, parent = chunk.policy_version, messages.policy_version(chunk.parent)
        data = store.lend((version, parent), chunk.index)
        if data is not None:
            return messages.chunk_reply(version, parent, chunk.index, data)
    return error_message(ProtocolError(ErrorCode.NOT_FOUND, "gone"), messages.version_text(version))


@dataclass(eq=False)
class Receiver:
    """Who fetches from `upstream` into a store of its own (a relay) or a file (an actor)."""

    upstream: WeightStore
    store: WeightStore | None = None
    base: BaseFile | None = None
    fetch: Fetch | None = None
    sink: StoreSink | BaseFile | None = None
    latest: PolicyVersion | None = None
    pushed: PushSlot = field(default_factory=lambda: PushSlot(MAX_PUSH_BYTES))
    requests: list[Message] = field(default_factory=list)
    replies: list[tuple[Message, bytes]] = field(default_factory=list)  # and what its array held when it was sent

    @property
    def held(self) -> PolicyVersion | None:
        """The version that it could serve or adopt."""
        if self.base is not None:
            return self.base.version
        assert self.store is not None
        return self.store.base.version if self.store.base else None


class Tree:
    """The publisher, everybody who receives from it, and what every version must be."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.publisher = WeightPublisher(
            "tcp://127.0.0.1:*",
            "run",
            chunk_bytes=CHUNK,
            max_bytes=MAX_BYTES,
            max_delta_bytes=MAX_DELTA_BYTES,
            heartbeat_s=1e-3,  # it waits for slow peers no longer than that
            liveness=1,
        )
        self.root = self.publisher._store
        self.publisher.close()  # its socket; nothing changes the store from here on but the test
        self._version = PolicyVersion(1, 0)
        self._layout = 0
        self.contents: dict[PolicyVersion, bytes] = {}
        self._live = np.zeros(0, np.uint8)
        self.num_fetched = self.num_deltas = self.num_anchors = self.num_refused = self.num_pushed = 0
        near = WeightStore(MAX_BYTES, MAX_DELTA_BYTES)
        far = WeightStore(MAX_BYTES, MAX_DELTA_BYTES)
        self.relays = [Receiver(self.root, store=near), Receiver(near, store=far)]
        self.actors: list[Receiver] = []

    @property
    def receivers(self) -> list[Receiver]:
        return self.relays + self.actors

    @property
    def stores(self) -> list[WeightStore]:
        return [self.root, *(relay.store for relay in self.relays if relay.store is not None)]

    def publish(self, how: str, seed: int) -> None:
        """A version that differs as `how` says: equal, few, sparse, dense, layout or lineage."""
        rng = np.random.default_rng(seed)
        lineage, number = self._version
        self._version = PolicyVersion(lineage + 1, seed % 3) if how == "lineage" else PolicyVersion(lineage, number + 1)
        if how == "layout":
            self._layout = (self._layout + 1) % len(LAYOUTS)
        layout = LAYOUTS[self._layout]
        specs = lay_out(layout)
        size = specs[-1].offset + specs[-1].num_bytes
        if how in ("layout", "dense") or self._live.size != size:
            self._live = rng.integers(0, 256, size, np.uint8)
        elif how != "equal":
            num = 30 if how == "few" else int(rng.choice([1, 30, 30, 300, 3000]))
            self._live[rng.integers(0, size, num)] = rng.integers(0, 256, num, np.uint8)
        tensors = [
            (name, dtype, shape, self._live[spec.offset : spec.offset + spec.num_bytes])
            for spec in specs
            for name, dtype, shape in layout
            if name == spec.name
        ]
        self.publisher.publish(self._version, tensors)
        self.contents[self._version] = self._live.tobytes()

    def fail_publish(self, num_tensors: int) -> None:
        """The publisher fails after so many tensors."""
        layout = LAYOUTS[self._layout]
        if self._live.size == 0:
            return
        given = 0

        def read(name: str) -> np.ndarray:
            nonlocal given
            if given >= num_tensors:
                raise InterruptedError
            given += 1
            dtype, shape = next((dtype, shape) for other, dtype, shape in layout if other == name)
            return np.full(int(np.prod(shape)) * DTYPES[dtype][1], 7, np.uint8)

        lineage, number = self._version
        try:
            self.publisher.publish_from(PolicyVersion(lineage, number + 1), layout, read)
        except InterruptedError:
            return
        self._version = PolicyVersion(lineage, number + 1)
        self._live = np.full(self._live.size, 7, np.uint8)
        self.contents[self._version] = self._live.tobytes()

    def join(self, upstream: WeightStore) -> None:
        """One more actor, which holds nothing."""
        path = self._directory / f"{len(self.actors)}.safetensors"
        self.actors.append(Receiver(upstream, base=BaseFile(path)))

    def restart(self, relay: Receiver) -> None:
        """The relay was killed and comes back empty; who fetches from it reconnects."""
        self.give_up(relay)
        old, relay.store = relay.store, WeightStore(MAX_BYTES, MAX_DELTA_BYTES)
        relay.latest = None
        for receiver in self.receivers:
            if receiver.upstream is old:
                receiver.upstream = relay.store
                self.reconnect(receiver)

    def forge(self, store: WeightStore, seed: int) -> None:
        """A delta in this store's chain gives other bytes than it should, and its hashes fit: only the total tells."""
        links = store._chain._links
        if not links:
            return
        rng = np.random.default_rng(seed)
        position = len(links) - 1 if seed % 2 else int(rng.integers(len(links)))
        link = links[position]
        data = np.array(link.data)
        if data.size:
            data[rng.integers(data.size)] ^= 1 << int(rng.integers(8))
        else:
            data = rng.integers(0, 256, 9, np.uint8)
        assert link.manifest.parent is not None
        forged = describe_delta(replace(link.manifest, parent=None), link.manifest.parent, data)
        links[position] = Payload(forged, data)

    # --- receivers ----------------------------------------------------------------------------------------------------

    def poll(self, receiver: Receiver) -> None:
        """It hears what is newest, and begins to fetch what is newer than what it has."""
        newest = receiver.upstream.newest
        version = newest.version if newest else None
        if version is not None and (receiver.latest is None or version > receiver.latest):
            receiver.latest = version
        if receiver.fetch is not None:
            self.handle(receiver, Announced(version))
            return
        latest, held = receiver.latest, receiver.held
        if receiver.store is not None and receiver.store.newest is not None:
            held = receiver.store.newest.version
        if latest is None or (held is not None and held >= latest):
            return
        receiver.sink = StoreSink(receiver.store) if receiver.store is not None else receiver.base
        assert receiver.sink is not None
        receiver.fetch = Fetch(latest, "run", receiver.sink, 3, receiver.requests.append)
        pushed = receiver.pushed.take(latest, receiver.sink.have)
        self.num_pushed += pushed is not None
        receiver.fetch.start(pushed)
        self.finish(receiver)

    def push(self, receiver: Receiver, how: int) -> None:
        """Its server pushes the newest version to it, whole or damaged, for now or for later."""
        newest, held = receiver.upstream.newest, receiver.held
        delta = receiver.upstream.delta(newest.version, held) if newest is not None and held is not None else None
        if delta is None:
            return
        data = delta.data.copy()
        if how % 4 == 0 and data.size:
            data[how * 31 % data.size] ^= 4
        sent_bytes = how * 7 % (data.size + 1) if how % 5 == 1 else 0
        if sent_bytes and how % 7:  # else it is lost
            receiver.pushed.put_part(Part(delta.version, held, 0, data[:sent_bytes]))
        receiver.pushed.put(Pushed(delta.manifest, sent_bytes, data[sent_bytes:]))
        if how % 3:
            self.poll(receiver)

    def serve(self, receiver: Receiver, position: int) -> None:
        """One of its requests arrives and is answered; the answer is on its way, and refers to the server's memory."""
        if receiver.requests:
            request = receiver.requests.pop(position % len(receiver.requests))
            reply = answer(receiver.upstream, request)
            receiver.replies.append((reply, b"".join(array.tobytes() for array in reply.arrays)))

    def deliver(self, receiver: Receiver, position: int, what: str = "deliver") -> None:
        """One answer arrives, or is lost, repeated, damaged or cut."""
        if not receiver.replies:
            return
        position %= len(receiver.replies)
        reply, sent = receiver.replies[position] if what == "repeat" else receiver.replies.pop(position)
        assert b"".join(array.tobytes() for array in reply.arrays) == sent, "bytes on their way were changed"
        if reply.command == "CHUNK_REPLY" and what in ("flip", "cut") and reply.arrays[0].size:
            data = reply.arrays[0].copy()
            if what == "flip":
                data[position * 31 % data.size] ^= 4
            else:
                data = data[: position * 31 % data.size]
            reply = replace(reply, arrays=(data,))
        if what != "lose":
            self.handle(receiver, reply)

    def reconnect(self, receiver: Receiver) -> None:
        """What was on its way is lost."""
        receiver.requests.clear()
        receiver.replies.clear()
        self.handle(receiver, Reconnected())

    def handle(self, receiver: Receiver, event: Event) -> None:
        """The fetch takes an event; what it completes must be what its name says."""
        if receiver.fetch is None:
            return
        try:
            receiver.fetch.handle(event)
        except (WeightsSupersededError, WeightsCorruptError, OutOfBudgetError):
            self.give_up(receiver)
            self.check(receiver)
            return
        self.finish(receiver)

    def finish(self, receiver: Receiver) -> None:
        """End the fetch if all of it is there."""
        if receiver.fetch is None or not receiver.fetch.complete:
            return
        try:
            manifest = receiver.fetch.finish()
        except (WeightsSupersededError, WeightsCorruptError, OutOfBudgetError):
            self.give_up(receiver)
            self.check(receiver)
            return
        if manifest is None:
            self.num_refused += 1
            assert receiver.base is None or receiver.base.version is None
            return
        assert receiver.held == manifest.version
        self.num_fetched += 1
        self.num_deltas += manifest.parent is not None
        self.num_anchors += manifest.parent is None
        self.give_up(receiver)
        self.check(receiver)

    def give_up(self, receiver: Receiver) -> None:
        """The fetch has ended, one way or the other."""
        if receiver.sink is not None:
            receiver.sink.abort()
        receiver.fetch = receiver.sink = None
        receiver.requests.clear()

    def check(self, receiver: Receiver) -> None:
        """What it holds, if it says that it holds anything, is bit for bit what was published under that name."""
        version = receiver.held
        if version is None:
            return
        if receiver.base is not None:
            manifest = receiver.base.manifest
            assert manifest is not None
            assert receiver.base.path.read_bytes() == safetensors_header(manifest) + self.contents[version]
        else:
            assert receiver.store is not None
            assert receiver.store.base is not None
            assert receiver.store.base.data.tobytes() == self.contents[version]

    def let_go(self, store: WeightStore) -> None:
        """The server's heartbeat: it says what is being fetched."""
        keys = set()
        for receiver in self.receivers:
            if receiver.upstream is store and receiver.fetch is not None:
                plan = receiver.fetch._plan
                if plan is not None:
                    keys.add((plan.manifest.version, plan.manifest.parent))
        store.keep_only(keys)

    def settle(self) -> None:
        """Nothing goes wrong any more: everybody ends at the newest version."""
        for _ in range(200):
            for receiver in self.receivers:
                if receiver.fetch is not None and not receiver.requests and not receiver.replies:
                    self.reconnect(receiver)
                self.poll(receiver)
                while receiver.requests:
                    self.serve(receiver, 0)
                while receiver.replies:
                    self.deliver(receiver, 0)
            for store in self.stores:
                self.let_go(store)
            if all(receiver.held == self._version for receiver in self.receivers):
                break
        assert all(receiver.held == self._version for receiver in self.receivers)
        for receiver in self.receivers:
            self.check(receiver)
