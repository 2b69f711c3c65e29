"""A thin wrapper on qemu-img: sizes in bytes, progress, cancellation, clear errors, and no half-made file.

A new file is made under a temporary name in its directory and gets its own name when it is complete and on disk; a name
that is taken is never overwritten. Formats are always said, never guessed by qemu-img (see `formats`).
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostler.model.disk import ImageFormat
from hostler.model.errors import (
    AlreadyExists,
    BadImage,
    HostlerError,
    InUse,
    InvalidInput,
    NoSpace,
    NotFound,
    NotPermitted,
    QemuFailed,
)
from hostler.model.image import Preallocation
from hostler.storage import programs
from hostler.storage.footer import SECTOR
from hostler.storage.formats import QEMU_DRIVER
from hostler.storage.guard import Admitted, Guard
from hostler.storage.waiting import whole

OnProgress = Callable[[float], None]
"""Called with the fraction done, 0.0 to 1.0."""

LOOK = 30.0
"""Seconds a look at an image may take; a hostile one may try to take for ever."""
QUICK = 300.0
"""Seconds for making an empty image; allocation tables of a large one take a moment on a slow disk."""
LOOK_BOUNDS = programs.Bounds(memory=1024**3, cpu=20)
"""qemu-img 7.2 needs less than 256 MiB of address space for an ordinary image; a qcow2 header may ask for tables of
32 MiB each."""
COPY_BOUNDS = programs.Bounds(memory=4 * 1024**3)
"""Address space of a check or a conversion, which also start up to 64 threads with 8 MiB of stack each."""

NO_CHECK = 63
"""How `qemu-img check` ends for a format that has no check."""
_COUNTS = ("corruptions", "check-errors", "leaks", "corruptions-fixed", "leaks-fixed")

PART = ".hostler-part"
"""Ending of temporary names."""

_OPTIONS: dict[ImageFormat, str] = {
    # force_size: else QEMU rounds a VHD up to whole cylinders, and the disk is not the size that was asked for.
    ImageFormat.VHD: "subformat=dynamic,force_size=on",
    ImageFormat.VHD_FIXED: "subformat=fixed,force_size=on",
    ImageFormat.VHDX: "subformat=dynamic",
    ImageFormat.QCOW2: "compat=1.1,lazy_refcounts=off",
}
_BLOCK = {ImageFormat.QCOW2: "cluster_size", ImageFormat.VHDX: "block_size"}
_PROGRESS = re.compile(r"\((\d+\.\d+)/100%\)")


class LogPending(BadImage):
    """A VHDX with a log: it is in use right now, or its last user was killed. Whoever opens it for writing replays the
    log; whoever only reads refuses it."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What qemu-img says about an image. Bytes. `backing` as the image names it."""

    virtual_size: int
    actual_size: int
    backing: str | None
    corrupt: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """How a new image lies in its file. `block`: bytes of a cluster or block (None: QEMU's choice); `bitmaps`: with the
    dirty bitmaps of the qcow2 it is made from; `preallocation`: see `check_preallocation`."""

    block: int | None = None
    bitmaps: bool = False
    preallocation: Preallocation = Preallocation.OFF

    def options(self, format: ImageFormat) -> Sequence[str]:
        """As qemu-img's -o takes them."""
        found = []
        if self.block is not None and format in _BLOCK:
            found.append(f"{_BLOCK[format]}={self.block}")
        if self.preallocation is Preallocation.METADATA:
            found.append("preallocation=metadata")
        elif self.preallocation is Preallocation.FULL and format is not ImageFormat.VHD_FIXED:
            found.append("preallocation=falloc")
        return found


AS_USUAL = Layout()


def check_preallocation(subject: str, format: ImageFormat, wanted: Preallocation) -> None:
    """InvalidInput for a format that cannot take its space at once."""
    able = {
        Preallocation.OFF: frozenset(ImageFormat),
        Preallocation.METADATA: frozenset({ImageFormat.QCOW2}),
        Preallocation.FULL: frozenset({ImageFormat.RAW, ImageFormat.QCOW2, ImageFormat.VHD_FIXED}),
    }[wanted]
    if format not in able:
        raise InvalidInput(
            subject,
            f"a {format} cannot take its {'tables' if wanted is Preallocation.METADATA else 'space'} when it is made",
            f"formats that can: {', '.join(sorted(able))}",
        )


@dataclass(frozen=True, slots=True)
class Check:
    """What a check found, in clusters: what is wrong, what is lost space only, and how much of it was put right."""

    errors: int
    leaks: int
    repaired: int


