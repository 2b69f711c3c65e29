"""Where each device of a VM sits on the PCI Express root bus. Pure.

The guest sees these addresses: they name its network interfaces and order its disks, and a migration stream names
devices by them. So they depend on the configuration only, never on the order in which devices were given, on the host
or on QEMU's own choice, and they are append-only: changing this table breaks every saved and running VM.

    slot      fn   device
    00        0    host bridge (QEMU's own)
    01        0    VGA
    02        0    virtio-serial (guest agent)     always there, so that functions 1 to 3 are found
              1    virtio-balloon
              2    virtio-rng
              3    USB (xHCI)
    03        0-3  SCSI controller 0 to 3           in order, so that function 0 exists when any does
    04 - 06        reserved for groups of hot-plug root ports (8 each)
    07 - 1e   0    network adapter in slot 0 to 23
    1f        0    ISA bridge, 2: AHCI (the four IDE disks), 3: SMBus (QEMU's own)

Everything that can come and go by itself has function 0 of its own slot: a guest does not look at the other functions
of a slot whose function 0 is empty (PCI Local Bus 3.0, 6.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hostler.model.errors import InvalidInput, LimitExceeded
from hostler.model.nic import Nic

MAX_NICS: Final = 24
MAX_CONTROLLERS: Final = 4

_FIRST_NIC: Final = 0x07
_SCSI: Final = 0x03


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """A slot (0-31) and function (0-7) on the root bus. `shared`: other functions of the slot may be in use."""

    slot: int
    function: int = 0
    shared: bool = False

    def options(self) -> dict[str, str | bool]:
        """The properties that put a device there."""
        place: dict[str, str | bool] = {"bus": "pcie.0", "addr": f"0x{self.slot:x}.{self.function}"}
        return place | ({"multifunction": True} if self.shared and self.function == 0 else {})


VGA: Final = Address(0x01)
SERIAL: Final = Address(0x02, 0, shared=True)
BALLOON: Final = Address(0x02, 1, shared=True)
RNG: Final = Address(0x02, 2, shared=True)
USB: Final = Address(0x02, 3, shared=True)


def scsi_controller(index: int) -> Address:
    """SCSI controller `index` (0-3)."""
    if not 0 <= index < MAX_CONTROLLERS:
        raise ValueError(f"there is no SCSI controller {index}")
    return Address(_SCSI, index, shared=True)


def nic(slot: int) -> Address:
    """The network adapter in adapter slot `slot` (0-23)."""
    if not 0 <= slot < MAX_NICS:
        raise ValueError(f"there is no adapter slot {slot}")
    return Address(_FIRST_NIC + slot)


def nic_slots(nics: Sequence[Nic]) -> dict[str, int]:
    """Adapter slot of each adapter, by its id: its own `slot`, else its position.

    LimitExceeded above 24 adapters; InvalidInput where two would share a slot.
    """
    if len(nics) > MAX_NICS:
        raise LimitExceeded(
            "network adapters",
            f"the machine has slots for {MAX_NICS}, not for {len(nics)}",
            "use VLANs on fewer adapters",
            limit="vm_nics",
            value=len(nics),
            maximum=MAX_NICS,
        )
    slots: dict[str, int] = {}
    for position, adapter in enumerate(nics):
        slot = position if adapter.slot is None else adapter.slot
        if slot in slots.values():
            other = next(name for name, taken in slots.items() if taken == slot)
            raise InvalidInput(
                f"network adapter {adapter.id}", f"its slot {slot} is taken by {other}", "give it a free slot"
            )
        slots[adapter.id] = slot
    return slots


def free_nic_slot(nics: Sequence[Nic]) -> int:
    """The lowest free adapter slot; LimitExceeded when there is none."""
    taken = set(nic_slots(nics).values())
    free = next((slot for slot in range(MAX_NICS) if slot not in taken), None)
    if free is None:
        raise LimitExceeded("network adapters", f"all {MAX_NICS} slots are taken", "remove an adapter first")
    return free
