"""Network adapters of a VM."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from hostler.model.base import Record
from hostler.model.disk import DeviceId

Mac = Annotated[str, StringConstraints(pattern=r"^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$")]
"""Lower case; the lowest bit of the first byte is 0, since an odd one is a group address (IEEE 802)."""
BridgeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,15}$")]
"""Linux allows 15 bytes for an interface name (IFNAMSIZ is 16)."""


class Network(StrEnum):
    """What an adapter is connected to. `user` is QEMU's own NAT (needs no right, guest reaches out only); `bridge`
    is a Linux bridge of the host (needs root or a prepared tap); `none` is an unplugged cable."""

    USER = "user"
    BRIDGE = "bridge"
    NONE = "none"


class Nic(Record):
    """A virtio-net adapter. `queues` is the number of receive/transmit queue pairs (multi-queue when above 1). `slot`
    is its stable place in the machine; None means its position among the VM's adapters, so whoever removes one that is
    not the last gives the others their slots first (`hostler.qemu.pci.nic_slots`)."""

    id: DeviceId
    mac: Mac
    network: Network = Network.USER
    bridge: BridgeName | None = None
    queues: int = Field(default=1, ge=1, le=64)
    slot: int | None = Field(default=None, ge=0, le=23)

    @model_validator(mode="after")
    def _bridge(self) -> Self:
        if (self.network is Network.BRIDGE) != (self.bridge is not None):
            raise ValueError("a bridge name is given exactly when the network is 'bridge'")
        return self
