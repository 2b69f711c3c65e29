"""What this host's QEMU can do, asked from the binary itself.

One QEMU with an empty machine is started, given every question at once, and quits: 40 ms. The answers depend on the
binary, the accelerator and the running kernel only, so they are kept in a cache directory under exactly these; what
else is installed (firmware, swtpm) is looked at each time.

The default CPU model is a concrete version of a named model, because only such a one stays the same on another host
and under the next QEMU ("max", "host" and unversioned names do not). Preferred is Westmere-v1: x86-64-v2 with AES,
which current distributions ask for (RHEL 9 wants v2), every Intel processor since 2010 has, and TCG gives in full
without a warning (it has no x2APIC or TSC deadline timer, which is where SandyBridge starts).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from pydantic import JsonValue, TypeAdapter, ValidationError

from hostler.model.errors import HostLacks, QemuFailed, TimedOut
from hostler.model.host import Accelerator, QemuFacts
from hostler.qemu.firmware import find_firmware

DEADLINE: Final = 30.0
"""Seconds for QEMU to answer everything. It takes 0.04 s on an idle machine."""

_PREFERRED_CPUS: Final = (
    "Westmere-v1",
    "EPYC-v1",
    "Nehalem-v1",
    "Opteron_G3-v1",
    "Penryn-v1",
    "qemu64-v1",
)
_CACHE_VERSION: Final = 1
_Q35: Final = re.compile(r"^pc-q35-(\d+)\.(\d+)(?:\.(\d+))?$")
_VERSIONED_CPU: Final = re.compile(r"^[A-Za-z0-9_-]+-v\d+$")

Object = dict[str, JsonValue]
Answers = dict[str, JsonValue]
_ANSWERS: Final = TypeAdapter(Answers)


async def discover(
    binary: str = "qemu-system-x86_64",
    accelerator: Accelerator = Accelerator.TCG,
    cache_dir: str | None = None,
    deadline: float = DEADLINE,
) -> QemuFacts:
    """Facts about the QEMU `binary` (a path, or looked up in PATH) under `accelerator`.

    HostLacks when it is not installed, QemuFailed when it does not do what it must (its output is in the details),
    TimedOut after `deadline` seconds; it is killed then.
    """
    path = shutil.which(binary)
    if path is None:
        raise HostLacks(f"program {binary}", "is not installed on this host", "install the package qemu-system-x86")
    path = os.path.realpath(path)
    cache = None if cache_dir is None else os.path.join(cache_dir, _cache_name(path, accelerator))
    answers = _load(cache)
    if answers is None:
        answers = await _ask(path, accelerator, deadline)
        _save(cache, answers)
    return facts_from(path, answers)


def facts_from(binary: str, answers: Answers) -> QemuFacts:
    """The facts from QEMU's answers (by question) and from what is installed on this host."""
    cpus = usable_cpus(_objects(answers["query-cpu-definitions"]))
    plain, secure = find_firmware(secure_boot=False), find_firmware(secure_boot=True)
    tpm_types = answers["query-tpm-types"]
    return QemuFacts(
        binary=binary,
        version=_version(answers["query-version"]),
        machines=q35_machines(_objects(answers["query-machines"])),
        cpu_models=cpus,
        default_cpu=default_cpu(cpus),
        migration_capabilities=tuple(
            sorted(str(c["capability"]) for c in _objects(answers["query-migrate-capabilities"]))
        ),
        sandbox=bool(answers["query-command-line-options"]),
        tpm=isinstance(tpm_types, list) and "emulator" in tpm_types and shutil.which("swtpm") is not None,
        firmware_code=plain[0] if plain else None,
        firmware_vars=plain[1] if plain else None,
        firmware_secure_code=secure[0] if secure else None,
        firmware_secure_vars=secure[1] if secure else None,
        aio_io_uring=answers["blockdev-add"] is not None,
    )


def usable_cpus(definitions: Sequence[Mapping[str, JsonValue]]) -> tuple[str, ...]:
    """Names of the versioned models this host gives in full and a guest can take along to another host, sorted."""
    return tuple(
        sorted(
            str(cpu["name"])
            for cpu in definitions
            if _VERSIONED_CPU.match(str(cpu["name"]))
            and cpu.get("migration-safe") is True
            and not cpu.get("unavailable-features", ["unknown"])
        )
    )


def default_cpu(usable: Sequence[str]) -> str:
    """The model new VMs get: the first of the preferred ones that is usable. QemuFailed if not even qemu64 is."""
    found = next((name for name in _PREFERRED_CPUS if name in usable), None)
    if found is None:
        raise QemuFailed("QEMU", "offers no versioned CPU model that this host can run", "install Debian's QEMU")
    return found


