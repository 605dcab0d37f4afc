"""The key files of a run: who holds which CURVE key pair, whose public keys are let in, and who signs weights.

A key directory holds one `IDENTITY.secret` per identity (one line, the secret key in Z85), `learner.signing.secret`
(the same, of an Ed25519 key) and `public.keys`, the list of all: lines `IDENTITY PUBLIC_KEY`, and `signs PUBLIC_KEY`
for who signs versions of the weights; lines that begin with `#` are comments. A process needs its own secret file and
that list, the learner its signing key, too. Several lines of one identity are several keys that are let in; as a
server, an identity shows the first. Several `signs` are several keys that count. Reads and writes these files; knows no
socket.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

import zmq
from zmq.utils import z85

from broker.process.lifecycle import ErgonError
from broker.process.signing import SigningKey

PUBLIC_FILE: Final = "public.keys"
SIGNING_FILE: Final = "learner.signing.secret"
SIGNS: Final = "signs"
KEY_CHARACTERS: Final = 40  # 32 bytes in Z85
_HEAD: Final = (
    "# Public keys that are let in, one IDENTITY KEY a line; the first of an identity is what it shows as a server.\n"
    "# Weights are believed that a key in a line `signs KEY` has signed.\n"
)


class Identity(StrEnum):
    """Whom a key pair belongs to. An actor, a learner and an operator take the role of the same name."""

    ACTOR = "actor"
    LEARNER = "learner"
    RELAY = "relay"
    OPERATOR = "operator"
    BROKER = "broker"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair in Z85, 40 bytes each."""

    public: bytes
    secret: bytes = field(repr=False)


def secret_path(directory: Path, identity: Identity) -> Path:
    """Where the secret key of an identity is."""
    return directory / f"{identity}.secret"


def make_keys(directory: Path) -> list[Path]:
    """Make a key pair for every identity, and one to sign with; returns the files, readable by their owner alone.

    A directory that has all but the one to sign with, which earlier versions did not make, gets that. Raises ErgonError
    where keys are there already, or the directory cannot be written.
    """
    paths = {identity: secret_path(directory, identity) for identity in Identity}
    public, signing = directory / PUBLIC_FILE, directory / SIGNING_FILE
    taken = [path for path in (*paths.values(), public, signing) if path.exists()]
    key = SigningKey.make()
    signs = f"{SIGNS} {z85.encode(key.public).decode()}\n"
    try:
        if taken == [*paths.values(), public] and not read_signers(directory):
            _write_new(signing, z85.encode(key.secret).decode() + "\n")
            with public.open("a", encoding="ascii") as file:
                file.write(("" if _read(public).endswith("\n") else "\n") + signs)
            return [signing]
        if taken:
            names = ", ".join(path.name for path in taken)
            raise ErgonError(f"{directory} holds keys already ({names}); name another directory or remove them")
        pairs = {identity: KeyPair(*zmq.curve_keypair()) for identity in Identity}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for identity, path in paths.items():
            _write_new(path, pairs[identity].secret.decode() + "\n")
        _write_new(signing, z85.encode(key.secret).decode() + "\n")
        lines = [f"{identity} {pair.public.decode()}\n" for identity, pair in pairs.items()]
        _write_new(public, _HEAD + "".join(lines) + signs)
    except OSError as error:
        raise ErgonError(f"keys cannot be written to {directory} ({error.strerror}); name another directory") from error
    return [*paths.values(), signing, public]


def _write_new(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def read_pair(directory: Path, identity: Identity) -> KeyPair:
    """The key pair of an identity. Raises ErgonError where the file is missing, malformed or readable by everybody."""
    text = _read_secret(secret_path(directory, identity))
    return KeyPair(zmq.curve_public(text.encode()), text.encode())


def read_signing_key(directory: Path) -> SigningKey:
    """What the learner signs with. Raises ErgonError as `read_pair` does, and where the list does not name it."""
    path = directory / SIGNING_FILE
    if not path.exists():
        raise ErgonError(
            f"{directory} has no key to sign weights with ({SIGNING_FILE}), so its keys are of an earlier version: "
            f"`ergon keys make {directory}` adds one; then copy {PUBLIC_FILE} to every machine of the run again"
        )
    key = SigningKey(z85.decode(_read_secret(path)))
    if key.public not in read_signers(directory):
        raise ErgonError(
            f"the key in {path} is not listed in {directory / PUBLIC_FILE}; add the line "
            f"`{SIGNS} {z85.encode(key.public).decode()}` there, on every machine of the run"
        )
    return key


def read_signers(directory: Path) -> list[bytes]:
    """The public keys, 32 bytes each, of who signs weights. Raises ErgonError where a line is wrong."""
    return [z85.decode(key) for name, key, _ in _public_lines(directory) if name == SIGNS]


def read_public(directory: Path) -> Mapping[str, Identity]:
    """Whose key each allowed public key is, in the order of the file. Raises ErgonError where a line is wrong."""
    owners: dict[str, Identity] = {}
    for name, key, where in _public_lines(directory):
        if name != SIGNS and owners.setdefault(key, Identity(name)) != name:
            raise ErgonError(f"{where}: the key of {owners[key]} again, for {name}; a key has one identity")
    return owners


def _public_lines(directory: Path) -> Iterator[tuple[str, str, str]]:
    """What each line of the list names, its key, and where that is."""
    path = directory / PUBLIC_FILE
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path}, line {number}"
        name, _, key = line.strip().partition(" ")
        if name not in {*Identity, SIGNS}:
            raise ErgonError(f"{where}: {name!r:.40} is no identity; allowed: {', '.join(Identity)}, {SIGNS}")
        _check_key(key.strip(), f"{where}: the public key")
        yield name, key.strip(), where


def _read_secret(path: Path) -> str:
    text = _read(path).strip()
    if path.stat().st_mode & stat.S_IRWXO:
        raise ErgonError(
            f"everybody on this machine may read the secret key {path}; "
            "chmod it to 600 (defaultMode 0440 of a Kubernetes Secret)"
        )
    _check_key(text, f"{path}: the secret key")
    return text


def server_key(directory: Path, identity: Identity) -> bytes:
    """The public key (Z85) that a server of this identity must have. Raises ErgonError where none is listed."""
    for key, owner in read_public(directory).items():
        if owner is identity:
            return key.encode()
    raise ErgonError(f"{directory / PUBLIC_FILE} has no key of {identity}; add the line `{identity} PUBLIC_KEY`")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII"
        raise ErgonError(
            f"the key file {path} cannot be read ({reason}); "
            "make keys with `ergon keys make DIRECTORY` and name it in security.keys"
        ) from error


def _check_key(text: str, what: str) -> None:
    """Never shows the text: it may be a secret."""
    try:
        well_formed = len(text) == KEY_CHARACTERS and len(z85.decode(text)) == 32
    except (KeyError, ValueError, UnicodeEncodeError):
        well_formed = False
    if not well_formed:
        raise ErgonError(
            f"{what} is not {KEY_CHARACTERS} characters of Z85; make keys with `ergon keys make DIRECTORY`"
        )
