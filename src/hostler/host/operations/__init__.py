"""Every operation on a VM, by the kind of its job."""

from __future__ import annotations

from hostler.host.operation import Operation
from hostler.host.operations import (
    backup,
    checkpoint_apply,
    checkpoint_clone,
    checkpoint_create,
    checkpoint_delete,
    discard,
    disk_flatten,
    disk_media,
    disk_move,
    disk_tune,
    disks,
    export,
    pause,
    restore,
    restore_backup,
    save,
    start,
    stop,
)

OPERATIONS: dict[str, Operation] = {
    operation.kind: operation
    for operation in (
        start.OPERATION,
        stop.SHUTDOWN,
        stop.TURN_OFF,
        pause.PAUSE,
        pause.RESUME,
        pause.RESET,
        save.OPERATION,
        restore.OPERATION,
        discard.OPERATION,
        disks.ATTACH,
        disks.DETACH,
        backup.OPERATION,
        disk_move.OPERATION,
        disk_flatten.OPERATION,
        disk_tune.GROW,
        disk_tune.LIMIT,
        disk_media.OPERATION,
        checkpoint_create.OPERATION,
        checkpoint_delete.OPERATION,
        checkpoint_apply.OPERATION,
        checkpoint_clone.OPERATION,
        restore_backup.OPERATION,
        export.OPERATION,
    )
}
