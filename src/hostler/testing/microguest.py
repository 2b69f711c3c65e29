"""The micro guest: a kernel and an initramfs that boot under TCG in a few seconds and obey a test.

Built on this machine from Debian packages (the cloud kernel and its modules, busybox for a rescue shell, gcc for the
one static program in `guest/`), and kept in a cache. What the guest can do stands in `guest/commands.c`;
`guestclient` speaks its serial protocol.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from hostler.model.errors import HostLacks, HostlerError, InternalError
from hostler.testing.initramfs import Member, archive, load_order, parse_modules_dep

MODULES = (
    "virtio_pci",
    "virtio_scsi",
    "sd_mod",
    "sr_mod",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "ahci",
    "button",
    "evdev",
)
"""Drivers of the devices Hostler gives a VM. The cloud kernel has no ahci; a full Debian kernel does."""

CMDLINE = (
    "console=ttyS0 quiet loglevel=1 panic=0 net.ifnames=0 mitigations=off nokaslr no_timer_check random.trust_cpu=on"
)
"""No serial output of a healthy kernel (it would mix with the protocol), and nothing that costs time at boot."""

COMPILE = ("gcc", "-O2", "-static", "-s", "-std=gnu11", "-D_GNU_SOURCE", "-pthread")
FORMAT = 1
"""Part of the cache key: grows when the way of building changes without a change of its inputs."""


@dataclass(frozen=True, slots=True)
class MicroGuest:
    """What QEMU needs to boot it: `-kernel`, `-initrd`, `-append`."""

    kernel: Path
    initrd: Path
    cmdline: str

    def with_network(self, address: str, gateway: str = "", beat: str = "") -> str:
        """The command line for a guest that takes an address ("10.0.0.2/24") at boot and may send beats to an observer
        ("10.0.0.1:7009:2": address, port, interval in ms)."""
        extra = [f"hl.ip={address}"]
        extra += [f"hl.gw={gateway}"] if gateway else []
        extra += [f"hl.beat={beat}"] if beat else []
        return " ".join([self.cmdline, *extra])


@dataclass(frozen=True, slots=True)
class Ingredients:
    """What is taken from this machine. `version` is the kernel's ("6.1.0-56-cloud-amd64")."""

    version: str
    kernel: Path
    modules: Path
    busybox: Path
    sources: tuple[Path, ...]


def default_cache() -> Path:
    """$XDG_CACHE_HOME/hostler, or ~/.cache/hostler."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hostler"


def build(cache_dir: Path | None = None) -> MicroGuest:
    """The micro guest, built if the cache has not got it (about two seconds).

    Raises HostLacks, naming the Debian package, where something it is made of is missing. Two builds at once are
    harmless: each builds on its own, the first to finish is kept.
    """
    parts = find_ingredients()
    cache = cache_dir or default_cache()
    place = cache / f"microguest-{parts.version}-{_key(parts)}"
    if not place.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with _scratch(cache) as scratch:
            _build_into(scratch, parts)
            _keep(scratch, place)
    return MicroGuest(place / "kernel", place / "initrd", CMDLINE)


def find_ingredients(boot: Path = Path("/boot"), modules: Path = Path("/lib/modules")) -> Ingredients:
    """The newest readable cloud kernel with its modules, busybox and gcc. HostLacks where one is missing."""
    if shutil.which("gcc") is None or not Path("/usr/include/stdio.h").exists():
        raise _lacks("the C compiler", "gcc libc6-dev")
    busybox = shutil.which("busybox")
    if busybox is None:
        raise _lacks("busybox", "busybox-static")
    for version in sorted(_kernel_versions(boot), key=_version_key, reverse=True):
        kernel = boot / f"vmlinuz-{version}"
        if os.access(kernel, os.R_OK) and (modules / version / "modules.dep").is_file():
            return Ingredients(version, kernel, modules / version, Path(busybox), _sources())
    raise _lacks("a readable cloud kernel with its modules", "linux-image-cloud-amd64")


def _kernel_versions(boot: Path) -> list[str]:
    return [path.name.removeprefix("vmlinuz-") for path in boot.glob("vmlinuz-*-cloud-amd64")]


def _version_key(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _sources() -> tuple[Path, ...]:
    folder = Path(str(files("hostler.testing").joinpath("guest")))
    return tuple(sorted([*folder.glob("*.c"), *folder.glob("*.h")]))


def _lacks(what: str, packages: str) -> HostLacks:
    return HostLacks("micro guest", f"{what} is not on this machine", f"apt install {packages}", package=packages)


def _key(parts: Ingredients) -> str:
    """Changes when anything the guest is made of changes; big files count by size and time."""
    digest = hashlib.sha256(repr((FORMAT, MODULES, COMPILE)).encode())
    for source in parts.sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    for big in (parts.kernel, parts.busybox, parts.modules / "modules.dep"):
        status = big.stat()
        digest.update(f"{big} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _build_into(scratch: Path, parts: Ingredients) -> None:
    init = scratch / "init"
    _compile(parts, init)
    _store(scratch / "initrd", archive(_members(parts, init.read_bytes())))
    _store(scratch / "kernel", parts.kernel.read_bytes())
    init.unlink()
    scratch.chmod(0o755)  # an unprivileged QEMU reads it; mkdtemp made it ours alone


def _compile(parts: Ingredients, target: Path) -> None:
    sources = [str(source) for source in parts.sources if source.suffix == ".c"]
    try:
        done = subprocess.run(
            [*COMPILE, "-o", str(target), *sources], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InternalError("micro guest", f"gcc did not finish ({error})") from error
    if done.returncode != 0:
        raise _compile_error(done.stderr)


def _compile_error(output: str) -> HostlerError:
    if "cannot find -lc" in output:
        return _lacks("the static C library", "libc6-dev")
    return InternalError("micro guest", f"gcc refused it: {output.strip()[-500:]}")


def _members(parts: Ingredients, init: bytes) -> list[Member]:
    order = load_order(MODULES, parse_modules_dep((parts.modules / "modules.dep").read_text()))
    listed = "".join(f"/lib/modules/{Path(module).name}\n" for module in order)
    drivers = [Member(f"lib/modules/{Path(path).name}", (parts.modules / path).read_bytes()) for path in order]
    return [
        Member("init", init, 0o755),
        Member("modules.list", listed.encode()),
        Member("bin/busybox", parts.busybox.read_bytes(), 0o755),
        *drivers,
    ]


def _store(path: Path, content: bytes) -> None:
    """Flushed, so that a cache entry that exists is whole even after a power cut."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)


def _keep(scratch: Path, place: Path) -> None:
    try:
        scratch.rename(place)
    except OSError:
        if not place.is_dir():
            raise