class QemuImg:
    """The program `binary`. Paths must be absolute: qemu-img takes "nbd:..." or "json:..." for something else."""

    def __init__(self, binary: str = "qemu-img", guard: Guard | None = None) -> None:
        """`guard`: who lets it run as a user of its own (as root); None: as ourselves."""
        self._binary = binary
        self._guard = guard

    def admit(self, files: Mapping[str, bool]) -> AbstractContextManager[Admitted | None]:
        """Who a program that reads (True: writes) these images runs as, while the block runs. NotFound, NotPermitted
        when one cannot be opened."""
        return nullcontext() if self._guard is None else _admitted(self._guard, files)

    async def _run(
        self,
        argv: Sequence[str],
        subject: str,
        deadline: float | None,
        bounds: programs.Bounds,
        files: Mapping[str, bool],
        on_text: programs.OnText | None = None,
    ) -> programs.Outcome:
        with self.admit(files) as as_user:
            return await programs.run(argv, subject, deadline, bounds, on_text, as_user)

    async def info(self, path: str, format: ImageFormat) -> ImageInfo:
        """Look at an image, also one in use (-U). Opens no backing file. BadImage when QEMU does not open it, its
        subclass LogPending for a VHDX that is sound but has a log."""
        argv = [self._binary, "info", "--output=json", "-U", "-f", QEMU_DRIVER[format], "--", path]
        outcome = await self._run(argv, f"image {path}", LOOK, LOOK_BOUNDS, {path: False})
        if outcome.status != 0:
            raise explain(f"image {path}", outcome, Path(path).parent, looking=True)
        return _info(path, outcome.out)

    async def check(self, path: str, format: ImageFormat) -> None:
        """Check an image's own structure: BadImage with the number of errors. Formats without a check pass (VHD)."""
        argv = [self._binary, "check", "--output=json", "-U", "-f", QEMU_DRIVER[format], "--", path]
        outcome = await self._run(argv, f"image {path}", QUICK, COPY_BOUNDS, {path: False})
        if outcome.status in (0, 3, 63):  # 3: leaked clusters only, no damage; 63: the format has no check
            return
        with suppress(ValueError, KeyError):
            errors = json.loads(outcome.out)["corruptions"]
            raise BadImage(
                f"image {path}", f"qemu-img found {errors} errors in it", "restore it from a backup", errors=errors
            )
        raise explain(f"image {path}", outcome, Path(path).parent, looking=True)

    def map_command(self, path: str, format: ImageFormat) -> Sequence[str]:
        """The command that prints where the content of an image is, a line of JSON for each piece. It opens no backing
        file, and not what a running QEMU writes."""
        return [self._binary, "map", "--output=json", *source_options(path, format)]

    async def describe(self, path: str, format: ImageFormat) -> dict[str, Any]:
        """All that `qemu-img info` says of an image. Errors as `info`."""
        argv = [self._binary, "info", "--output=json", "-U", "-f", QEMU_DRIVER[format], "--", path]
        outcome = await self._run(argv, f"image {path}", LOOK, LOOK_BOUNDS, {path: False})
        if outcome.status != 0:
            raise explain(f"image {path}", outcome, Path(path).parent, looking=True)
        _info(path, outcome.out)
        found: dict[str, Any] = json.loads(outcome.out)
        return found

    async def examine(self, path: str, format: ImageFormat, repair: str | None = None) -> Check | None:
        """Check an image that nobody uses. `repair`: "leaks" or "all", what to put right. None for formats QEMU has no
        check of (VHD, raw). BadImage when it cannot even be opened, InUse."""
        argv = [self._binary, "check", "--output=json", "-f", QEMU_DRIVER[format]]
        argv += [] if repair is None else ["-r", repair]
        outcome = await self._run([*argv, "--", path], f"image {path}", None, COPY_BOUNDS, {path: repair is not None})
        if outcome.status == NO_CHECK:
            return None
        with suppress(ValueError, TypeError, AttributeError):
            found = json.loads(outcome.out)
            numbers = {key: int(found.get(key, 0)) for key in _COUNTS}
            return Check(
                errors=numbers["corruptions"] + numbers["check-errors"],
                leaks=numbers["leaks"],
                repaired=numbers["corruptions-fixed"] + numbers["leaks-fixed"],
            )
        raise explain(f"image {path}", outcome, Path(path).parent, looking=True)

    async def create(self, path: str, format: ImageFormat, size: int, layout: Layout = AS_USUAL) -> None:
        """A new empty image. AlreadyExists if the name is taken, NoSpace, NotFound (the directory), NotPermitted."""
        async with new_file(path) as part:
            await self._create(part, path, format, size, layout)

    async def convert(
        self,
        source: str,
        source_format: ImageFormat,
        path: str,
        format: ImageFormat,
        size: int,
        on_progress: OnProgress | None = None,
        layout: Layout = AS_USUAL,
    ) -> None:
        """A new image of `size` bytes with the content of `source` (which must not be larger). A backing file that it
        names, perhaps only since it was looked at, is not opened. Errors as `create`, and InUse when a running QEMU
        writes the source. Takes as long as it takes; cancelling removes the file."""
        named = [*_source(source, source_format), "--", _named(source, source_format)]
        await self._convert(named, source, path, format, size, on_progress, layout)

    async def convert_vmdk(
        self,
        source: str,
        offset: int,
        length: int,
        path: str,
        format: ImageFormat,
        size: int,
        on_progress: OnProgress | None = None,
    ) -> None:
        """As `convert`, from the VMDK that is `length` bytes from `offset` of the file `source` (an OVA). It must have
        been looked at before (`vmdk.inspect_vmdk`): QEMU opens whatever a VMDK refers to, except a parent."""
        file = {"driver": "file", "filename": source, "read-only": True}
        node = {"driver": "raw", "offset": offset, "size": length, "file": file}
        image = {"driver": "vmdk", "backing": None, "file": node}
        named = ["--", "json:" + json.dumps(image, ensure_ascii=False)]
        await self._convert(named, source, path, format, size, on_progress)

    async def convert_node(
        self,
        node: Mapping[str, object],
        path: str,
        format: ImageFormat,
        size: int,
        on_progress: OnProgress | None = None,
    ) -> None:
        """As `convert`, from a block node as QEMU's -blockdev has them: whatever it names is opened, nothing else."""
        named = ["--", "json:" + json.dumps(node, ensure_ascii=False)]
        await self._convert(named, None, path, format, size, on_progress)

    async def pack_vmdk(self, node: Mapping[str, object], path: str, on_progress: OnProgress | None = None) -> None:
        """A new VMDK of the kind that OVF packages have (compressed, written once) with the content of a node. Errors
        as `convert`."""
        async with new_file(path) as part:
            argv = [self._binary, "convert", "-p", "-O", "vmdk", "-o", "subformat=streamOptimized"]
            argv += ["--", "json:" + json.dumps(node, ensure_ascii=False), part]
            outcome = await programs.run(argv, f"image {path}", None, COPY_BOUNDS, teller(on_progress))
            if outcome.status != 0:
                raise explain(f"image {path}", outcome, Path(path).parent)

    async def _convert(
        self,
        named: Sequence[str],
        source: str | None,
        path: str,
        format: ImageFormat,
        size: int,
        on_progress: OnProgress | None,
        layout: Layout = AS_USUAL,
    ) -> None:
        async with new_file(path) as part:
            await self._create(part, path, format, size, layout)
            # -n: into the image just made, which has the wanted size (QEMU cannot resize a VHD); it reads as zeroes.
            argv = [self._binary, "convert", "-p", "-n", "--target-is-zero", "-O", QEMU_DRIVER[format]]
            argv += ["--bitmaps"] if layout.bitmaps else []
            argv += [*named, part]
            tell = teller(on_progress)
            if source is None:  # several images, perhaps behind sockets of others
                outcome = await programs.run(argv, f"image {path}", None, COPY_BOUNDS, tell)
            else:
                files = {source: False, part: True}
                outcome = await self._run(argv, f"image {path}", None, COPY_BOUNDS, files, tell)
            if outcome.status != 0:
                raise explain(f"image {path}", outcome, Path(path).parent, source=source)

    async def resize(self, path: str, format: ImageFormat, size: int, shrink: bool = False) -> None:
        """Give a raw or qcow2 image another size; a smaller one only with `shrink`. BadImage for the other formats,
        which QEMU cannot resize (see `hostler.storage.resizing`)."""
        if format not in (ImageFormat.RAW, ImageFormat.QCOW2):
            raise BadImage(f"image {path}", f"QEMU cannot resize a {format}", "hostler volume grow does")
        argv = [self._binary, "resize", "-q", "-f", QEMU_DRIVER[format], *(["--shrink"] if shrink else [])]
        outcome = await self._run([*argv, "--", path, str(size)], f"image {path}", QUICK, COPY_BOUNDS, {path: True})
        if outcome.status != 0:
            raise explain(f"image {path}", outcome, Path(path).parent)

    async def _create(self, part: str, path: str, format: ImageFormat, size: int, layout: Layout = AS_USUAL) -> None:
        options = [o for o in (_OPTIONS.get(format, ""), *layout.options(format)) if o]
        argv = [self._binary, "create", "-q", "-f", QEMU_DRIVER[format]]
        argv += ["-o", ",".join(options)] if options else []
        outcome = await self._run([*argv, "--", part, str(size)], f"image {path}", QUICK, COPY_BOUNDS, {part: True})
        if outcome.status != 0:
            raise explain(f"image {path}", outcome, Path(path).parent)
        if layout.preallocation is Preallocation.FULL and format is ImageFormat.VHD_FIXED:
            await whole(asyncio.to_thread(_fill_up, part, path), _nothing)


