"""Facts of a machine, read from a copy of its /proc and /sys: another machine stands on the desk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler.hardware.facts import parse_cpu_list, read_facts
from hostler.hardware.memory import free_memory, total_memory
from hostler.model.host import NumaNode
from hostler.network.mac import new_mac
from hostler.network.taps import Taps

pytestmark = pytest.mark.unit

FILES = {
    "proc/meminfo": "MemTotal:       65536000 kB\nMemFree:         1000000 kB\nMemAvailable:   32768000 kB\n",
    "proc/cpuinfo": (
        "processor\t: 0\nmodel name\t: Xeon X5570 @ 2.93GHz\nflags\t\t: vmx fpu ept\n\n"
        "processor\t: 1\nmodel name\t: x\n"
    ),
    "sys/devices/system/cpu/online": "0-3,8-9\n",
    "sys/devices/system/node/node0/cpulist": "0-3\n",
    "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:       32768000 kB\nNode 0 MemFree: 1 kB\n",
    "sys/devices/system/node/node10/cpulist": "8-9\n",
    "sys/devices/system/node/node10/meminfo": "Node 10 MemTotal:      32768000 kB\n",
    "sys/devices/system/node/node2/cpulist": "\n",
    "sys/devices/system/node/node2/meminfo": "Node 2 MemTotal:       1024 kB\n",
    "sys/devices/system/node/online": "0,2,10\n",
    "proc/sys/kernel/random/boot_id": "9d9b8a2e-0000-4000-8000-000000000000\n",
    "proc/sys/kernel/osrelease": "6.1.0-13-amd64\n",
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_everything_is_read_below_the_root(machine: Path) -> None:
    facts = read_facts(machine)
    assert facts.logical_processors == 6
    assert facts.cpu_name == "Xeon X5570 @ 2.93GHz"
    assert facts.cpu_flags == ("ept", "fpu", "vmx")
    assert facts.memory == total_memory(machine) == 65_536_000 * 1024
    assert free_memory(machine) == 32_768_000 * 1024
    assert facts.numa == (
        NumaNode(id=0, cpus=(0, 1, 2, 3), memory=32_768_000 * 1024),
        NumaNode(id=2, cpus=(), memory=1024 * 1024),
        NumaNode(id=10, cpus=(8, 9), memory=32_768_000 * 1024),
    )
    assert (facts.boot_id[:8], facts.kernel, facts.machine_id[:4]) == ("9d9b8a2e", "6.1.0-13-amd64", "0123")


def test_a_machine_without_sysfs_numa_or_machine_id(machine: Path) -> None:
    shutil.rmtree(machine / "sys")
    shutil.rmtree(machine / "etc")
    facts = read_facts(machine)
    assert (facts.logical_processors, facts.numa, facts.machine_id) == (2, (), "")


def test_this_machine_makes_sense() -> None:
    facts = read_facts()
    assert facts.logical_processors >= 1
    assert 0 < free_memory() <= facts.memory == total_memory()
    assert len(facts.boot_id) == 36
    assert facts.cpu_flags
    assert sum(len(node.cpus) for node in facts.numa) in (0, facts.logical_processors)


@given(numbers=st.sets(st.integers(0, 300)))
def test_the_kernels_list_format_is_read_back(numbers: set[int]) -> None:
    ordered = sorted(numbers)
    ranges: list[list[int]] = []
    for number in ordered:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
    assert parse_cpu_list(text + "\n") == tuple(ordered)


@given(three=st.binary(min_size=3, max_size=3))
def test_addresses_are_local_unicast_and_come_from_the_source_alone(three: bytes) -> None:
    mac = new_mac(lambda count: three[:count])
    assert mac == "52:54:00:" + ":".join(f"{byte:02x}" for byte in three)
    first = int(mac[:2], 16)
    assert first & 0b10, "locally administered"
    assert not first & 0b01, "unicast"


@given(host=st.text(max_size=40), vm=st.text(max_size=40), nic=st.text(max_size=31))
def test_tap_names_fit_the_kernel_and_are_stable(host: str, vm: str, nic: str) -> None:
    name = Taps(host).name(vm, nic)
    assert name == Taps(host).name(vm, nic)
    assert len(name) <= 15
    assert name.isalnum()
    assert name.startswith("hl")


def test_tap_names_differ_between_hosts_vms_and_adapters() -> None:
    names = {Taps(h).name(v, n) for h in ("h1", "h2") for v in ("v1", "v2") for n in ("n0", "n1")}
    assert len(names) == 8
