"""The pool a guest with private memory does its I/O through: its size, and what the device tree says of it."""

from __future__ import annotations

import pytest

from pyvmm.errors import UsageError
from pyvmm.machine import layout
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.devices import Rng
from pyvmm.machine.fdt import DeviceNode, cells64, machine_tree
from pyvmm.machine.swiotlb import DEFAULT, add_pool, pool_size
from pyvmm.protection import Protection

MIB = layout.MIB
PROTECTED = MachineConfig("payload:hello", Protection.PKVM, memory=256 * MIB, devices=(Rng(),))


def test_pool_is_for_devices_of_guests_with_private_memory() -> None:
    assert pool_size(PROTECTED) == pool_size(PROTECTED._replace(protection=Protection.EMULATED)) == DEFAULT
    assert pool_size(PROTECTED._replace(protection=Protection.NONE)) == 0
    assert pool_size(PROTECTED._replace(devices=())) == 0


def test_small_guest_keeps_most_of_its_memory() -> None:
    assert pool_size(PROTECTED._replace(memory=32 * MIB)) == 4 * MIB


def test_size_that_was_asked_for_is_given_or_refused() -> None:
    assert pool_size(PROTECTED._replace(swiotlb=64 * MIB)) == 64 * MIB
    assert pool_size(PROTECTED._replace(swiotlb=0)) == 0
    assert pool_size(PROTECTED._replace(protection=Protection.NONE, swiotlb=4 * MIB)) == 4 * MIB
    with pytest.raises(UsageError, match="129 MiB in 256 MiB of memory: half of it") as caught:
        PROTECTED._replace(swiotlb=129 * MIB).check()
    assert caught.value.hint == "give the guest more memory: -m 258M"
    with pytest.raises(UsageError, match="whole MiB"):
        PROTECTED._replace(swiotlb=4096).check()


def test_a_size_for_a_guest_whose_device_tree_is_taken_as_it_is_is_refused() -> None:
    PROTECTED._replace(dtb="a.dtb").check()
    with pytest.raises(UsageError, match=r"pool of 4 MiB for a guest .* its own, a\.dtb") as caught:
        PROTECTED._replace(dtb="a.dtb", swiotlb=4 * MIB).check()
    assert caught.value.hint == "write the pool into its /reserved-memory"


def test_every_virtio_device_is_told_of_the_pool_and_no_other_device() -> None:
    devices = [
        DeviceNode("virtio_mmio", ("virtio,mmio",), 0xA00_0000, 0x200),
        DeviceNode("virtio_mmio", ("virtio,mmio",), 0xA00_0200, 0x200),
        DeviceNode("serial", ("arm,pl011", "arm,primecell"), 0x900_0000, 0x1000),
    ]
    tree = machine_tree(ram=[(layout.RAM_BASE, 256 * MIB)], mpidrs=[0], devices=devices)
    add_pool(tree, 16 * MIB)
    nodes = {node.name: node for node in tree.root.children}
    [pool] = nodes["reserved-memory"].children
    assert pool.properties["compatible"] == "restricted-dma-pool"
    assert pool.properties["size"] == cells64(16 * MIB)
    handle = pool.properties["phandle"]
    assert nodes["virtio_mmio@a000000"].properties["memory-region"] == handle
    assert nodes["virtio_mmio@a000200"].properties["memory-region"] == handle
    assert "memory-region" not in nodes["serial@9000000"].properties
