# SPDX-License-Identifier: Apache-2.0
"""The bounce buffer (DMA pool) of a guest with private memory: its size, and its device tree node.

Linux knows it as a restricted DMA pool (Documentation/devicetree/bindings/reserved-memory/shared-dma-pool.yaml): memory
that the guest reserves, and shares page by page when its first device starts. It then copies all device I/O through the
pool. The guest chooses its address. Every kernel that can share memory with pKVM supports such pools:
CONFIG_ARM_PKVM_GUEST needs them.

``swiotlb=`` on the command line works only with kernels since 7.3.
"""

from __future__ import annotations

from pyvmm.errors import OptionError, UsageError
from pyvmm.machine.fdt import cells64, encode, parse
from pyvmm.memory.address import MIB
from pyvmm.pages import HOST_PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from pyvmm.machine.fdt import Node, Tree

DEFAULT: Final = 16 * MIB
"""Default size in bytes. Sharing it takes 4096 calls, about 80 million instructions of a protected guest's boot, as
with ``swiotlb=``. When Linux writes 64 MiB at once, it finds the pool full one time in five. It then logs that and
waits for pending I/O. Nothing fails."""
MOST_SHARE: Final = 8
"""By default a pool takes at most memory / MOST_SHARE. That leaves a 32 MiB Linux 13 MiB to run in."""


def usual_pool(memory: int) -> int:
    """Return the default size of the pool, in bytes, of a guest with ``memory`` bytes."""
    return min(DEFAULT, memory // MOST_SHARE // MIB * MIB)


def check_pool(size: int, memory: int) -> None:
    """Raise UsageError for a pool of ``size`` bytes that is invalid, or too large for ``memory`` bytes."""
    if size % MIB or size < 0:
        raise OptionError(f"{size} bytes of DMA pool: use whole MiB, or 0 for none", "swiotlb")
    if size > memory // 2:
        raise OptionError(
            f"a DMA pool of {size // MIB} MiB in {memory // MIB} MiB of memory: the maximum is half of it",
            "swiotlb",
            "mem",
            hint=f"give the guest more memory: -m {2 * size // MIB}M",
        )


def pool_in(tree: bytes, what: str) -> int:
    """Return the size of the pool in a device tree, in bytes, whole MiB, 0 for none. ``what`` names the tree.

    Raises UsageError for a tree that cannot be read, and for a pool that is too small.
    """
    # Of several pools, use the smallest: a device may get any of them, and a request that fits it fits the others.
    sizes = [
        _size(pool, reserved, what)
        for reserved in parse(tree, what).children
        if reserved.name == "reserved-memory"
        for pool in reserved.children
        if "restricted-dma-pool" in _strings(pool, "compatible")
        if _strings(pool, "status")[0] in ("", "okay", "ok")
    ]
    if sizes and min(sizes) < MIB:
        raise UsageError(
            f"{what} has a DMA pool of {min(sizes)} bytes: disk requests need at least 1 MiB",
            hint="make it larger, or remove it from the tree's /reserved-memory",
        )
    return min(sizes, default=0) // MIB * MIB


def _size(pool: Node, reserved: Node, what: str) -> int:
    # Devicetree Specification v0.4, 3.5.1: reg, if present, overrides size. 2.3.5: default cells.
    address, size = (
        4 * int.from_bytes(encode(reserved.properties.get(name, usual)), "big")
        for name, usual in (("#address-cells", 2), ("#size-cells", 1))
    )
    said = encode(pool.properties.get("size", b""))
    if "reg" in pool.properties:
        said = encode(pool.properties["reg"])[address:]
    if not 0 < size <= 8 or len(said) < size:
        raise UsageError(f"{what} gives no size of its DMA pool {pool.name!r}: neither reg nor size")
    return int.from_bytes(said[:size], "big")


def _strings(node: Node, name: str) -> list[str]:
    return encode(node.properties.get(name, b"")).decode("latin-1").split("\0")


def add_pool(tree: Tree, size: int) -> None:
    """Give the guest a pool of ``size`` bytes, and have all its virtio devices use it."""
    reserved = tree.root.add("reserved-memory", {"#address-cells": 2, "#size-cells": 2, "ranges": True})
    pool = reserved.add("restricted-dma-pool", {"compatible": "restricted-dma-pool"})
    pool.properties |= {"size": cells64(size), "alignment": cells64(HOST_PAGE)}
    for node in tree.root.children:
        if b"virtio,mmio\0" in encode(node.properties.get("compatible", b"")):
            node.properties["memory-region"] = tree.phandle(pool)
