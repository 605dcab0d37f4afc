"""PROTOCOL.md says what the code does: commands and their fields, limits, error codes, ticket states, an example."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
from msgspec import inspect

import broker
from broker.exchange.dispatch import HANDLERS
from broker.ledger.table import TRANSITIONS
from broker.protocol import array_checks, codec, commands, frames, partials
from broker.protocol.commands import COMMANDS, HandoverStatus, ReleaseReason, Role, SendStatus
from broker.protocol.errors import FATAL_CODES, ErrorCode
from broker.protocol.frames import DEFAULT_LIMITS
from broker.protocol.trajectory import Facts, Outcome
from tests.contract import golden

DOCUMENT = (Path(broker.__file__).parent / "PROTOCOL.md").read_text()
PART_1 = DOCUMENT[: DOCUMENT.index("# Part 2")]
LITERALS = (SendStatus, ReleaseReason, HandoverStatus)
LARGEST = 1.7976931348623157e308


def section(heading: str) -> str:
    """What stands between a heading and the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}$", PART_1, re.MULTILINE)
    assert found, heading
    return re.split(r"^#+ ", PART_1[found.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def tables(heading: str) -> list[list[list[str]]]:
    """The tables of a section, without their headers, code marks removed."""
    found = re.findall(r"(?:^\|.*\n)+", section(heading), re.MULTILINE)
    return [
        [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
        for text in found
    ]


def table(heading: str) -> list[list[str]]:
    """The first of them."""
    return tables(heading)[0]


def num_arrays(body: type[Facts]) -> str:
    """Of a parcel, or of a partial."""
    fields = body.__struct_fields__
    names = array_checks.ARRAY_NAMES if "items" in fields else partials.PARTIAL_NAMES if "segments" in fields else ()
    return str(len(names)) if names else ""


def test_every_command_is_documented_as_it_is() -> None:
    documented = {row[0]: (row[1], row[2], row[3], row[4]) for row in table("Commands")}
    real = {
        name: (
            spec.sender,
            ", ".join(role.value for role in Role if role in spec.roles),
            ", ".join(spec.body.__struct_fields__),
            num_arrays(spec.body),
        )
        for name, spec in COMMANDS.items()
    }
    assert documented == real


# --- the fields, down to the last nested one


def bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    low = f"> {kind.gt:g}" if kind.gt is not None else f"≥ {kind.ge:g}" if kind.ge is not None else ""
    high = "" if kind.le in (None, LARGEST) else f"≤ {kind.le:g}".replace("1e+09", "1e9")
    return ", ".join(part for part in (low, high) if part)


def spell_number(kind: inspect.IntType | inspect.FloatType) -> str:
    if isinstance(kind, inspect.IntType):
        if kind.lt == 2**53:
            return {0: "count", 1: "positive"}[kind.ge]  # type: ignore[index]
        return f"integer, {kind.ge} to {kind.le:,}"
    assert kind.le is not None, "NaN would pass"
    if kind.ge == -LARGEST:
        return "number"
    return "seconds" if (kind.ge, kind.le) == (0, LARGEST) else f"number {bounds(kind)}"


def spell_text(kind: inspect.StrType | inspect.EnumType | inspect.LiteralType) -> str:
    if isinstance(kind, inspect.StrType):
        if kind.min_length == 1 and kind.max_length == 256:
            return "name"
        assert kind.min_length is None
        return "text" if kind.max_length is None else f"text ≤ {kind.max_length:,}"
    if isinstance(kind, inspect.EnumType):
        return f"one of {', '.join(kind.cls)}"
    (order,) = [words for each in LITERALS if set(words := get_args(each)) == set(kind.values)]
    return f"one of {', '.join(order)}"


def spell(kind: inspect.Type) -> str:
    """A type in the words of PROTOCOL.md."""
    match kind:
        case inspect.StrType() | inspect.EnumType() | inspect.LiteralType():
            return spell_text(kind)
        case inspect.IntType() | inspect.FloatType():
            return spell_number(kind)
        case inspect.BoolType():
            return "flag"
        case inspect.NamedTupleType(cls=cls):
            return {"PolicyVersion": "version", "VersionRun": "run"}[cls.__name__]
        case inspect.StructType(cls=cls):
            return cls.__name__
        case inspect.TupleType(item_types=kinds):
            return f"[{', '.join(map(spell, kinds))}]"
        case inspect.VarTupleType(item_type=item, min_length=low, max_length=high):
            many = "" if high is None else f", {low} to {high:,}" if low else f", ≤ {high:,}"
            return f"list of {spell(item)}{many}"
        case inspect.DictType(value_type=value):
            return f"map of {spell(value)}"
        case inspect.UnionType(types=kinds):
            return " or ".join("null" if isinstance(one, inspect.NoneType) else spell(one) for one in kinds)
    raise AssertionError(f"PROTOCOL.md has no word for {kind}")


def spell_default(field: inspect.Field) -> str:
    if field.required:
        return ""
    if field.default_factory is not msgspec.NODEFAULT:
        return str(field.default_factory())
    if isinstance(field.default, Facts):
        assert field.default == type(field.default)(), f"{field.name}: the default is not what its own defaults make"
        return "its own"
    value = msgspec.to_builtins(field.default)
    plain = {None: "null", True: "true", False: "false", (): "[]", "": '""'}
    if isinstance(value, tuple | list):
        return str(list(value))
    return plain[value] if value is None or isinstance(value, bool) or value == "" else str(value)


def nested(kind: Any) -> Iterator[type[Facts]]:
    """All structs in a type."""
    if isinstance(kind, inspect.StructType):
        assert kind.forbid_unknown_fields, kind.cls
        yield kind.cls
        for field in kind.fields:
            yield from nested(field.type)
    for name in ("item_type", "value_type"):
        if hasattr(kind, name):
            yield from nested(getattr(kind, name))
    for name in ("types", "item_types"):
        for inner in getattr(kind, name, ()):
            yield from nested(inner)


def test_every_field_is_documented_as_it_is() -> None:
    documented: dict[str, list[tuple[str, str, str]]] = {}
    for rows in tables("Fields")[1:]:
        for of, name, kind, default, _ in rows:
            owner = of or owner  # noqa: F821  (the first row of a table names it)
            documented.setdefault(owner, []).append((name, kind, default))
    real = {}
    for command, spec in COMMANDS.items():
        for struct in nested(inspect.type_info(spec.body)):
            info = inspect.type_info(struct)
            assert isinstance(info, inspect.StructType)
            name = command if struct is spec.body else struct.__name__
            real[name] = [(field.encode_name, spell(field.type), spell_default(field)) for field in info.fields]
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


def test_every_send_status_and_every_outcome_is_documented() -> None:
    assert {row[0] for row in table("Actor")} == set(SendStatus.__args__)  # type: ignore[attr-defined]
    assert {name for row in table("Trajectories") for name in row[0].split(", ")} == set(Outcome)


def test_every_status_of_a_handover_is_documented() -> None:
    assert [row[0] for row in table("Partials")] == list(get_args(HandoverStatus))


# --- limits


def test_the_stated_limits_are_the_real_ones() -> None:
    assert f"Ergon wire protocol {frames.PROTOCOL_MAJOR}.{frames.PROTOCOL_MINOR}" in DOCUMENT
    limits = DEFAULT_LIMITS
    stated = f"{limits.max_frames:,} frames, {limits.max_envelope_bytes >> 20} MiB of envelope, "
    stated += f"{limits.max_array_bytes >> 20} MiB an array, {limits.max_dims} dimensions, "
    assert f"{stated}{limits.max_message_bytes >> 20:,} MiB a message" in DOCUMENT
    assert ", ".join(f"`{name}`" for name in frames.DTYPES) in " ".join(DOCUMENT.split())


def test_the_limits_in_the_table_are_the_real_ones() -> None:
    documented = {row[0]: row[1] for row in table("Limits")}
    names = {name for name in commands.__all__ if name.startswith("MAX_") or name.endswith("_BYTES")}
    real = {name: f"{getattr(commands, name):,}" for name in names - {"MAX_ERROR_CHARACTERS"}}
    assert documented == real | {"MAX_BODY_BYTES": f"{codec.MAX_BODY_BYTES:,}"}


def test_what_the_text_says_of_a_parcel_is_so() -> None:
    parcels = section("Parcels")
    assert f"of 1 to {commands.MAX_ITEMS} tickets of one actor" in parcels
    assert f"has at most {commands.PARCEL_BYTES >> 20} MiB of arrays" in parcels
    assert f"arrays have more than {commands.OFFER_BYTES >> 20} MiB" in section("Actor")
    assert commands.OFFER_BYTES <= commands.PARCEL_BYTES, "a parcel of several would have to be offered"
    assert f"finite and ≤ {array_checks.MAX_LOGPROB:g} where the mask is 1" in parcels
    for name, dtype in zip(("token ids", "loss mask", "log-probs"), array_checks.ARRAY_DTYPES, strict=True):
        assert f"{name} `{dtype.str}`" in " ".join(parcels.split())


def test_what_the_text_says_of_a_partial_is_so() -> None:
    text = " ".join(section("Partials").split())
    assert f"Its body has at most {partials.MAX_PARTIAL_BODY_BYTES:,} bytes" in text
    assert f"at most {commands.MAX_SNAPSHOT_BYTES >> 20} MiB" in text
    assert f"more than {commands.OFFER_BYTES >> 20} MiB of arrays it SHOULD be offered first" in text


# --- the example


def test_the_example_is_the_golden_parcel() -> None:
    example = section("An example").split("```")[1]
    shown = {}
    for block in example.strip().split("\n\n"):
        lines = [re.match(r"(?:\d)?\s+((?:[0-9a-f]{2}(?: |$))+)", line) for line in block.splitlines()]
        shown[block[0]] = bytes.fromhex("".join(line[1] for line in lines if line))
    wire = golden.by_hand("trajectory")
    assert {int(number): shown[number] for number in "0234"} == {number: wire[number] for number in (0, 2, 3, 4)}


def test_the_envelope_of_the_example_is_the_golden_one() -> None:
    text = " ".join(section("An example").split("```")[1].split())
    envelope = golden.ENVELOPES["trajectory"]
    for number, item in enumerate(envelope["b"]["items"]):
        head = item["head"]
        assert f'{{"ticket_id": "{head["ticket"]["ticket_id"]}", …}}, "kind": "{head["kind"]}"' in text, number
        assert f'"outcome": "{head["outcome"]}", "reward": {head["reward"]}' in text, number
        for segment in item["segments"]:
            assert str(segment).replace("'", '"') in text, number
    assert f'"a": {envelope["a"]}}}'.replace("'", '"') in text
    answer = golden.ENVELOPES["durable"]
    assert f"`{answer}`".replace("'", '"') in section("An example")
