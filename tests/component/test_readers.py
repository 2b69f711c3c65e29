"""Programs that read images run as nobody in particular: on real images, in a directory that is closed to others."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import images
import pytest

from hostler.host.volumes.readers import BASE, SPAN, Readers
from hostler.model.disk import ImageFormat
from hostler.model.errors import NotFound
from hostler.model.units import MiB
from hostler.storage.checksum import checksum
from hostler.storage.content import Content
from hostler.storage.guard import Admitted
from hostler.storage.programs import run
from hostler.storage.qemu_img import QemuImg

pytestmark = [pytest.mark.component, pytest.mark.skipif(os.geteuid() != 0, reason="only root runs programs as others")]

SIZE = 8 * MiB


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory only root may enter; with what breaks naive quoting in its name."""
    directory = tmp_path / 'a,b "c" \\d é'
    directory.mkdir(mode=0o700)
    return directory


@pytest.mark.parametrize("format", ImageFormat)
async def test_everything_works_without_rights_and_leaves_none(place: Path, format: ImageFormat) -> None:
    image, source, target = QemuImg(guard=Readers()), place / "source.img", place / f"new.{format}"
    source.write_bytes(os.urandom(2 * MiB) + bytes(2 * MiB))
    source.chmod(0o600)
    told: list[float] = []
    await image.convert(str(source), ImageFormat.RAW, str(target), format, SIZE, told.append)
    assert told[-1] == 1.0
    expected = source.read_bytes() + bytes(SIZE - 4 * MiB)
    assert (await image.info(str(target), format)).virtual_size == SIZE
    await image.check(str(target), format)
    await image.examine(str(target), format, "all")
    async with Content(str(target), format, SIZE, image) as content:
        assert (await checksum(content)).sha256 == hashlib.sha256(expected).hexdigest()
    if format in (ImageFormat.RAW, ImageFormat.QCOW2):
        await image.resize(str(target), format, 2 * SIZE)
    back = place / "back.img"
    await image.convert(str(target), format, str(back), ImageFormat.RAW, 2 * SIZE)
    assert back.read_bytes()[:SIZE] == expected
    for path in (source, target, back):
        assert (os.stat(path).st_uid, os.stat(path).st_mode & 0o777) == (0, 0o600)
        assert "system.posix_acl_access" not in os.listxattr(path)


async def test_compressed_clusters_are_read_by_nobody_too(place: Path) -> None:
    source, packed = place / "source.img", place / "packed.qcow2"
    source.write_bytes(b"compress me " * 100_000)
    images.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", source, packed)
    packed.chmod(0o600)
    size = -(-len(source.read_bytes()) // 512) * 512
    async with Content(str(packed), ImageFormat.QCOW2, size, QemuImg(guard=Readers())) as content:
        found = await checksum(content)
    assert found.sha256 == hashlib.sha256(source.read_bytes().ljust(size, b"\0")).hexdigest()


async def test_it_can_open_its_file_and_nothing_else(place: Path) -> None:
    mine, other = place / "mine", place / "other"
    for path in (mine, other):
        path.write_bytes(b"secret")
        path.chmod(0o600)
    with Readers().admit({str(mine): False}) as as_user:
        assert as_user is not None
        assert BASE <= as_user.uid < BASE + SPAN
        for words, succeeds in (
            (["cat", str(mine)], True),
            (["tee", str(mine)], False),
            (["cat", str(other)], False),
            (["cat", "/etc/shadow"], False),
            (["kill", "-0", str(os.getpid())], False),
        ):
            outcome = await run(words, "x", 30, as_user=as_user)
            assert (outcome.status == 0) is succeeds, (words, outcome)
        status = (await run(["cat", "/proc/self/status"], "x", 30, as_user=as_user)).out
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0000000000000000"}
    assert fields["NoNewPrivs"] == "1"
    assert fields["Groups"].strip() == ""
    assert mine.read_bytes() == b"secret"


async def test_two_runs_have_different_users_and_a_granted_vm_keeps_its_access(place: Path) -> None:
    path = place / "image"
    path.write_bytes(b"x")
    images.run("setfacl", "-m", "u:1900000007:rw", path)
    readers = Readers()
    with readers.admit({str(path): False}) as first, readers.admit({str(path): False}) as second:
        assert first is not None
        assert second is not None
        assert first.uid != second.uid
    assert images.run("getfacl", "-n", "-p", path).count("user:") == 2  # the owner's and the VM's


async def test_a_file_system_without_access_lists_is_read_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    images.run("mount", "-t", "ramfs", "none", tmp_path / "mnt")
    try:
        path = str(tmp_path / "mnt/a.qcow2")
        await QemuImg(guard=Readers()).create(path, ImageFormat.QCOW2, MiB)
        assert (await QemuImg(guard=Readers()).info(path, ImageFormat.QCOW2)).virtual_size == MiB
    finally:
        images.run("umount", tmp_path / "mnt")


async def test_a_missing_image_is_said_as_before(place: Path) -> None:
    with pytest.raises(NotFound):
        await QemuImg(guard=Readers()).info(str(place / "no"), ImageFormat.QCOW2)


async def test_the_program_dies_with_us_although_it_is_another_user(place: Path) -> None:
    """The parent-death signal is forgotten when a process changes its user, unless it is set afterwards."""
    path = place / "image"
    path.write_bytes(b"x")
    program = (
        "import asyncio, sys\n"
        "from hostler.host.volumes.readers import Readers\nfrom hostler.storage import programs\n"
        "async def main():\n"
        "    with Readers().admit({sys.argv[1]: False}) as as_user:\n"
        "        async with programs.running(['sleep', '1000'], as_user=as_user) as child:\n"
        "            print(child.pid, flush=True)\n"
        "            await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    daemon = await asyncio.create_subprocess_exec(
        os.sys.executable,
        "-c",
        program,
        str(path),
        stdout=asyncio.subprocess.PIPE,  # type: ignore[attr-defined]
    )
    assert daemon.stdout is not None
    pid = int(await daemon.stdout.readline())
    async with asyncio.timeout(30):
        while b"sleep" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    daemon.kill()
    await daemon.wait()
    async with asyncio.timeout(30):
        while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110 - the kernel ends it a moment later
            await asyncio.sleep(0.01)


def test_names_are_put_where_the_paths_were() -> None:
    path = '/a,b "c"/d'
    admitted = Admitted(7, (5,), {path: "/proc/self/fd/5"})
    words = admitted.rewritten([path, 'json:{"filename": "/a,b \\"c\\"/d"}', 'x=1,file.filename=/a,,b "c"/d', "other"])
    assert words == [
        "/proc/self/fd/5",
        'json:{"filename": "/proc/self/fd/5"}',
        "x=1,file.filename=/proc/self/fd/5",
        "other",
    ]
    assert admitted.restored("'/proc/self/fd/5': bad") == f"'{path}': bad"
