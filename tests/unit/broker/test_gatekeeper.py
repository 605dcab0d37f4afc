"""The ZAP mapping: which key is whose, who has business where, and a list that changes while it is in use."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from broker.exchange.peers import ADMITTED as EXPERIENCE
from broker.process.gatekeeper import AllowList, judge
from broker.process.keys import Identity, make_keys, read_pair
from broker.weights.peers import ADMITTED as WEIGHTS


def request(key: bytes, mechanism: bytes = b"CURVE", version: bytes = b"1.0") -> list[bytes]:
    return [version, b"1", b"experience", b"127.0.0.1", b"", mechanism, key]


@pytest.fixture
def allowed(tmp_path: Path) -> AllowList:
    make_keys(tmp_path)
    return AllowList(tmp_path)


@pytest.mark.parametrize(
    ("admitted", "let_in"),
    [(EXPERIENCE, {"actor", "learner", "operator"}), (WEIGHTS, {"actor", "relay", "operator"})],
)
def test_each_channel_lets_in_who_has_business_there(
    tmp_path: Path, allowed: AllowList, admitted: frozenset[Identity], let_in: set[str]
) -> None:
    for identity in Identity:
        key = z85.decode(read_pair(tmp_path, identity).public)
        expected = "" if identity.value in let_in else "wrong_role"
        assert judge(request(key), allowed.owner, admitted) == (identity, expected)


@pytest.mark.parametrize(
    "bad",
    [
        request(z85.decode(zmq.curve_keypair()[0])),
        request(b""),
        request(bytes(31)),
        request(b"", b"NULL"),
        request(b"user", b"PLAIN"),
        request(bytes(32), version=b"2.0"),
        request(bytes(32))[:6],
        [],
    ],
)
def test_everybody_else_is_unknown(allowed: AllowList, bad: list[bytes]) -> None:
    assert judge(bad, allowed.owner, EXPERIENCE) == (None, "unknown_key")


def test_a_changed_list_holds_at_once_and_a_broken_one_not_at_all(tmp_path: Path, allowed: AllowList) -> None:
    path = tmp_path / "public.keys"
    actor = read_pair(tmp_path, Identity.ACTOR).public.decode()
    newcomer = zmq.curve_keypair()[0].decode()
    assert allowed.owner(newcomer) is None
    text = path.read_text()
    path.write_text(f"{text}actor {newcomer}\n")
    assert allowed.owner(newcomer) is Identity.ACTOR
    path.write_text("cook 123\n")
    assert allowed.owner(actor) is Identity.ACTOR
    path.unlink()
    assert allowed.owner(newcomer) is Identity.ACTOR
    path.with_suffix(".next").write_text(text.replace(f"actor {actor}", f"actor {newcomer}"))
    path.with_suffix(".next").replace(path)
    assert allowed.owner(actor) is None
    assert allowed.owner(newcomer) is Identity.ACTOR
