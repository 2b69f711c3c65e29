"""This host's key and certificate, and the rules for a peer's. The only module that knows X.509.

A host is known by its self-signed certificate: the common name is the host id, and trust is the exact certificate,
never a chain. So there is no authority to run, to renew or to steal, and removing a peer takes effect at once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import ssl
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hostler.model.base import utc_now
from hostler.model.errors import HostlerError, InternalError, InvalidInput, NoSpace, NotPermitted
from hostler.model.names import new_id

LIFETIME = timedelta(days=3653)
"""Ten years: renewing means that every peer has to be told, so it is not done for its own sake."""

CLOCK_SKEW = timedelta(days=1)
"""The certificate is valid from a day before it was made, for peers whose clock is behind."""

LONGEST_PEM = 16 * 1024
"""Bytes of a certificate that is looked at; a P-256 certificate takes less than 1 KiB."""


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """Who this host is. `certificate` is PEM; `fingerprint` the SHA-256 of its DER form, lower-case hex."""

    host_id: str
    key_path: Path
    certificate_path: Path
    certificate: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """A certificate that may stand for another host."""

    host_id: str
    certificate: str
    fingerprint: str


def fingerprint_of(der: bytes) -> str:
    """SHA-256 of a certificate in DER form, as lower-case hex."""
    return hashlib.sha256(der).hexdigest()


def load_or_create(directory: Path, name: str) -> HostIdentity:
    """This host's identity, made at the first call. `name` goes into the certificate's alternative names.

    InternalError when the files there do not belong together or are damaged: they are never replaced silently, since
    every peer would stop trusting this host. NoSpace, NotPermitted when they cannot be written or read.
    """
    key_path, certificate_path = directory / "host.key", directory / "host.crt"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not certificate_path.exists():
            _create(key_path, certificate_path, name)
        key_path.chmod(0o600)
        key_pem, certificate_pem = key_path.read_bytes(), certificate_path.read_bytes()
    except OSError as error:
        raise _explain(directory, error) from error
    return _load(key_path, certificate_path, key_pem, certificate_pem)


def check_peer_certificate(pem: str) -> PeerCertificate:
    """The host a PEM certificate stands for. InvalidInput when it is not one that a Hostler host makes: exactly one
    certificate, self-signed, with a host id as common name and no right to sign others."""
    subject = "certificate of the other host"
    if len(pem) > LONGEST_PEM or pem.count("-----BEGIN CERTIFICATE-----") != 1:
        raise InvalidInput(subject, "is not exactly one PEM certificate")
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        host_id = str(uuid.UUID(_common_name(certificate)))
        certificate.verify_directly_issued_by(certificate)
        may_sign = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise InvalidInput(subject, "is not one that a Hostler host makes", "invite the host again") from error
    if may_sign:
        raise InvalidInput(subject, "is an authority that could sign certificates of other hosts")
    clean = certificate.public_bytes(serialization.Encoding.PEM).decode()
    return PeerCertificate(host_id, clean, fingerprint_of(ssl.PEM_cert_to_DER_cert(clean)))


def _create(key_path: Path, certificate_path: Path, name: str) -> None:
    """The certificate is written last: while there is none, nobody has seen the key, and both are made afresh."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(key_path, pem, 0o600)
    _write(certificate_path, _build(key, new_id(), name).public_bytes(serialization.Encoding.PEM), 0o644)


def _build(key: ec.EllipticCurvePrivateKey, host_id: str, name: str) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host_id)])
    now = utc_now()
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName(_names(name)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(purposes, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _names(name: str) -> list[x509.GeneralName]:
    """A host name may hold what a DNS name must not (blanks, umlauts); then only the fixed name stands."""
    names: list[x509.GeneralName] = []
    with contextlib.suppress(ValueError):
        names.append(x509.DNSName(name))
    names.append(x509.DNSName("hostler"))
    return names


def _load(key_path: Path, certificate_path: Path, key_pem: bytes, certificate_pem: bytes) -> HostIdentity:
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
        host_id = _common_name(certificate)
    except (ValueError, TypeError) as error:
        raise _damaged(key_path.parent, "cannot be read as a key and a certificate") from error
    if certificate.public_key() != key.public_key():
        raise _damaged(key_path.parent, "holds a key and a certificate that do not belong together")
    return HostIdentity(
        host_id=host_id,
        key_path=key_path,
        certificate_path=certificate_path,
        certificate=certificate.public_bytes(serialization.Encoding.PEM).decode(),
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
    )


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        raise ValueError("not exactly one common name")
    return str(names[0].value)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Complete and on disk, or not there."""
    half = path.with_name(path.name + ".new")
    half.unlink(missing_ok=True)
    handle = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    half.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _damaged(directory: Path, cause: str) -> InternalError:
    return InternalError(
        f"identity in {directory}",
        cause,
        "restore host.key and host.crt from a backup, or delete both: the host then gets a new id and must be invited "
        "by its peers again",
    )


def _explain(directory: Path, error: OSError) -> HostlerError:
    subject = f"identity in {directory}"
    if isinstance(error, PermissionError):
        return NotPermitted(subject, f"cannot be read or written: {error.strerror}", "check owner and mode")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(subject, "cannot be written: the disk is full", "free some space on it")
    return InternalError(subject, f"cannot be read or written: {error.strerror}")
