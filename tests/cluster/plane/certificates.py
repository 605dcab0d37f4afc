"""The certificates of a cluster that lives for one test session: an authority, servers, clients. Files in a
directory.
"""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = datetime.timedelta(days=2)


class Authority:
    """Issues certificates into a directory, as NAME.crt and NAME.key in PEM."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory, self._name = directory, name
        directory.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = _subject(name, "")
        self.certificate = self._write(name, self._key, self._subject, is_authority=True, hosts=())

    def issue(self, name: str, common_name: str, organisation: str = "", hosts: tuple[str, ...] = ()) -> Path:
        """Make NAME.crt and NAME.key; the path of the first."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self._write(name, key, _subject(common_name, organisation), is_authority=False, hosts=hosts)

    def _write(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        subject: x509.Name,
        *,
        is_authority: bool,
        hosts: tuple[str, ...],
    ) -> Path:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder(subject_name=subject, issuer_name=self._subject, public_key=key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - VALID)
            .not_valid_after(now + VALID)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if not is_authority:
            usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if hosts:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_name(host) for host in hosts]), critical=False
            )
        path = self._directory / f"{name}.crt"
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        write_key(path.with_suffix(".key"), key)
        return path


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """A private key as PEM."""
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )


def make_signing_key(path: Path) -> Path:
    """A key pair for the tokens of service accounts: PATH, and PATH.pub."""
    key = ec.generate_private_key(ec.SECP256R1())
    write_key(path, key)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path


def _subject(common_name: str, organisation: str) -> x509.Name:
    names = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organisation:
        names.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation))
    return x509.Name(names)


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
