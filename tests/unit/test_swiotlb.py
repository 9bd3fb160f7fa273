# SPDX-License-Identifier: Apache-2.0
"""The pool through which a guest with private memory does its I/O: its size, and its device tree node."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pyvmm.devices.kinds.disk import Disk
from pyvmm.devices.kinds.rng import Rng
from pyvmm.errors import UsageError
from pyvmm.machine import layout
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.describing import DeviceNode, machine_tree
from pyvmm.machine.fdt import Node, Tree, Value, cells32, cells64
from pyvmm.machine.plan import Plan
from pyvmm.machine.swiotlb import DEFAULT, add_pool
from pyvmm.memory.address import MIB
from pyvmm.protection import Protection

Properties = dict[str, Value]
PROTECTED = MachineConfig("payload:hello", Protection.PKVM, memory=256 * MIB, devices=(Rng(),))


def test_only_guests_with_private_memory_and_devices_have_a_pool() -> None:
    assert PROTECTED.pool_size() == PROTECTED._replace(protection=Protection.EMULATED).pool_size() == DEFAULT
    assert PROTECTED._replace(protection=Protection.NONE).pool_size() == 0
    assert PROTECTED._replace(devices=()).pool_size() == 0


def test_a_small_guest_keeps_most_of_its_memory() -> None:
    assert PROTECTED._replace(memory=32 * MIB).pool_size() == 4 * MIB


def test_a_requested_size_is_used_or_refused() -> None:
    assert PROTECTED._replace(swiotlb=64 * MIB).pool_size() == 64 * MIB
    assert PROTECTED._replace(swiotlb=0).pool_size() == 0
    assert PROTECTED._replace(protection=Protection.NONE, swiotlb=4 * MIB).pool_size() == 4 * MIB
    with pytest.raises(UsageError, match="129 MiB in 256 MiB of memory: the maximum is half of it") as caught:
        PROTECTED._replace(swiotlb=129 * MIB).check()
    assert caught.value.hint == "give the guest more memory: -m 258M"
    with pytest.raises(UsageError, match="whole MiB"):
        PROTECTED._replace(swiotlb=4096).check()


def test_a_size_is_refused_for_a_guest_with_a_given_device_tree() -> None:
    PROTECTED._replace(dtb="a.dtb").check()
    with pytest.raises(UsageError, match=r"pool of 4 MiB for a guest with its own device tree, a\.dtb") as caught:
        PROTECTED._replace(dtb="a.dtb", swiotlb=4 * MIB).check()
    assert caught.value.hint == "write the pool into its /reserved-memory"


def test_only_virtio_devices_refer_to_the_pool() -> None:
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


def own_tree(*pools: Properties, cells: Properties | None = None) -> bytes:
    """Return a foreign tree, with ``pools`` under a /reserved-memory that has these ``cells``."""
    usual: Properties = {"#address-cells": 2, "#size-cells": 2}
    nodes = [Node(f"pool{number}", {"compatible": "restricted-dma-pool"} | pool) for number, pool in enumerate(pools)]
    beside = Node("memory@80000000", {"compatible": "restricted-dma-pool", "size": cells64(64 * MIB)})
    reserved = Node("reserved-memory", usual if cells is None else cells, nodes)
    return Tree(Node("", children=[beside, reserved])).to_bytes()


WITH_TREE = PROTECTED._replace(dtb="a.dtb")
ONE_CELL: Properties = {"#address-cells": 2, "#size-cells": 1}


@pytest.mark.parametrize(
    ("tree", "pool"),
    [
        (own_tree({"size": cells64(MIB)}), 1),
        (own_tree({"reg": cells64(0x9000_0000, 2 * MIB), "size": cells64(MIB)}), 2),
        (own_tree({"size": cells32(3 * MIB)}, cells=ONE_CELL), 3),
        (own_tree({"reg": cells64(0x9000_0000) + cells32(3 * MIB)}, cells=ONE_CELL), 3),
        (own_tree({"reg": cells32(0x9000_0000, 3 * MIB)}, cells={"#address-cells": 1, "#size-cells": 1}), 3),
        (own_tree({"reg": cells64(0x9000_0000) + cells32(3 * MIB)}, cells={}), 3),
        (own_tree({"size": cells64(8 * MIB)}, {"size": cells64(4 * MIB)}), 4),
        (own_tree({"size": cells64(5 * MIB - 4096)}), 4),
        (own_tree({"size": cells64(MIB), "status": "okay"}), 1),
        (own_tree({"size": cells64(MIB), "status": "disabled"}), 0),
        (own_tree({"size": cells64(MIB), "compatible": "shared-dma-pool"}), 0),
        (own_tree(), 0),
        (Tree().to_bytes(), 0),
    ],
    ids=[
        "size",
        "reg",
        "one cell",
        "one cell in reg",
        "one cell each",
        "usual cells",
        "two",
        "odd",
        "okay",
        "disabled",
        "another kind",
        "none",
        "empty",
    ],
)
def test_the_pool_of_a_guest_with_a_given_tree_is_that_of_the_tree(tree: bytes, pool: int) -> None:
    assert WITH_TREE.pool_size(tree) == pool * MIB
    assert WITH_TREE._replace(protection=Protection.NONE).pool_size(tree) == pool * MIB
    assert WITH_TREE._replace(devices=()).pool_size(tree) == 0


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        (own_tree({}), "gives no size of its DMA pool 'pool0'"),
        (own_tree({"size": cells32(MIB)}), "gives no size of its DMA pool"),
        (own_tree({"reg": cells64(0x9000_0000)}), "gives no size of its DMA pool"),
        (own_tree({"size": cells64(MIB)}, cells={"#size-cells": 0}), "gives no size of its DMA pool"),
        (own_tree({"size": bytes(1 << 16)}, cells={"#size-cells": 1 << 31}), "gives no size of its DMA pool"),
        (own_tree({"size": cells64(MIB - 4096)}), "a DMA pool of 1044480 bytes: disk requests need at least 1 MiB"),
        (own_tree()[:-1], "truncated"),
    ],
    ids=["no size", "half a size", "half a reg", "no cells", "many cells", "small", "truncated"],
)
def test_a_tree_whose_pool_is_ambiguous_is_refused(tree: bytes, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        WITH_TREE.pool_size(tree)
    assert caught.value.message.startswith("device tree a.dtb ")


def test_a_disk_limits_requests_to_the_pool_of_the_given_device_tree(tmp_path: Path) -> None:
    disk, tree = tmp_path / "disk", tmp_path / "a.dtb"
    disk.write_bytes(bytes(MIB))
    usual = PROTECTED._replace(devices=(Disk(str(disk)),))

    def request(**more: object) -> int:
        """Return how many bytes a request may have; the tree is in a file."""
        with Plan(usual._replace(**more)) as plan:  # type: ignore[arg-type]
            tree.write_bytes(plan.machine.entry.device_tree)
            [transport] = plan.machine.virtio
            size, count = struct.unpack_from("<II", transport.device.config(), 8)
            return int(size * count)

    for pool in (1, 4, 0):
        assert request(swiotlb=pool * MIB) == request(dtb=str(tree))
    assert request(swiotlb=MIB) == MIB // 4
    assert request(dtb=str(tree)) == MIB // 4