def q35_machines(machines: Sequence[Mapping[str, JsonValue]]) -> tuple[str, ...]:
    """Versioned q35 machine types, newest first, without those QEMU is going to drop."""
    found = [
        (tuple(int(part or 0) for part in match.groups()), match.group())
        for machine in machines
        if not machine.get("deprecated") and (match := _Q35.match(str(machine["name"])))
    ]
    return tuple(name for _, name in sorted(found, reverse=True))


async def _ask(binary: str, accelerator: Accelerator, deadline: float) -> Answers:
    """Start QEMU, ask everything at once, read until it quits."""
    arguments = ["-machine", f"none,accel={accelerator}", "-nodefaults", "-no-user-config", "-display", "none", "-S"]
    try:
        child = await asyncio.create_subprocess_exec(
            binary,
            *arguments,
            *("-qmp", "stdio"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise HostLacks(f"program {binary}", f"cannot be started: {error.strerror}", "check its permissions") from error
    try:
        async with asyncio.timeout(deadline):
            output, complaints = await child.communicate(_questions(binary))
    except TimeoutError as error:
        raise TimedOut(
            f"program {binary}", f"did not answer within {deadline:g} s", "look at the host's load"
        ) from error
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    return _answers(binary, output, complaints.decode("utf-8", "replace")[-4096:])


_PLAIN_QUESTIONS: Final = (
    "query-version",
    "query-machines",
    "query-cpu-definitions",
    "query-migrate-capabilities",
    "query-tpm-types",
)
_MAY_FAIL: Final = frozenset({"query-command-line-options", "blockdev-add", "query-tpm-types"})
"""An error is the answer "no": built without seccomp, without io_uring (or the kernel forbids it), without TPM."""


def _questions(binary: str) -> bytes:
    """Every command, with its name as id. Whether io_uring works is tried on a file that is certainly there."""
    node: Object = {
        "driver": "file",
        "node-name": "try",
        "filename": binary,
        "read-only": True,
        "locking": "off",
        "aio": "io_uring",
    }
    commands: list[tuple[str, Object]] = [("qmp_capabilities", {})]
    commands += [(name, {}) for name in _PLAIN_QUESTIONS]
    commands += [("query-command-line-options", {"option": "sandbox"}), ("blockdev-add", node), ("quit", {})]
    lines = [json.dumps({"execute": name, "arguments": arguments, "id": name}) for name, arguments in commands]
    return "\n".join(lines).encode()


def _answers(binary: str, output: bytes, complaints: str) -> Answers:
    """QEMU's answers by question; None for those it said no to."""
    answers: Answers = {}
    for line in output.splitlines():
        message = json.loads(line)
        if "id" in message:
            answers[message["id"]] = message.get("return")
    for name in (*_PLAIN_QUESTIONS, *_MAY_FAIL):
        if name not in answers or (answers[name] is None and name not in _MAY_FAIL):
            raise QemuFailed(
                f"program {binary}", f"gave no answer to {name}", "check that it is a working QEMU", output=complaints
            )
    return answers


def _cache_name(path: str, accelerator: Accelerator) -> str:
    """A name that changes with everything the answers depend on."""
    status = os.stat(path)
    key = f"{_CACHE_VERSION} {path} {status.st_size} {status.st_mtime_ns} {accelerator} {os.uname().release}"
    return f"qemu-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _load(cache: str | None) -> Answers | None:
    """Cached answers; None when there are none or they are damaged (then they are simply asked again)."""
    if cache is None:
        return None
    try:
        with open(cache, "rb") as file:
            answers = _ANSWERS.validate_json(file.read())
    except (OSError, ValidationError):
        return None
    return answers if {*_PLAIN_QUESTIONS, *_MAY_FAIL} <= answers.keys() else None


def _save(cache: str | None, answers: Answers) -> None:
    """Best effort: without a cache the next start takes 40 ms longer. Written whole or not at all, also by two daemons
    at once."""
    if cache is None:
        return
    new = f"{cache}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(cache), exist_ok=True)
        with open(new, "wb") as file:
            file.write(_ANSWERS.dump_json(answers))
        os.replace(new, cache)
    except OSError:
        with suppress(OSError):
            os.unlink(new)


def _objects(value: JsonValue) -> list[Object]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _version(value: JsonValue) -> str:
    numbers = value.get("qemu") if isinstance(value, dict) else None
    if not isinstance(numbers, dict):
        raise QemuFailed("QEMU", "told no version", "check that it is a working QEMU")
    return f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}"
