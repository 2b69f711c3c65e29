"""PCI addresses: never two at one place, never moved by what comes later."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler.model.errors import InvalidInput, LimitExceeded
from hostler.model.nic import Nic
from hostler.qemu import pci

pytestmark = pytest.mark.unit


def nic(number: int, slot: int | None = None) -> Nic:
    return Nic(id=f"n{number}", mac=f"52:54:00:00:00:{number:02x}", slot=slot)


SLOTS = st.lists(st.integers(0, pci.MAX_NICS - 1), unique=True, max_size=pci.MAX_NICS)


def test_the_whole_table_has_no_place_twice() -> None:
    table = [pci.VGA, pci.SERIAL, pci.BALLOON, pci.RNG, pci.USB]
    table += [pci.scsi_controller(n) for n in range(pci.MAX_CONTROLLERS)]
    table += [pci.nic(n) for n in range(pci.MAX_NICS)]
    places = {(address.slot, address.function) for address in table}
    assert len(places) == len(table)
    built_in_or_reserved = {0x00, 0x04, 0x05, 0x06, 0x1F}
    assert not built_in_or_reserved & {slot for slot, _ in places}
    assert all(0 <= slot < 32 and 0 <= function < 8 for slot, function in places)


def test_only_function_0_of_a_shared_slot_says_so() -> None:
    assert pci.SERIAL.options() == {"bus": "pcie.0", "addr": "0x2.0", "multifunction": True}
    assert pci.RNG.options() == {"bus": "pcie.0", "addr": "0x2.2"}
    assert pci.nic(23).options() == {"bus": "pcie.0", "addr": "0x1e.0"}


@given(SLOTS)
def test_adding_an_adapter_moves_no_other(slots: list[int]) -> None:
    nics = [nic(number, slot) for number, slot in enumerate(slots)]
    before = pci.nic_slots(nics)
    if len(nics) == pci.MAX_NICS:
        with pytest.raises(LimitExceeded):
            pci.free_nic_slot(nics)
        return
    after = pci.nic_slots([*nics, nic(99, pci.free_nic_slot(nics))])
    assert before.items() <= after.items()


@given(st.integers(0, pci.MAX_NICS - 1))
def test_appending_an_adapter_without_a_slot_moves_no_other(count: int) -> None:
    nics = [nic(number) for number in range(count)]
    assert pci.nic_slots(nics).items() <= pci.nic_slots([*nics, nic(count)]).items()


@given(SLOTS.filter(bool), st.data())
def test_removing_an_adapter_moves_no_other(slots: list[int], data: st.DataObject) -> None:
    nics = [nic(number, slot) for number, slot in enumerate(slots)]
    gone = data.draw(st.sampled_from(nics))
    before = pci.nic_slots(nics)
    after = pci.nic_slots([one for one in nics if one is not gone])
    assert after == {name: slot for name, slot in before.items() if name != gone.id}


def test_two_adapters_in_one_slot_are_refused() -> None:
    with pytest.raises(InvalidInput, match="taken by n0"):
        pci.nic_slots([nic(0), nic(1, slot=0)])


def test_more_adapters_than_slots_are_refused() -> None:
    with pytest.raises(LimitExceeded) as caught:
        pci.nic_slots([nic(number) for number in range(pci.MAX_NICS + 1)])
    assert caught.value.details["maximum"] == pci.MAX_NICS


@pytest.mark.parametrize("index", [-1, 4])
def test_controllers_outside_the_table_are_a_mistake(index: int) -> None:
    with pytest.raises(ValueError, match="no SCSI controller"):
        pci.scsi_controller(index)


@pytest.mark.parametrize("slot", [-1, 24])
def test_adapter_slots_outside_the_table_are_a_mistake(slot: int) -> None:
    with pytest.raises(ValueError, match="no adapter slot"):
        pci.nic(slot)
