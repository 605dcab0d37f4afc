"""Encryption and identity of a process's sockets: what `[security]` means for one that binds and one that connects.

Owns the rule that an address which other machines can reach is served with keys or not at all. Who is let in is the
server's `broker/process/gatekeeper.py`; the key files are `keys.py`'s.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import zmq

from broker.process.keys import (
    PUBLIC_FILE,
    Identity,
    KeyPair,
    read_pair,
    read_public,
    read_signers,
    read_signing_key,
    secret_path,
    server_key,
)
from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings
from broker.process.signing import Signers, SigningKey

OVERHEAD_BYTES: Final = 64  # a sealed frame is this much longer than its content, at most (really 33)
_RECEIVERS: Final = frozenset({Identity.ACTOR, Identity.RELAY})  # of weights
_REMEDY: Final = (
    'set security.mode = "curve" with keys from `ergon keys make DIRECTORY`, or a loopback address such as 127.0.0.1'
)


@dataclass(frozen=True, slots=True)
class Security:
    """How one process secures its sockets. Without a key pair: not at all, which only loopback addresses allow."""

    identity: Identity | None = None
    pair: KeyPair | None = None
    directory: Path = Path()
    signing_key: SigningKey | None = None  # the learner's: what it signs versions of the weights with
    signers: Signers | None = None  # whose signatures a receiver of weights believes; None: they are not signed

    @property
    def curve(self) -> bool:
        """Whether sockets are encrypted and peers are known by their keys."""
        return self.pair is not None

    def protect_server(self, socket: zmq.Socket[bytes], endpoint: str, channel: str) -> None:
        """Before `bind`. Raises ErgonError where the endpoint would be open to other machines.

        `channel` is the ZAP domain. The context's gatekeeper must be there already.
        """
        if self.pair is None:
            if not is_loopback(endpoint):
                raise ErgonError(f"{endpoint} would be open to everybody who reaches it; {_REMEDY}")
            return
        socket.curve_server = True
        socket.curve_secretkey = self.pair.secret
        socket.zap_domain = channel.encode()
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a gatekeeper nobody is let in, instead of everybody

    def protect_client(self, socket: zmq.Socket[bytes], server: Identity) -> None:
        """Before `connect`, to a server that must prove to be this identity. Raises ErgonError for an unknown one."""
        if self.pair is None:
            return
        socket.curve_publickey, socket.curve_secretkey = self.pair.public, self.pair.secret
        socket.curve_serverkey = server_key(self.directory, server)


OPEN: Final = Security()
"""No keys: loopback only."""


def load_security(settings: Settings, identity: Identity) -> Security:
    """What `[security]` says for a process of this identity.

    Raises ErgonError for addresses that mode "none" does not allow, and for missing, malformed or unlisted keys.
    """
    section = settings.security
    if section.mode == "none":
        for key, host in _served_hosts(settings):
            if not is_loopback(f"tcp://{host}:1"):
                raise ErgonError(f'{key} = "{host}" is no loopback address and security.mode is "none"; {_REMEDY}')
        return OPEN
    directory = section.keys.expanduser()
    pair = read_pair(directory, identity)
    if read_public(directory).get(pair.public.decode()) is not identity:
        raise ErgonError(
            f"the key in {secret_path(directory, identity)} is not listed for {identity} in {directory / PUBLIC_FILE}; "
            f"add the line `{identity} {pair.public.decode()}` there, on every machine of the run"
        )
    return keyed(directory, identity)


def keyed(directory: Path, identity: Identity) -> Security:
    """The keys of this identity in a key directory. Raises ErgonError for missing or malformed ones."""
    pair = read_pair(directory, identity)
    signing_key = read_signing_key(directory) if identity is Identity.LEARNER else None
    signers = None
    if identity in _RECEIVERS:
        keys = read_signers(directory)
        if not keys:
            raise ErgonError(
                f"{directory / PUBLIC_FILE} names no key that weights are signed with, so it is of an earlier version: "
                "`ergon keys make DIRECTORY` adds one where the learner's keys are; then copy the file here again"
            )
        signers = Signers(keys)
    return Security(identity, pair, directory, signing_key, signers)


def _served_hosts(settings: Settings) -> Iterator[tuple[str, str]]:
    yield "broker.host", settings.broker.host
    yield "weights.host", settings.weights.host
    yield "weights.relay_host", settings.weights.relay_host


def is_loopback(endpoint: str) -> bool:
    """Whether a ZeroMQ endpoint can be reached from this machine only. A name but `localhost` is taken to be open."""
    try:
        parts = urlsplit(endpoint)
        if parts.scheme in ("inproc", "ipc"):
            return True
        host = parts.hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
