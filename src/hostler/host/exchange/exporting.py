"""Exporting a VM: the application functions; the work is the operation `vm.export`."""

from __future__ import annotations

from hostler.host.context import Host
from hostler.host.operations import export
from hostler.model.job import Job
from hostler.model.transfer import ExportReport, ExportRequest


class VmExports:
    """The application functions about machines that go out."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def check(self, ref: str, request: ExportRequest) -> ExportReport:
        """What an export would write, and what would be lost. Errors as `run`, but the VM may be running."""
        return await export.check_export(self._host, self._host.actor(ref).record, request)

    async def run(self, ref: str, request: ExportRequest, by: str) -> Job:
        """Begin to write a VM that is off; the job's result is an ExportReport. WrongState, AlreadyExists, NotFound
        (the directory), NoSpace."""
        actor = self._host.actor(ref)
        export.OPERATION.allow(actor.record)
        report = await export.check_export(self._host, actor.record, request)
        return await export.OPERATION.begin(self._host, actor, by, export.params_of(report, request))
