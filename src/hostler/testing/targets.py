"""Storage systems for tests: a real iSCSI target (Debian's tgt, in user space) and a real NBD server with TLS.

Each has its own directory, port and control socket; several can run beside each other, and all end with their block.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hostler.model.base import utc_now
from hostler.model.errors import InternalError

_CONTROL = itertools.count(os.getpid() % 20_000)
"""tgtd's control sockets are numbered for the whole machine; the number also tells instances apart."""
PATIENCE = 20.0


def free_port() -> int:
    """A port of the loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class IscsiTarget:
    """One tgtd with one target. `chap`: name and secret that it asks for. LUN 1 is the first disk (LUN 0 is tgt's own
    controller). Frozen, killed and started again it keeps its LUNs, which are files."""

    def __init__(
        self, directory: Path, chap: tuple[str, str] | None = None, name: str = "iqn.2020-01.com.example:vms"
    ) -> None:
        self.name = name
        self.ports = [free_port()]
        self._directory = directory
        self._chap = chap
        self._control = str(next(_CONTROL))
        self._luns: list[tuple[int, Path, tuple[str, ...]]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.log = directory / "tgtd.log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def portals(self) -> tuple[str, ...]:
        """Where it listens."""
        return tuple(f"127.0.0.1:{port}" for port in self.ports)

    def start(self) -> None:
        """Start it, with the LUNs it had."""
        self._directory.mkdir(parents=True, exist_ok=True)
        listen = [word for port in self.ports for word in ("--iscsi", f"portal=127.0.0.1:{port}")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["tgtd", "-f", "-C", self._control, *listen],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + PATIENCE
        while not all(_listening(port) for port in self.ports) or self._admin("--op", "show", "--mode", "sys")[0]:
            if time.monotonic() > end or self._process.poll() is not None:
                raise InternalError("tgtd", f"does not start: {self.log.read_text(errors='replace')[-500:]}")
            time.sleep(0.05)
        self._configure()

    def _configure(self) -> None:
        self._must("--op", "new", "--mode", "target", "--tid", "1", "-T", self.name)
        self._must("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")
        if self._chap is not None:
            user, secret = self._chap
            self._must("--op", "new", "--mode", "account", "--user", user, "--password", secret)
            self._must("--op", "bind", "--mode", "account", "--tid", "1", "--user", user)
        for number, path, options in self._luns:
            self._attach(number, path, options)

    def add(self, size: int, number: int | None = None, *options: str) -> int:
        """One more disk, a sparse file of `size` bytes; its number. `options`: "scsi_id=...", ..."""
        number = number if number is not None else max((n for n, _, _ in self._luns), default=0) + 1
        path = self._directory / f"lun{number}"
        path.touch()
        os.truncate(path, size)
        self._luns.append((number, path, options))
        self._attach(number, path, options)
        return number

    def _attach(self, number: int, path: Path, options: Sequence[str]) -> None:
        lun = ("--mode", "logicalunit", "--tid", "1", "--lun", str(number))
        self._must("--op", "new", *lun, "-b", str(path))
        for option in options:
            self._must("--op", "update", *lun, "--params", option)

    def remove(self, number: int) -> None:
        """Take a disk away. Its file stays."""
        self._luns = [lun for lun in self._luns if lun[0] != number]
        self._must("--op", "delete", "--mode", "logicalunit", "--tid", "1", "--lun", str(number))

    def file(self, number: int) -> Path:
        """The file behind a disk."""
        return next(path for found, path, _ in self._luns if found == number)

    def url(self, number: int) -> str:
        """The address of a disk, by the first portal."""
        return f"iscsi://{self.portals[0]}/{self.name}/{number}"

    def freeze(self) -> None:
        """It stops answering; connections stay."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """It dies. Harmless when it is dead."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        self._process = None
        for end in ("", ".lock"):
            Path(f"/var/run/tgtd/socket.{self._control}{end}").unlink(missing_ok=True)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _admin(self, *words: str) -> tuple[int, str]:
        command = ["tgtadm", "-C", self._control, "--lld", "iscsi", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        return done.returncode, done.stderr.strip() or done.stdout.strip()

    def _must(self, *words: str) -> None:
        status, said = self._admin(*words)
        if status:
            raise InternalError(f"tgtadm {' '.join(words[:4])}", f"failed: {said}")


class Authority:
    """A certificate authority of a test's own, and what it has signed: directories with QEMU's file names."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")])
        usage = x509.KeyUsage(*(name in (5, 6) for name in range(9)))
        self.certificate = self._sign(self._name, self._key, usage, x509.BasicConstraints(ca=True, path_length=0))

    def server(self, name: str = "server") -> Path:
        """A directory for a server at 127.0.0.1, also called storage.example.com."""
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("storage.example.com")]
        return self._issue(name, "server", ExtendedKeyUsageOID.SERVER_AUTH, x509.SubjectAlternativeName(names))

    def client(self, name: str = "client") -> Path:
        """A directory for a client."""
        return self._issue(name, "client", ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(self, name: str, role: str, purpose: x509.ObjectIdentifier, *more: x509.ExtensionType) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signed = self._sign(subject, key, x509.ExtendedKeyUsage([purpose]), *more)
        place = self._directory / name
        place.mkdir(parents=True)
        (place / "ca-cert.pem").write_bytes(self.certificate.public_bytes(Encoding.PEM))
        (place / f"{role}-cert.pem").write_bytes(signed.public_bytes(Encoding.PEM))
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (place / f"{role}-key.pem").write_bytes(secret)
        return place

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType
    ) -> x509.Certificate:
        now = utc_now()
        builder = x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=2))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(self._key, hashes.SHA256())


class NbdServer:
    """One qemu-storage-daemon that serves files as NBD exports, to clients with a certificate of `authority` only
    (None: to everybody, in clear)."""

    def __init__(self, directory: Path, authority: Authority | None) -> None:
        self.port = free_port()
        self._directory = directory
        self._authority = authority
        self._server: Path | None = None
        self._files: dict[str, Path] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self.log = directory / "nbd.log"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def portal(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def add(self, name: str, size: int) -> Path:
        """One more export, a sparse file. Before `start`."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"export-{name}"
        path.touch()
        os.truncate(path, size)
        self._files[name] = path
        return path

    def start(self) -> None:
        """Serve what was added."""
        words = ["qemu-storage-daemon"]
        address = f"addr.type=inet,addr.host=127.0.0.1,addr.port={self.port}"
        if self._authority is not None:
            self._server = self._server or self._authority.server(f"server-{self.port}")
            words += ["--object", f"tls-creds-x509,id=tls,dir={self._server},endpoint=server,verify-peer=yes"]
            address += ",tls-creds=tls"
        for number, (name, path) in enumerate(self._files.items()):
            words += ["--blockdev", f"driver=file,node-name=n{number},filename={path},discard=unmap"]
            words += ["--export", f"type=nbd,id=e{number},node-name=n{number},name={name},writable=on"]
        words += ["--nbd-server", address]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                _ordered(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + PATIENCE
        while not _listening(self.port):
            if time.monotonic() > end or self._process.poll() is not None:
                raise InternalError("NBD server", f"does not start: {self.log.read_text(errors='replace')[-500:]}")
            time.sleep(0.05)

    def freeze(self) -> None:
        """It stops answering; connections stay."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """It dies. Harmless when it is dead."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


def _ordered(words: list[str]) -> list[str]:
    """qemu-storage-daemon does what it is told in the order of its arguments: the server comes before its exports."""
    program, *rest = words
    pairs = list(zip(rest[::2], rest[1::2], strict=True))
    order = ("--object", "--blockdev", "--nbd-server", "--export")
    return [program, *(word for pair in sorted(pairs, key=lambda pair: order.index(pair[0])) for word in pair)]
