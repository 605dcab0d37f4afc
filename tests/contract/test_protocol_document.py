"""PROTOCOL.md says what the code does: commands, error codes, ticket states; and golden bytes that never change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import broker
from broker.exchange.dispatch import HANDLERS
from broker.ledger.table import TRANSITIONS
from broker.protocol import frames
from broker.protocol.codec import trajectory_from_message, trajectory_to_message
from broker.protocol.commands import COMMANDS, Hello, Role, SendStatus, parse_body
from broker.protocol.errors import FATAL_CODES, ErrorCode
from broker.protocol.frames import DEFAULT_LIMITS, Message, decode, encode
from tests.unit.broker.samples import make_ticket, make_trajectory

DOCUMENT = (Path(broker.__file__).parent / "PROTOCOL.md").read_text()
PART_1 = DOCUMENT[: DOCUMENT.index("# Part 2")]
GOLDEN = Path(__file__).parent / "golden"


def table(heading: str, text: str = PART_1) -> list[list[str]]:
    """The first table after a heading, without its header, code marks removed."""
    section = text[re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE).end() :]  # type: ignore[union-attr]
    lines = [
        line for line in section[: section.index("\n\n", section.index("\n|"))].splitlines() if line.startswith("|")
    ]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_command_is_documented_as_it_is() -> None:
    documented = {row[0]: (row[1], row[2], row[3], bool(row[4])) for row in table("Commands")}
    real = {
        name: (
            spec.sender,
            ", ".join(role.value for role in Role if role in spec.roles),
            ", ".join(spec.body.model_fields),
            "segments" in spec.body.model_fields,
        )
        for name, spec in COMMANDS.items()
    }
    assert documented == real


def test_the_broker_handles_every_command_of_its_peers() -> None:
    served_by_itself = {"HELLO", "STATUS", "INSPECT", "OFFER"}
    assert HANDLERS.keys() | served_by_itself == {name for name, spec in COMMANDS.items() if spec.sender != "broker"}


def test_every_error_code_is_documented() -> None:
    documented = {row[0]: row[1] for row in table("Errors")}
    assert documented == {code.value: "yes" if code in FATAL_CODES else "no" for code in ErrorCode}


def test_every_transition_is_documented() -> None:
    documented = {row[0]: (row[1], row[2]) for row in table("Ticket states")}
    real = {name: (", ".join(sorted(origins)), target.value) for name, (origins, target) in TRANSITIONS.items()}
    assert documented == real


def test_every_send_status_is_documented() -> None:
    assert {row[0] for row in table("Actor")} == set(SendStatus.__args__)  # type: ignore[attr-defined]


def test_the_stated_limits_are_the_real_ones() -> None:
    assert f"Ergon wire protocol {frames.PROTOCOL_MAJOR}.{frames.PROTOCOL_MINOR}" in DOCUMENT
    limits = DEFAULT_LIMITS
    stated = f"{limits.max_frames:,} frames, {limits.max_envelope_bytes >> 20} MiB of envelope, "
    stated += f"{limits.max_array_bytes >> 20} MiB an array, {limits.max_dims} dimensions, "
    assert f"{stated}{limits.max_message_bytes >> 20:,} MiB a message" in DOCUMENT
    assert ", ".join(f"`{name}`" for name in frames.DTYPES) in " ".join(DOCUMENT.split())


def hello() -> Message:
    return Hello(role=Role.ACTOR, peer_id="actor-0", run_id="run", session="5e55").pack()


def trajectory() -> Message:
    return trajectory_to_message(make_trajectory(make_ticket("a1")))


@pytest.mark.parametrize(("name", "make"), [("hello", hello), ("trajectory", trajectory)])
def test_the_bytes_on_the_wire_are_the_golden_ones(name: str, make: object) -> None:
    """A difference means another protocol: raise the version, then write the golden file anew from the hex shown."""
    assert callable(make)
    lines = (GOLDEN / f"{name}.hex").read_text().split()
    assert [bytes(frame).hex() for frame in encode(make())] == lines


def test_the_golden_bytes_still_mean_the_same() -> None:
    wire = [bytes.fromhex(line) for line in (GOLDEN / "hello.hex").read_text().split()]
    assert parse_body(decode(wire), Hello).peer_id == "actor-0"
    wire = [bytes.fromhex(line) for line in (GOLDEN / "trajectory.hex").read_text().split()]
    received, original = trajectory_from_message(decode(wire)), make_trajectory(make_ticket("a1"))
    assert received.head == original.head
    assert received.segments[0].logprobs_T.tolist() == original.segments[0].logprobs_T.tolist()
