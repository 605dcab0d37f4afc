"""The key files of a run: who holds which CURVE key pair, and whose public keys are let in.

A key directory holds one `IDENTITY.secret` per identity (one line, the secret key in Z85) and `public.keys`, the
allow-list of all: lines `IDENTITY PUBLIC_KEY`, lines that begin with `#` being comments. A process needs its own secret
file and the allow-list, nothing else. Several lines of one identity are several keys that are let in; as a server, an
identity shows the first. Reads and writes these files; knows no socket.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

import zmq
from zmq.utils import z85

from broker.process.lifecycle import ErgonError

PUBLIC_FILE: Final = "public.keys"
KEY_CHARACTERS: Final = 40  # 32 bytes in Z85
_HEAD: Final = (
    "# Public keys that are let in, one IDENTITY KEY a line; the first of an identity is what it shows as a server.\n"
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
    """Make a key pair for every identity; returns the files, all readable by their owner alone.

    Raises ErgonError where one of them is there already, or the directory cannot be written.
    """
    paths = {identity: secret_path(directory, identity) for identity in Identity}
    public = directory / PUBLIC_FILE
    if taken := [path.name for path in (*paths.values(), public) if path.exists()]:
        raise ErgonError(f"{directory} holds keys already ({', '.join(taken)}); name another directory or remove them")
    pairs = {identity: KeyPair(*zmq.curve_keypair()) for identity in Identity}
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for identity, path in paths.items():
            _write_new(path, pairs[identity].secret.decode() + "\n")
        _write_new(public, _HEAD + "".join(f"{identity} {pair.public.decode()}\n" for identity, pair in pairs.items()))
    except OSError as error:
        raise ErgonError(f"keys cannot be written to {directory} ({error.strerror}); name another directory") from error
    return [*paths.values(), public]


def _write_new(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def read_pair(directory: Path, identity: Identity) -> KeyPair:
    """The key pair of an identity. Raises ErgonError where the file is missing, malformed or readable by everybody."""
    path = secret_path(directory, identity)
    text = _read(path).strip()
    if path.stat().st_mode & stat.S_IRWXO:
        raise ErgonError(
            f"everybody on this machine may read the secret key {path}; "
            "chmod it to 600 (defaultMode 0440 of a Kubernetes Secret)"
        )
    _check_key(text, f"{path}: the secret key")
    return KeyPair(zmq.curve_public(text.encode()), text.encode())


def read_public(directory: Path) -> Mapping[str, Identity]:
    """Whose key each allowed public key is, in the order of the file. Raises ErgonError where a line is wrong."""
    path = directory / PUBLIC_FILE
    owners: dict[str, Identity] = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path}, line {number}"
        name, _, key = line.strip().partition(" ")
        if name not in set(Identity):
            raise ErgonError(f"{where}: {name!r:.40} is no identity; allowed: {', '.join(Identity)}")
        _check_key(key.strip(), f"{where}: the public key")
        if owners.setdefault(key.strip(), Identity(name)) != name:
            raise ErgonError(f"{where}: the key of {owners[key.strip()]} again, for {name}; a key has one identity")
    return owners


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