@contextmanager
def _admitted(guard: Guard, files: Mapping[str, bool]) -> Iterator[Admitted | None]:
    with ExitStack() as stack:
        try:
            as_user = stack.enter_context(guard.admit(files))
        except OSError as error:
            path = str(error.filename or next(iter(files)))
            kind = NotFound if isinstance(error, FileNotFoundError | NotADirectoryError) else NotPermitted
            raise kind(f"image {path}", f"cannot be opened: {error.strerror}", "check the path and its mode") from error
        yield as_user


@asynccontextmanager
async def new_file(path: str) -> AsyncIterator[str]:
    """A temporary file (mode 0600) that becomes `path` when the block succeeds, and is removed when it does not."""
    part = _reserve(path)
    try:
        yield part
        await whole(asyncio.to_thread(keep_file, part, path), lambda _: asyncio.to_thread(os.unlink, path))
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


@asynccontextmanager
async def scratch_file(path: str) -> AsyncIterator[str]:
    """A temporary file beside `path` (which must not exist yet) that is gone after the block."""
    part = _reserve(path)
    try:
        yield part
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


def leftovers(path: str) -> Sequence[Path]:
    """Temporary files of `path` that a killed daemon left."""
    final = Path(path)
    mark = _mark(final)
    try:
        return [p for p in final.parent.iterdir() if p.name.startswith(mark) and p.name.endswith(PART)]
    except OSError:
        return []


