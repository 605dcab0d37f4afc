"""A fetch without a socket: what it asks for, and the answers to that, one by one."""

from __future__ import annotations

import pytest
import safetensors

from broker.process.signing import Signers
from broker.protocol import weight_messages as messages
from broker.protocol.commands import error_message, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Bytes, Manifest
from broker.weights.basefile import BaseFile
from broker.weights.fetch import Fetch
from broker.weights.sinks import StoreSink
from tests.unit.weights.samples import VERSION

NEWER = PolicyVersion(3, 18)
NOT_HELD = error_message(ProtocolError(ErrorCode.NOT_FOUND, "gone"), messages.version_text(VERSION))


class Harness:
    """A fetch whose messages are caught, and which is answered by hand."""

    def __init__(
        self,
        sink: BaseFile | StoreSink,
        credit: int = 4,
        version: PolicyVersion = VERSION,
        signers: Signers | None = None,
    ) -> None:
        self.sent: list[Message] = []
        self.fetch = Fetch(version, "run", sink, credit, self.sent.append, signers)
        self.fetch.start()

    def take(self) -> list[Message]:
        sent, self.sent = self.sent, []
        self.fetch._send = self.sent.append
        return sent


def serve(message: Message, manifest: Manifest, data: Bytes) -> Message:
    if message.command == "MANIFEST":
        return messages.manifest_reply(manifest)
    assert message.command == "CHUNK"
    request = parse_body(message, messages.ChunkRequest)
    assert messages.policy_version(request.parent) == manifest.parent
    start, end = manifest.chunk_range(request.index)
    return messages.chunk_reply(manifest.version, manifest.parent, request.index, data[start:end])


def run_to_end(harness: Harness, manifest: Manifest, data: Bytes) -> None:
    while not harness.fetch.complete:
        sent = harness.take()
        assert sent, "the fetch waits although everything was answered"
        for message in sent:
            harness.fetch.handle(serve(message, manifest, data))
    assert harness.fetch.finish() is not None


def fill(base: BaseFile, manifest: Manifest, data: Bytes) -> None:
    """Make it hold this snapshot, as an anchor."""
    run_to_end(Harness(base, version=manifest.version), manifest, data)


def assert_holds_nothing(base: BaseFile) -> None:
    """It says so, and nobody could load the file either."""
    assert (base.version, base.have) == (None, None)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(base.path.read_bytes())
