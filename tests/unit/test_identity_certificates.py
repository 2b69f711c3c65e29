"""The host's identity and the rules for a peer's certificate."""

from __future__ import annotations

import ssl
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hostler.identity.certificates import HostIdentity, check_peer_certificate, fingerprint_of, load_or_create
from hostler.model.base import utc_now
from hostler.model.errors import InternalError, InvalidInput, NotPermitted

pytestmark = pytest.mark.unit


def test_an_identity_is_made_once_and_is_the_same_ever_after(tmp_path: Path) -> None:
    made = load_or_create(tmp_path / "identity", "web 1, ü")
    assert str(uuid.UUID(made.host_id)) == made.host_id
    assert made.fingerprint == fingerprint_of(ssl.PEM_cert_to_DER_cert(made.certificate))
    assert load_or_create(tmp_path / "identity", "another name") == made
    assert sorted(p.name for p in (tmp_path / "identity").iterdir()) == ["host.crt", "host.key"]
    assert made.key_path.stat().st_mode & 0o777 == 0o600
    assert made.key_path.parent.stat().st_mode & 0o777 == 0o700


def test_the_certificate_is_what_the_design_says(tmp_path: Path) -> None:
    made = load_or_create(tmp_path, "web1")
    certificate = x509.load_pem_x509_certificate(made.certificate.encode())
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["web1", "hostler"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    lasts = certificate.not_valid_after_utc - utc_now()
    assert timedelta(days=3651) < lasts < timedelta(days=3654)
    assert certificate.not_valid_before_utc < utc_now() - timedelta(hours=12)


def test_a_key_without_a_certificate_is_a_broken_off_attempt_and_made_again(tmp_path: Path) -> None:
    (tmp_path / "host.key").write_text("half")
    (tmp_path / "host.key.new").write_text("less")
    assert load_or_create(tmp_path, "web1").host_id


@pytest.mark.parametrize("damage", ["key", "certificate", "pair"])
def test_a_damaged_identity_is_never_replaced_silently(tmp_path: Path, damage: str) -> None:
    made = load_or_create(tmp_path / "a", "web1")
    if damage == "key":
        made.key_path.write_text("nonsense")
    elif damage == "certificate":
        made.certificate_path.write_text("nonsense")
    else:
        made.key_path.write_bytes(load_or_create(tmp_path / "b", "web2").key_path.read_bytes())
    before = made.key_path.read_bytes(), made.certificate_path.read_bytes()
    with pytest.raises(InternalError) as caught:
        load_or_create(tmp_path / "a", "web1")
    assert "backup" in caught.value.advice
    assert (made.key_path.read_bytes(), made.certificate_path.read_bytes()) == before


def test_a_key_that_others_could_read_is_closed(tmp_path: Path) -> None:
    made = load_or_create(tmp_path, "web1")
    made.key_path.chmod(0o644)
    load_or_create(tmp_path, "web1")
    assert made.key_path.stat().st_mode & 0o777 == 0o600


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_named: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(NotPermitted, match="Permission denied"):
        load_or_create(tmp_path / "identity", "web1")


def test_a_peer_certificate_gives_the_host_it_stands_for(tmp_path: Path) -> None:
    made = load_or_create(tmp_path, "web1")
    found = check_peer_certificate("\n" + made.certificate + "\n")
    assert (found.host_id, found.fingerprint) == (made.host_id, made.fingerprint)


def _certificate(
    name: str, ca: bool = False, issuer: tuple[str, ec.EllipticCurvePrivateKey] | None = None, constraints: bool = True
) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    signer_name, signer = issuer or (name, key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, signer_name)]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(utc_now() - timedelta(days=1))
        .not_valid_after(utc_now() + timedelta(days=1))
    )
    if constraints:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


ID = str(uuid.uuid4())


@pytest.mark.parametrize(
    "pem",
    [
        "",
        "nonsense",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        _certificate(ID) + _certificate(ID),
        _certificate("not an id"),
        _certificate(ID, ca=True),
        _certificate(ID, constraints=False),
        _certificate(ID, issuer=(ID, ec.generate_private_key(ec.SECP256R1()))),
        _certificate(ID, issuer=("other", ec.generate_private_key(ec.SECP256R1()))),
        "x" * 100_000,
    ],
    ids=["empty", "text", "garbage", "two", "no-id", "authority", "unconstrained", "not-self", "issued", "long"],
)
def test_what_no_host_makes_is_refused_as_a_peer(pem: str) -> None:
    with pytest.raises(InvalidInput):
        check_peer_certificate(pem)


def test_an_identity_never_shows_its_key(tmp_path: Path) -> None:
    made = load_or_create(tmp_path, "web1")
    assert isinstance(made, HostIdentity)
    assert "PRIVATE" not in repr(made)
