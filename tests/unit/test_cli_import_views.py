"""What people see of imports and exports: made from real models, so that the names of fields cannot drift."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hostler.cli import import_views
from hostler.cli.views import Facts
from hostler.model.disk import Bus, ImageFormat, Media
from hostler.model.foreign import (
    DiskFate,
    ForeignKind,
    ForeignMachine,
    ForeignNic,
    ForeignSnapshot,
    ImportDisk,
    ImportReport,
    Remark,
    RemarkKind,
)
from hostler.model.transfer import ExportForm, ExportReport
from hostler.model.units import GiB

pytestmark = pytest.mark.unit


def disk(fate: DiskFate, **more: object) -> ImportDisk:
    fields: dict[str, Any] = {"name": "D:\\a.vhd", "place": "ide 0:0", "fate": fate, "target_bus": Bus.IDE, **more}
    return ImportDisk.model_validate(fields)


REPORT = ImportReport(
    path="/e",
    description="/e/a.xml",
    name="web",
    machine=ForeignMachine(
        kind=ForeignKind.HYPER_V_XML,
        version="5.0",
        name="web",
        memory=2 * GiB,
        nics=(ForeignNic(mac="00:15:5d:00:00:01", network="LAN", name="Network Adapter"), ForeignNic()),
        snapshots=(ForeignSnapshot(id="a1", name="first"), ForeignSnapshot(id="b2", name="second", parent="a1")),
        not_understood=("x/y = 1", "x/z = 2"),
    ),
    disks=(
        disk(
            DiskFate.COPY, path="/e/a.vhd", source_format="vhd", size=GiB, volume="web", target_format=ImageFormat.QCOW2
        ),
        disk(DiskFate.REGISTER, volume="web-2", target_format=ImageFormat.VHD),
        disk(DiskFate.FLATTEN, volume="web-3", target_format=ImageFormat.RAW),
        disk(DiskFate.ATTACH, media=Media.CDROM, name=""),
        disk(DiskFate.ATTACH, media=Media.CDROM, path="/e/a.iso"),
        disk(DiskFate.LEAVE),
    ),
    remarks=(Remark(kind=RemarkKind.GUEST, subject="SCSI disks", text="need a driver", advice="install it"),),
    space_needed=GiB,
    space_free=4 * GiB,
)


def shown(everything: bool = False) -> Facts:
    return import_views.report(json.loads(REPORT.model_dump_json()), everything)


def test_a_report() -> None:
    found = shown()
    facts = dict(found.facts)
    assert facts["kind"] == "hyper-v-xml, version 5.0"
    assert facts["space"] == "up to 1 GiB needed, 4 GiB free"
    assert facts["not understood"] == "2 things; shown with --all"
    assert dict(shown(everything=True).facts)["not understood"] == "x/y = 1\nx/z = 2"
    disks, nics, snapshots, remarks = found.tables
    assert [row[5] for row in disks.rows] == [
        "copied to volume web (qcow2)",
        "becomes volume web-2 (vhd)",
        "flattened to volume web-3 (raw)",
        "empty drive",
        "attached",
        "left out",
    ]
    assert disks.rows[0][:5] == ("ide 0:0", "ide 0:0", "disk", "vhd", "1 GiB")
    assert disks.rows[5][1] == "-"
    assert nics.rows == (("1", "00:15:5d:00:00:01", "LAN", "Network Adapter"), ("2", "-", "-", ""))
    assert snapshots.rows == (("first", "a1", "-"), ("second", "b2", "first"))
    assert remarks.rows == (("GUEST NEEDS", "SCSI disks", "need a driver [install it]"),)


def test_every_kind_of_remark_has_words() -> None:
    assert set(import_views.TITLES) == {kind.value for kind in RemarkKind}


def test_an_export() -> None:
    report = ExportReport(
        vm="web", form=ExportForm.OVA, path="/out/web.ova", files=("web.ovf", "disk0.vmdk"), size=GiB, lost=("TPM",)
    )
    found = json.loads(report.model_dump_json())
    assert dict(import_views.export(found).facts)["not in it"] == "TPM"
    job = {"target": "id", "target_name": "web", "params": {"path": "/out/web.ova"}, "result": found}
    assert import_views.exported(job) == "vm web is in /out/web.ova\nnot in it: TPM"
    assert import_views.exported({**job, "result": None}) == "vm web is in /out/web.ova"
    assert import_views.done({"target": "id", "target_name": "web", "result": None}).startswith("vm web is imported")
