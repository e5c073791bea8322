"""Who is who: the private CA, the server's certificate, the nodes' keys, and when they end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.home import Home, named, write

CA_DAYS = 3650
SOON = timedelta(days=30)
SLACK = timedelta(days=1)  # a device without a clock battery may be late
LOCAL = ("localhost", "127.0.0.1")
HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
LARGEST = 1 << 14  # bytes of a key file


def certify(home: Home, names: Sequence[str], days: int = 365) -> tuple[str, ...]:
    """A new server certificate for these names and addresses, and localhost; the CA is made when there is none.

    Without names those of the present certificate. Returns the names. Raises ValueError.
    """
    if not names:
        names = covered(home)
    alternatives = [_alternative(name) for name in dict.fromkeys((*names, *LOCAL))]
    if days < 1:
        raise ValueError(f"days must be 1 or more, got {days}")
    authority, signer = _authority(home)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    certificate = (
        _certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "prfl server")]), authority.subject, key)
        .not_valid_after(min(now + timedelta(days=days), authority.not_valid_after_utc))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    write(home.certificate_key, _pem(key), mode=0o600)
    write(home.certificate, certificate.public_bytes(Encoding.PEM), mode=0o644)
    return covered(home)


def covered(home: Home) -> tuple[str, ...]:
    """The names and addresses of the server's certificate. Raises ValueError."""
    if not home.certificate.exists():
        raise ValueError(f"no certificate in {home.folder}; give the names or addresses that nodes dial")
    extension = _loaded(home.certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(a.value) for a in extension)


def ending(files: Iterable[Path]) -> list[str]:
    """A line for every certificate that ends soon. Raises ValueError for one that has ended or cannot be read."""
    lines, now = [], datetime.now(UTC)
    for file in files:
        last = _loaded(file).not_valid_after_utc
        remedy = "run `prfl deploy certs` on the server" if file.name != "ca.crt" else (
            "on the server remove ca.crt and ca.key, run `prfl deploy certs NAME...`, and copy ca.crt to every node"
        )  # fmt: skip
        if last <= now:
            raise ValueError(f"{file} ended on {last:%Y-%m-%d}; {remedy}")
        if last - now < SOON:
            lines.append(f"{file} ends on {last:%Y-%m-%d}; {remedy}")
    return lines


def make_key(home: Home, name: str) -> Path:
    """An EC P-384 pair in OpenSSH format, NAME and NAME.pub; the latter. Raises ValueError rather than overwrite."""
    private = home.key(name)
    public = private.with_name(f"{name}.pub")
    for file in (private, public):
        if file.exists():
            raise ValueError(f"{file} is there already; a key is never overwritten")
    key = ec.generate_private_key(ec.SECP384R1())
    write(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), mode=0o600)
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write(public, line + f" {name}\n".encode(), mode=0o644)
    return public


def check_key(file: Path) -> None:
    """Raises ValueError unless this is a private key of a node that only its owner can read."""
    if not file.is_file():
        raise ValueError(f"no key {file}; make it with `prfl deploy keys {file.name}`")
    if (mode := file.stat().st_mode & 0o777) & 0o077:
        raise ValueError(f"{file} can be read by others (mode {mode:o}); chmod 600 {file}")
    try:
        key = load_ssh_private_key(_bytes(file), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{file} is not an EC private key in OpenSSH format without a passphrase")


def public_key(file: Path) -> bytes:
    """A node's public key, as PEM. Raises ValueError."""
    content = _bytes(file)
    if b"PRIVATE KEY" in content:
        raise ValueError(f"{file} is a private key, which stays on its node; give NAME.pub")
    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"{file} is not a public key in OpenSSH format") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(
        key.curve, (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
    ):
        raise ValueError(f"{file} is not an EC key; make one with `prfl deploy keys NAME`")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def admitted(home: Home) -> dict[str, bytes]:
    """Public keys of the admitted nodes, by name. Raises ValueError."""
    return {named(file.stem): public_key(file) for file in sorted(home.nodes.glob("*.pub"))}


def _authority(home: Home) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    if not home.ca.exists() and not home.ca_key.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"prfl CA {x509.random_serial_number():x}"[:24])])
        certificate = (
            _certificate(name, name, key)
            .not_valid_after(datetime.now(UTC) + timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        write(home.ca_key, _pem(key), mode=0o600)
        write(home.ca, certificate.public_bytes(Encoding.PEM), mode=0o644)
    if not home.ca.exists() or not home.ca_key.exists():
        raise ValueError(f"{home.folder} has only one of ca.crt and ca.key; bring the other back, or remove both")
    ending([home.ca])
    try:
        signer = load_pem_private_key(_bytes(home.ca_key), None)
    except (ValueError, TypeError):
        signer = None
    certificate = _loaded(home.ca)
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != certificate.public_key():
        raise ValueError(f"{home.ca_key} is not the key of {home.ca}")
    return certificate, signer


def _certificate(name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - SLACK)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        last = name.rpartition(".")[2]
        if not HOST.fullmatch(name) or last.isdigit():
            raise ValueError(f"a host name or an address is wanted, without port, got {name!r}") from None
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _loaded(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_bytes(file))
    except ValueError:
        raise ValueError(f"{file} is not a certificate") from None


def _bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(LARGEST)