def part_prefix(path: str) -> str:
    """How the paths of temporary files of `path` begin."""
    final = Path(path)
    return str(final.with_name(_mark(final)))


def part_of(path: str, token: str) -> str:
    """A temporary name of `path` that is always the same for one `token` (letters and digits)."""
    final = Path(path)
    return str(final.with_name(_mark(final) + token + PART))


def _mark(final: Path) -> str:
    """How temporary names of `final` begin. A digest, since the name itself may be as long as names can be."""
    return f".{hashlib.sha256(os.fsencode(final.name)).hexdigest()[:16]}."


def _reserve(path: str) -> str:
    final = Path(path)
    if os.path.lexists(final):
        raise _taken(path)
    part = final.with_name(_mark(final) + secrets.token_hex(4) + PART)
    try:
        os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise explain_os(f"image {path}", error, final.parent) from error
    return str(part)


def keep_file(part: str, path: str) -> None:
    """Onto the disk, then to its own name; `part` may stay beside it."""
    try:
        _sync(part)
        take_name(part, path)
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError as error:
        raise explain_os(f"image {path}", error, Path(path).parent) from error


async def _nothing(_result: object) -> None:
    """A file that was made full is removed by whoever made it."""


def _fill_up(part: str, path: str) -> None:
    """Take all the space of a file."""
    fd = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, os.fstat(fd).st_size)
    except OSError as error:
        raise explain_os(f"image {path}", error, Path(path).parent) from error
    finally:
        os.close(fd)


def take_name(part: str, path: str) -> None:
    """Give a file its name, durably, unless it is taken; `part` may stay as a second one. FileExistsError, OSError.

    link(2) fails where the name is taken, rename(2) would overwrite."""
    try:
        os.link(part, path)
    except FileExistsError:
        if not os.path.samefile(part, path):
            raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # A file system without hard links (vfat, some FUSE): take the name exclusively, then put the file there.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        os.rename(part, path)
    _sync(str(Path(path).parent))


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _taken(path: str) -> AlreadyExists:
    return AlreadyExists(f"file {path}", "exists already; files are never overwritten", "choose another name or path")


def source_options(source: str, format: ImageFormat) -> Sequence[str]:
    """How qemu-img and qemu-nbd are told what to read: options, then the name."""
    return [*_source(source, format), "--", _named(source, format)]


def _source(source: str, format: ImageFormat) -> Sequence[str]:
    if format is ImageFormat.QCOW2:
        return []  # its name says it
    return ["--image-opts"] if format is ImageFormat.VHD_FIXED else ["-f", QEMU_DRIVER[format]]


