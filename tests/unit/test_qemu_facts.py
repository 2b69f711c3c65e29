"""What is concluded from QEMU's answers and from firmware descriptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hostler.model.errors import HostLacks, QemuFailed
from hostler.model.host import Accelerator
from hostler.qemu import accelerator, facts, firmware

pytestmark = pytest.mark.unit


def test_machines_are_ordered_by_number_and_dying_ones_left_out() -> None:
    names = ["pc-q35-2.9", "q35", "pc-q35-10.0", "pc-i440fx-7.2", "pc-q35-4.0.1", "pc-q35-4.0", "pc-q35-7.2"]
    machines = [{"name": name, "deprecated": name == "pc-q35-2.9"} for name in names]
    assert facts.q35_machines(machines) == ("pc-q35-10.0", "pc-q35-7.2", "pc-q35-4.0.1", "pc-q35-4.0")


def test_only_versioned_migratable_complete_cpus_count() -> None:
    definitions = [
        {"name": "Nehalem-v1", "migration-safe": True, "unavailable-features": []},
        {"name": "Nehalem", "migration-safe": True, "unavailable-features": []},
        {"name": "max", "migration-safe": False, "unavailable-features": []},
        {"name": "odd-v1", "migration-safe": False, "unavailable-features": []},
        {"name": "Haswell-v4", "migration-safe": True, "unavailable-features": ["pcid"]},
        {"name": "silent-v1", "migration-safe": True},
    ]
    assert facts.usable_cpus(definitions) == ("Nehalem-v1",)


def test_default_cpu_is_the_best_usable_one() -> None:
    assert facts.default_cpu(["Nehalem-v1", "Westmere-v1", "qemu64-v1"]) == "Westmere-v1"
    assert facts.default_cpu(["qemu64-v1", "486-v1"]) == "qemu64-v1"
    with pytest.raises(QemuFailed):
        facts.default_cpu(["486-v1"])


async def test_missing_qemu_is_named_with_its_package() -> None:
    with pytest.raises(HostLacks) as caught:
        await facts.discover("qemu-system-nowhere")
    assert "qemu-system-x86" in caught.value.advice


def describe(directory: Path, name: str, code: Path, secure: bool = False, **changes: object) -> None:
    description: dict[str, object] = {
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": str(code), "format": "raw"},
            "nvram-template": {"filename": f"{code}.vars", "format": "raw"},
        },
        "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}],
        "features": ["secure-boot", "requires-smm", "enrolled-keys"] if secure else ["acpi-s3"],
        "tags": [],
    }
    code.touch()
    Path(f"{code}.vars").touch()
    (directory / name).write_text(json.dumps(description | changes))


def test_first_fitting_description_wins_and_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "10-broken.json").write_text("{")
    (tmp_path / "11-other.json").write_text('{"mapping": 3}')
    describe(tmp_path, "20-arm.json", tmp_path / "arm", targets=[{"architecture": "aarch64", "machines": ["virt"]}])
    describe(tmp_path, "30-secure.json", tmp_path / "secure", secure=True)
    describe(tmp_path, "40-plain.json", tmp_path / "plain")
    describe(tmp_path, "50-later.json", tmp_path / "later")
    plain, secure = str(tmp_path / "plain"), str(tmp_path / "secure")
    assert firmware.find_firmware(False, [str(tmp_path)]) == (plain, f"{plain}.vars")
    assert firmware.find_firmware(True, [str(tmp_path)]) == (secure, f"{secure}.vars")


def test_an_administrators_description_replaces_the_distributions(tmp_path: Path) -> None:
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    own.mkdir()
    theirs.mkdir()
    describe(own, "60-x.json", own / "code")
    describe(theirs, "60-x.json", theirs / "code")
    found = firmware.find_firmware(False, [str(own), str(theirs)])
    assert found is not None and found[0] == str(own / "code")


def test_a_description_of_files_that_are_gone_does_not_count(tmp_path: Path) -> None:
    describe(tmp_path, "10-gone.json", tmp_path / "gone")
    (tmp_path / "gone").unlink()
    describe(tmp_path, "20-here.json", tmp_path / "here")
    found = firmware.find_firmware(False, [str(tmp_path)])
    assert found is not None and found[0] == str(tmp_path / "here")


async def test_the_operators_word_needs_no_probe() -> None:
    choice = await accelerator.choose(set(), forced=Accelerator.KVM, binary="/nonexistent")
    assert (choice.kind, choice.forced) == (Accelerator.KVM, True)


@pytest.mark.parametrize(
    ("flags", "device", "word"),
    [
        ({"sse2"}, "/dev/null", "neither vmx nor svm"),
        ({"sse2"}, "/nonexistent", "there is no /nonexistent"),
        ({"svm"}, "/nonexistent", "the module kvm is not loaded"),
    ],
)
async def test_without_hardware_the_reason_is_a_sentence(flags: set[str], device: str, word: str) -> None:
    choice = await accelerator.choose(flags, device=device, binary="/nonexistent")
    assert choice.kind is Accelerator.TCG
    assert word in choice.reason and not choice.reason.endswith(".")


async def test_a_qemu_that_cannot_be_started_means_tcg() -> None:
    choice = await accelerator.choose({"vmx"}, device="/dev/null", binary="/nonexistent")
    assert choice.kind is Accelerator.TCG
    assert "cannot be started" in choice.reason


def test_probe_firmware_starts_where_a_processor_starts() -> None:
    image = accelerator.probe_firmware()
    assert len(image) == 64 * 1024
    jump, distance = image[-16], int.from_bytes(image[-15:-13], "little")
    assert jump == 0xE9
    assert (0xFFF0 + 3 + distance) % 0x10000 == 0
    assert image[0xB0:0xB2] == (31).to_bytes(2, "little")
