"""A certificate authority of a test's own, which issues what servers and clients of that test show each other.

`server_tls` and `client_tls` are how such a server or client of the test's speaks, `serial_at` what a server shows.
"""

from __future__ import annotations

import asyncio
import shutil
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True)
class Issued:
    cert: Path
    key: Path

    @property
    def serial(self) -> int:
        return x509.load_pem_x509_certificate(self.cert.read_bytes()).serial_number

    def put_in_place_of(self, other: Issued) -> None:
        """Renames copies over the other's files, one after the other: each file is whole at any moment."""
        for ours, theirs in ((self.cert, other.cert), (self.key, other.key)):
            copy = theirs.with_suffix(".new")
            shutil.copy(ours, copy)
            copy.rename(theirs)


class Authority:
    """Writes `ca.pem`, and `{name}.pem` and `{name}.key` for each certificate, into the directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("a test's authority")
        own = (
            _builder(self._name, self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.cert = directory / "ca.pem"
        self.cert.write_bytes(own.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, names: list[str], *, days: int = 1) -> Issued:
        """A certificate for a server and a client alike, for these DNS names and addresses, valid for so many days.

        -1: until yesterday. Issued again it takes the place of the one before.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(_name(name), self._name, key, days)
            .add_extension(x509.SubjectAlternativeName([_general(each) for each in names]), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        issued = Issued(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        issued.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        issued.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return issued


def server_tls(shown: Issued, *, believes: Path | None = None) -> ssl.SSLContext:
    """A server's side; with `believes`, clients must show a certificate of that authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown.cert, shown.key)
    if believes is not None:
        context.load_verify_locations(believes)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_tls(believes: Path, shown: Issued | None = None) -> ssl.SSLContext:
    """A client's side, which verifies as clients do."""
    context = ssl.create_default_context(cafile=believes)
    if shown is not None:
        context.load_cert_chain(shown.cert, shown.key)
    return context


async def serial_at(address, tls: ssl.SSLContext) -> int:
    """The serial number of the certificate that a new handshake is shown."""
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=tls, server_hostname="127.0.0.1")
    try:
        return x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(True)).serial_number
    finally:
        writer.close()


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int = 1
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        return x509.DNSName(text)
