"""The pre-shared key of one move, as the file QEMU reads it from; it never stands in an argument or in a log.

QEMU's `tls-creds-psk` wants a directory with `keys.psk`. The sending side reads it when the object is made, the
receiving side (GnuTLS) at each handshake: so the one is removed at once, the other when the stream has arrived.

Beside it lies `dh-params.pem`: without it the receiving QEMU makes Diffie-Hellman parameters of its own, a search for a
large prime that takes from 0.1 to several seconds during which its monitor stands still. We give it the group ffdhe2048
of RFC 7919, which is what TLS 1.3 negotiates anyway.
"""

from __future__ import annotations

import base64
import math
from functools import cache

from hostler.qemu import secret_files

USERNAME = "hostler"
"""Who the key belongs to; both sides must say the same, and each move has a key of its own."""

_PREFIX = "psk-"
_KEYS = "keys.psk"
_GROUP = "dh-params.pem"


def write_key(run_dir: str, secret: str, uid: int) -> str:
    """Write the key (hex) for a QEMU that runs as `uid`; returns the directory to name to QEMU. Former ones go away."""
    files = {_KEYS: f"{USERNAME}:{secret}\n".encode(), _GROUP: dh_group()}
    return secret_files.write(run_dir, _PREFIX, files, uid)


def remove_keys(run_dir: str) -> None:
    """Remove every key of that QEMU; harmless when there is none."""
    secret_files.remove(run_dir, _PREFIX)


def ffdhe2048() -> int:
    """The prime of RFC 7919, appendix A.1, by its definition: 2^2048 - 2^1984 + (floor(2^1918 e) + 560316) 2^64 - 1."""
    terms = 400  # 400! > 2^2700, so the sum of the inverse factorials is exact far beyond 1918 bits
    scale = math.factorial(terms)
    e = sum(scale // math.factorial(k) for k in range(terms + 1))
    return 2**2048 - 2**1984 + (2**1918 * e // scale + 560316) * 2**64 - 1


@cache
def dh_group() -> bytes:
    """The group as PKCS #3 in PEM: SEQUENCE { INTEGER prime, INTEGER 2 }."""
    prime = ffdhe2048().to_bytes(257, "big")  # a leading zero, for an INTEGER is signed
    body = b"\x02" + _der_length(len(prime)) + prime + b"\x02\x01\x02"
    der = b"\x30" + _der_length(len(body)) + body
    text = base64.encodebytes(der)
    return b"-----BEGIN DH PARAMETERS-----\n" + text + b"-----END DH PARAMETERS-----\n"


def _der_length(length: int) -> bytes:
    """The two-byte long form, for 256 to 65535."""
    return b"\x82" + length.to_bytes(2, "big")
