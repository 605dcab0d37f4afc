"""One good message of every command of the weight channel, and how each is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec import msgpack

from broker.protocol import frames
from broker.protocol import weight_messages as messages
from broker.protocol.commands import Body, parse_body
from broker.protocol.frames import Message
from tests.unit.weights.samples import OLDER, VERSION, changed, snapshot

MANIFEST, SNAPSHOT = snapshot()
PUSHED, PAYLOAD, _ = changed(*snapshot(version=OLDER), VERSION, seed=1, num_changes=3000)
GOOD = {
    message.command: message
    for message in (
        messages.Hello(role=messages.Role.RELAY, peer_id="relay-0", run_id="run", session="s").pack(),
        messages.Welcome(run_id="run", heartbeat_s=0.5, liveness=15).pack(),
        messages.Watch(have=VERSION, push_bytes=65_536).pack(),
        messages.Announce(newest=VERSION, num_bytes=9, proof=None).pack(),
        messages.manifest_request(VERSION, OLDER),
        messages.manifest_reply(MANIFEST),
        messages.push_part(messages.Part(VERSION, OLDER, 1000, PAYLOAD[1000:3000])),
        messages.push(PUSHED, PAYLOAD, 3000),
        messages.chunk_request(VERSION, OLDER, 7),
        messages.chunk_reply(VERSION, OLDER, 7, np.arange(5, dtype="u1")),
    )
}


def typed(body: type[Body]) -> Callable[[Message], object]:
    return lambda message: parse_body(message, body)


BODIES: dict[str, type[Body]] = {
    body.COMMAND: body
    for body in (
        messages.Hello,
        messages.Welcome,
        messages.Watch,
        messages.Announce,
        messages.ManifestRequest,
        messages.ManifestReply,
        messages.PushPart,
        messages.Push,
        messages.ChunkRequest,
        messages.ChunkReply,
    )
}
READERS = {command: typed(body) for command, body in BODIES.items()} | {
    "MANIFEST_REPLY": messages.read_manifest,
    "PUSH_PART": messages.read_part,
    "PUSH": messages.read_push,
    "CHUNK_REPLY": messages.read_chunk,
}


def over_the_wire(message: Message) -> Message:
    return frames.decode([bytes(frame) for frame in frames.encode(message)])


def body_of(message: Message) -> dict[str, Any]:
    body = msgpack.decode(message.body)
    assert isinstance(body, dict)
    return body


def with_body(message: Message, body: object) -> Message:
    return Message(message.command, msgpack.encode(body), message.arrays)
