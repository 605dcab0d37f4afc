"""Keys are made once and for their owner alone; what [security] does not allow is refused in one sentence."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from broker.process.keys import (
    Identity,
    make_keys,
    read_pair,
    read_public,
    read_signing_key,
    secret_path,
    server_key,
)
from broker.process.lifecycle import ErgonError
from broker.process.security import OPEN, is_loopback, load_security
from broker.process.settings import BrokerSection, SecuritySection, Settings, WeightsSection
from broker.process.signing import SigningKey
from deploy.run import check_security


def curve(directory: Path) -> Settings:
    return Settings(security=SecuritySection(mode="curve", keys=directory))


def test_every_identity_gets_a_pair_of_its_own_that_only_its_owner_may_read(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "keys"
    paths = make_keys(directory)
    names = {f"{identity}.secret" for identity in Identity} | {"learner.signing.secret", "public.keys"}
    assert {path.name for path in paths} == names
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    owners = read_public(directory)
    assert sorted(owners.values()) == sorted(Identity)
    for identity in Identity:
        pair = read_pair(directory, identity)
        assert zmq.curve_public(pair.secret) == pair.public
        assert owners[pair.public.decode()] is identity
        assert pair.secret.decode() not in repr(pair)


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    make_keys(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ErgonError, match="holds keys already"):
        make_keys(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for path in tmp_path.iterdir():
        if path.name != "relay.secret":
            path.unlink()
    with pytest.raises(ErgonError, match=r"relay\.secret"):
        make_keys(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_learner_signs_and_whoever_receives_weights_knows_its_key(tmp_path: Path) -> None:
    make_keys(tmp_path)
    learner = load_security(curve(tmp_path), Identity.LEARNER)
    assert learner.signing_key is not None
    signature = learner.signing_key.sign(b"said")
    for identity in (Identity.ACTOR, Identity.RELAY):
        security = load_security(curve(tmp_path), identity)
        assert security.signing_key is None
        assert security.signers is not None
        assert security.signers.accept(b"said", signature)
        assert not security.signers.accept(b"unsaid", signature)
        assert not security.signers.accept(b"said", SigningKey.make().sign(b"said"))
        assert not security.signers.accept(b"said", bytes(64))
    for identity in (Identity.BROKER, Identity.OPERATOR):
        security = load_security(curve(tmp_path), identity)
        assert (security.signing_key, security.signers) == (None, None)
    assert (OPEN.signing_key, OPEN.signers) == (None, None)


def test_the_next_signing_key_counts_beside_the_one_before(tmp_path: Path) -> None:
    make_keys(tmp_path)
    following = SigningKey.make()
    with (tmp_path / "public.keys").open("a") as file:
        file.write(f"signs {z85.encode(following.public).decode()}\n")
    signers = load_security(curve(tmp_path), Identity.ACTOR).signers
    assert signers is not None
    for key in (following, read_signing_key(tmp_path)):
        assert signers.accept(b"said", key.sign(b"said"))


def without_signing(directory: Path) -> None:
    """Keys as earlier versions made them."""
    make_keys(directory)
    (directory / "learner.signing.secret").unlink()
    public = directory / "public.keys"
    lines = [line for line in public.read_text().splitlines() if not line.startswith("signs")]
    public.write_text("\n".join(lines))


def test_keys_of_an_earlier_version_say_what_to_do_and_get_what_they_lack(tmp_path: Path) -> None:
    without_signing(tmp_path)
    before = {identity: read_pair(tmp_path, identity) for identity in Identity}
    for identity in (Identity.LEARNER, Identity.ACTOR, Identity.RELAY):
        with pytest.raises(ErgonError, match=r"earlier version: `ergon keys make .* adds one.* then copy"):
            load_security(curve(tmp_path), identity)
    load_security(curve(tmp_path), Identity.BROKER)
    assert [path.name for path in make_keys(tmp_path)] == ["learner.signing.secret"]
    assert stat.S_IMODE((tmp_path / "learner.signing.secret").stat().st_mode) == 0o600
    assert {identity: read_pair(tmp_path, identity) for identity in Identity} == before
    for identity in Identity:
        load_security(curve(tmp_path), identity)
    with pytest.raises(ErgonError, match="holds keys already"):
        make_keys(tmp_path)


def test_a_signing_key_that_is_not_listed_says_what_to_add(tmp_path: Path) -> None:
    make_keys(tmp_path)
    line = next(line for line in (tmp_path / "public.keys").read_text().splitlines() if line.startswith("signs"))
    (tmp_path / "learner.signing.secret").write_text(z85.encode(SigningKey.make().secret).decode())
    with pytest.raises(ErgonError, match=r"is not listed in .*add the line `signs ") as caught:
        load_security(curve(tmp_path), Identity.LEARNER)
    assert line not in str(caught.value)
    (tmp_path / "learner.signing.secret").write_text("hunter2")
    with pytest.raises(ErgonError, match="not 40 characters of Z85") as caught:
        load_security(curve(tmp_path), Identity.LEARNER)
    assert "hunter2" not in str(caught.value)


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ErgonError, match="cannot be written"):
        make_keys(tmp_path / "file" / "keys")


def test_a_second_key_of_an_identity_is_let_in_and_the_first_is_shown(tmp_path: Path) -> None:
    make_keys(tmp_path)
    first = read_pair(tmp_path, Identity.BROKER).public
    other, _ = zmq.curve_keypair()
    with (tmp_path / "public.keys").open("a") as file:
        file.write(f"\n# the next one\nbroker {other.decode()}\n")
    assert read_public(tmp_path)[other.decode()] is Identity.BROKER
    assert server_key(tmp_path, Identity.BROKER) == first


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cook {key}", "line 2: 'cook' is no identity; allowed: actor, learner, relay, operator, broker, signs"),
        ("actor", "line 2: the public key is not 40 characters of Z85"),
        ("actor " + 40 * "~", "line 2: the public key is not 40 characters of Z85"),
        ("actor {key}\nlearner {key}", "line 3: the key of actor again, for learner"),
        ("actör {key}", "not ASCII"),
    ],
)
def test_a_bad_line_of_the_allow_list_is_named(tmp_path: Path, line: str, expected: str) -> None:
    key = zmq.curve_keypair()[0].decode()
    (tmp_path / "public.keys").write_text("# head\n" + line.replace("{key}", key))
    with pytest.raises(ErgonError, match=expected):
        read_public(tmp_path)


def test_a_secret_that_everybody_may_read_is_refused(tmp_path: Path) -> None:
    make_keys(tmp_path)
    path = secret_path(tmp_path, Identity.ACTOR)
    path.chmod(0o640)
    read_pair(tmp_path, Identity.ACTOR)
    path.chmod(0o644)
    with pytest.raises(ErgonError, match="chmod it to 600"):
        read_pair(tmp_path, Identity.ACTOR)


def test_a_malformed_secret_is_refused_and_not_shown(tmp_path: Path) -> None:
    make_keys(tmp_path)
    secret_path(tmp_path, Identity.ACTOR).write_text("hunter2\n")
    with pytest.raises(ErgonError, match=r"actor\.secret: the secret key is not 40") as caught:
        read_pair(tmp_path, Identity.ACTOR)
    assert "hunter2" not in str(caught.value)


def test_missing_and_unlisted_keys_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ErgonError, match="ergon keys make"):
        load_security(curve(tmp_path), Identity.ACTOR)
    make_keys(tmp_path)
    public = tmp_path / "public.keys"
    public.write_text("".join(line for line in public.read_text().splitlines(True) if not line.startswith("actor")))
    with pytest.raises(ErgonError, match="is not listed for actor") as caught:
        load_security(curve(tmp_path), Identity.ACTOR)
    assert f"actor {read_pair(tmp_path, Identity.ACTOR).public.decode()}" in str(caught.value)
    load_security(curve(tmp_path), Identity.LEARNER)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("localhost", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("*", False),
        ("10.0.0.7", False),
        ("[::]", False),
        ("eth0", False),
        ("broker", False),
        ("", False),
        ("[bad", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(f"tcp://{host}:7700") is expected


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (Settings(broker=BrokerSection(host="0.0.0.0")), "broker.host"),
        (Settings(weights=WeightsSection(host="10.1.2.3")), "weights.host"),
        (Settings(weights=WeightsSection(relay_host="relay")), "weights.relay_host"),
    ],
)
@pytest.mark.parametrize("identity", Identity)
def test_without_keys_an_open_address_is_refused_everywhere(settings: Settings, key: str, identity: Identity) -> None:
    with pytest.raises(ErgonError, match=f'{key} = .* security.mode = "curve"'):
        load_security(settings, identity)


def test_the_default_is_open_on_loopback() -> None:
    assert load_security(Settings(), Identity.BROKER) is OPEN


def test_no_server_binds_an_open_address_without_keys() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        OPEN.protect_server(router, "tcp://127.0.0.1:*", "experience")
        with pytest.raises(ErgonError, match="open to everybody"):
            OPEN.protect_server(router, "tcp://0.0.0.0:*", "experience")


def test_a_run_with_keys_needs_those_of_all_its_processes_before_it_starts(tmp_path: Path) -> None:
    make_keys(tmp_path)
    check_security(curve(tmp_path))
    secret_path(tmp_path, Identity.RELAY).unlink()
    with pytest.raises(ErgonError, match=r"relay\.secret cannot be read"):
        check_security(curve(tmp_path))
