"""Checkpoints, for programs: `client.checkpoints`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostler.client import calls

if TYPE_CHECKING:
    from hostler.client.client import Sender
    from hostler.model.checkpoint import CheckpointView
    from hostler.model.checkpoint_requests import (
        CheckpointApply,
        CheckpointChange,
        CheckpointClone,
        CheckpointCreate,
    )
    from hostler.model.job import Job


class Checkpoints:
    """Checkpoints of VMs. `vm` and `ref` are ids or names."""

    def __init__(self, send: Sender) -> None:
        self._send = send

    def list(self, vm: str) -> list[CheckpointView]:
        return self._send(calls.checkpoints(vm))

    def get(self, vm: str, ref: str) -> CheckpointView:
        return self._send(calls.checkpoint(vm, ref))

    def create(self, vm: str, request: CheckpointCreate, *, wait: float = 0.0) -> Job:
        return self._send(calls.checkpoint_create(vm, request, wait=wait))

    def change(self, vm: str, ref: str, request: CheckpointChange) -> CheckpointView:
        return self._send(calls.checkpoint_change(vm, ref, request))

    def delete(self, vm: str, ref: str, *, subtree: bool = False, wait: float = 0.0) -> Job:
        return self._send(calls.checkpoint_delete(vm, ref, subtree=subtree, wait=wait))

    def apply(self, vm: str, ref: str, request: CheckpointApply, *, wait: float = 0.0) -> Job:
        return self._send(calls.checkpoint_apply(vm, ref, request, wait=wait))

    def clone(self, vm: str, ref: str, request: CheckpointClone, *, wait: float = 0.0) -> Job:
        return self._send(calls.checkpoint_clone(vm, ref, request, wait=wait))