def _named(source: str, format: ImageFormat) -> str:
    """A fixed VHD is read as what it is, raw data before a footer: QEMU's vpc driver takes the size of one that some
    programs made (Virtual PC, old QEMUs) from its cylinders, heads and sectors, which may leave out its end.

    A qcow2 is read without its backing file. Images with one are refused before, but whoever may write the image can
    name one in its header between that look and this opening, and qemu-img opens as root what is named there."""
    if format is ImageFormat.QCOW2:
        file = {"driver": "file", "filename": source}
        return "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": file}, ensure_ascii=False)
    if format is not ImageFormat.VHD_FIXED:
        return source
    try:
        size = os.stat(source).st_size - SECTOR
    except OSError as error:
        raise NotFound(f"image {source}", f"cannot be read: {error.strerror}", "check the path") from error
    return f"driver=raw,size={size},file.driver=file,file.filename={source.replace(',', ',,')}"


def teller(on_progress: OnProgress | None) -> programs.OnText | None:
    """What reads qemu-img's progress (-p)."""
    if on_progress is None:
        return None
    tell = on_progress

    def on_text(text: str) -> None:
        found = _PROGRESS.findall(text)
        if found:
            tell(min(1.0, float(found[-1]) / 100))

    return on_text


def _info(path: str, text: str) -> ImageInfo:
    try:
        found = json.loads(text)
        backing = found.get("full-backing-filename") or found.get("backing-filename")
        details = found.get("format-specific", {}).get("data", {})
        return ImageInfo(
            int(found["virtual-size"]), int(found.get("actual-size", 0)), backing, bool(details.get("corrupt", False))
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadImage(f"image {path}", "qemu-img's answer about it cannot be read", "check the file") from error


LOG_PENDING = (
    "the VHDX was not closed by its last user, and its log can be replayed only where it may be written",
    "repair it with 'qemu-img check -r all IMAGE' while nobody uses it, or start a VM that writes it once",
)
_MEANINGS: tuple[tuple[str, type[HostlerError], str, str], ...] = (
    ("No space left on device", NoSpace, "the disk is full", "free some space"),
    ("Disk quota exceeded", NoSpace, "the disk quota is used up", "free some space"),
    ("File too large", NoSpace, "the file system does not hold a file of that size", "use another file system"),
    ("size is too large for file format", NoSpace, "the file system does not hold a file of that size", "use another"),
    ("Failed to get", InUse, "a running VM or another program uses it", "stop that, or wait for it"),
    ("Is another process using", InUse, "a running VM or another program uses it", "stop that, or wait for it"),
    ("No such file", NotFound, "does not exist", "check the path"),
    ("Permission denied", NotPermitted, "may not be opened by this daemon", "check owner and mode"),
    ("Read-only file system", NotPermitted, "the file system is mounted read-only", "choose another place"),
)


def explain(
    subject: str, outcome: programs.Outcome, directory: Path, looking: bool = False, source: str | None = None
) -> HostlerError:
    """What a failed qemu-img means. `looking`: it only read, so what it refuses is a bad image."""
    last = _last_line(outcome)
    if "log that needs to be replayed" in outcome.err:
        return LogPending(source_or(subject, source), *LOG_PENDING)
    if source is not None and "Could not open" in outcome.err and source in outcome.err:
        subject, looking = f"image {source}", True
    for mark, kind, cause, advice in _MEANINGS:
        if mark in outcome.err:
            return kind(subject, cause, advice, output=last)
    if looking:
        return BadImage(subject, f"QEMU does not open it: {last}", "check the file, or restore it from a backup")
    # The vpc driver of QEMU 7.2 says only "Unable to create or write VHD header" when the disk is full.
    if _full(directory):
        return NoSpace(subject, "the disk is full", f"free some space in {directory}", output=last)
    return QemuFailed(subject, f"qemu-img failed: {last}", "", output=last, status=outcome.status)


def source_or(subject: str, source: str | None) -> str:
    """What an error about a source is about."""
    return subject if source is None else f"image {source}"


def explain_os(subject: str, error: OSError, directory: Path) -> HostlerError:
    """What a failed system call in `directory` means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(subject, "the disk is full", f"free some space in {directory}")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"directory {directory}", "does not exist", "create it first, or choose another path")
    return NotPermitted(subject, f"cannot be made: {error.strerror}", f"check owner and mode of {directory}")


def _full(directory: Path) -> bool:
    try:
        found = os.statvfs(directory)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < 1024 * 1024


def _last_line(outcome: programs.Outcome) -> str:
    lines = outcome.err.strip().splitlines()
    if lines:
        return lines[-1].removeprefix("qemu-img: ")[:500]
    return f"it ended with signal {-outcome.status}" if outcome.status < 0 else f"it ended with {outcome.status}"
