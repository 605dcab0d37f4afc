"""Part 2 of PROTOCOL.md says what the code sends: the same commands, the same keys, the same limits."""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import msgpack

import broker
from broker.process.settings import WeightsSection
from broker.protocol import weight_messages as messages
from broker.protocol.commands import ErrorBody, Heartbeat
from broker.protocol.weights import DTYPES, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES
from broker.weights.peers import MAX_REQUEST_BYTES, SEND_QUEUE
from broker.weights.server import MAX_WAITING
from broker.weights.subscriber import REPLY_LIMITS
from tests.unit.weights.samples import VERSION, snapshot

PART = (Path(broker.__file__).parent / "PROTOCOL.md").read_text(encoding="utf-8").split("# Part 2: Weight channel")[1]


def rows() -> dict[str, tuple[str, set[str]]]:
    """Command -> (sender, keys of the body) as the page has them."""
    table = re.findall(r"^\| ([A-Z_]+) \| (receiver|server|both) \|(.*?)\|.*\|$", PART, re.MULTILINE)
    return {name: (sender, set(re.findall(r"`(\w+)`", body))) for name, sender, body in table}


def test_commands_and_senders() -> None:
    senders = {name: sender for name, (sender, _) in rows().items()}
    assert {n for n, sender in senders.items() if sender in ("receiver", "both")} == set(messages.FROM_RECEIVER)
    assert {n for n, sender in senders.items() if sender in ("server", "both")} == set(messages.FROM_SERVER)
    assert {Heartbeat.COMMAND, ErrorBody.COMMAND} <= senders.keys()


def test_keys() -> None:
    manifest, data = snapshot()
    for message in (
        messages.Hello(role=messages.Role.RELAY, peer_id="p", run_id="run", session="s").pack(),
        messages.Watch(have=None, push_bytes=0).pack(),
        messages.Announce(newest=None, num_bytes=0, proof=None).pack(),
        messages.manifest_request(VERSION, None),
        messages.chunk_request(VERSION, None, 0),
        messages.chunk_reply(VERSION, None, 0, data),
        messages.push_part(messages.Part(VERSION, VERSION, 0, data)),
        messages.Welcome(run_id="run", heartbeat_s=1.0, liveness=15).pack(),
    ):
        keys = rows()[message.command][1] - ({*messages.Role} if message.command == "HELLO" else set())
        assert keys == msgpack.decode(message.body).keys(), message.command
    section = PART.split("## Manifest")[1].split("\n## ")[0]
    keys = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))))
    assert keys == msgpack.decode(messages.manifest_reply(manifest).body).keys()
    assert all(f"`{word}`" in section or word in section for word in DTYPES)
    assert keys | {"sent_bytes"} == msgpack.decode(messages.push(manifest, data).body).keys()
    assert rows()["PUSH"][1] == {"sent_bytes"}


def test_limits() -> None:
    assert f"{MIN_CHUNK_BYTES:,} to {MAX_CHUNK_BYTES:,}" in PART
    assert f"the credit is 1 to {MAX_WAITING}" in PART
    assert f"at most {SEND_QUEUE} messages per peer" in PART
    assert f"at most {MAX_REQUEST_BYTES >> 10} KiB" in PART
    assert REPLY_LIMITS.max_frames == 4
    assert "a reply has at most four frames" in PART
    push_mb = WeightsSection.model_fields["push_mb"]
    assert next(m.le for m in push_mb.metadata if hasattr(m, "le")) << 20 == MAX_CHUNK_BYTES
    assert f"at most {REPLY_LIMITS.max_envelope_bytes >> 20} MiB each" in PART
    credit = next(m for m in WeightsSection.model_fields["credit"].metadata if hasattr(m, "le"))
    assert credit.le == MAX_WAITING
