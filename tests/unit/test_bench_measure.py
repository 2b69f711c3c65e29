"""How the benchmarks compare: whose turn it is, medians, ratios; and what bare QEMU is given to run."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hostler.model.errors import HostlerError

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "unit" / "golden" / "incoming.args"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hostler_bench_{name}", ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


measure, bare = load("measure"), load("bare")


def test_contenders_take_turns_in_changing_order_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []

    async def one(name: str) -> dict[str, float]:
        calls.append(name)
        return {"time": float(len(calls))}

    contenders = [measure.Contender(name, lambda name=name: one(name)) for name in ("qemu", "hostler")]
    result = asyncio.run(measure.in_turns(measure.Result("x"), contenders, rounds=2))
    assert calls == ["hostler", "qemu", "qemu", "hostler", "hostler", "qemu"]
    assert result.samples == {"qemu": [{"time": 3.0}, {"time": 6.0}], "hostler": [{"time": 4.0}, {"time": 5.0}]}


def test_ratios_are_of_medians_and_against_the_base() -> None:
    result = measure.Result("x", samples={"qemu": [{"t": 2.0}, {"t": 4.0}, {"t": 90.0}], "hostler": [{"t": 5.0}]})
    rows = {row.contender: row for row in result.rows()}
    assert (rows["qemu"].median, rows["qemu"].ratio) == (4.0, None)
    assert (rows["hostler"].median, rows["hostler"].ratio) == (5.0, 1.25)
    assert "1.25 x" in measure.table(result)


def test_an_optional_contender_that_fails_leaves_and_the_others_go_on() -> None:
    async def fails() -> dict[str, float]:
        raise HostlerError("guest", "hangs")

    async def works() -> dict[str, float]:
        return {"time": 1.0}

    others = [measure.Contender("qemu", works), measure.Contender("virsh", fails, optional=True)]
    result = asyncio.run(measure.in_turns(measure.Result("x"), others, rounds=2))
    assert len(result.samples["qemu"]) == 2
    assert "hangs" in result.skipped["virsh"]
    with pytest.raises(HostlerError, match="hangs"):
        asyncio.run(measure.in_turns(measure.Result("x"), [measure.Contender("hostler", fails)], rounds=1))


def test_who_was_left_out_is_printed_with_the_reason() -> None:
    assert "without virsh: not installed" in measure.table(measure.Result("x", skipped={"virsh": "not installed"}))


def test_bare_qemu_runs_hostlers_own_command_line_in_its_own_place() -> None:
    line = [word.replace("path=/run/h/vm/qmp.sock", "fd=7") for word in GOLDEN.read_text().split("\n") if word]
    ours = bare.by_hand(line, Path("/run/h/vm"), Path("/x"))
    assert "-S" not in ours
    assert "-incoming" not in ours
    assert "socket,id=qmp,path=/x/qmp.sock,server=on,wait=off" in ours
    assert not [word for word in ours if "/run/h/vm" in word or "fd=" in word]
    assert len(line) - len(ours) == len(["-S", "-incoming", "defer"])
    assert bare.by_hand(line, Path("/run/h/vm"), Path("/x"), incoming=True)[-2:] == ["-incoming", "defer"]
    assert bare.scsi_bus(line) == "scsi0.0"
