"""The pool through which a guest with private memory does its I/O: how large it is, and how the guest is told.

Linux knows it as a restricted DMA pool (Documentation/devicetree/bindings/reserved-memory/shared-dma-pool.yaml): memory
that the guest sets aside and shares page by page when its first device comes up, and through which it then copies all
that its devices read and write. Where it is, is the guest's choice. Every kernel that shares memory with a hypervisor
of this kind knows such pools: CONFIG_ARM_PKVM_GUEST needs them.

A command line's ``swiotlb=`` would do for a kernel since 7.3, but is not heard by older ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyvmm.errors import UsageError
from pyvmm.machine import layout
from pyvmm.machine.fdt import cells64, encode
from pyvmm.memory.address import PAGE_SIZE
from pyvmm.protection import Protection

if TYPE_CHECKING:
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.fdt import Tree

DEFAULT: Final = 16 * layout.MIB
"""Sharing it is 4096 calls, about 80 million instructions of a protected guest's boot under pkvm, as many as through
``swiotlb=``. Linux finds it full in a fifth of the times that it writes 64 MiB at once, says so, and waits for what is
under way: nothing fails."""
MOST_SHARE: Final = 8
"""A pool may take one part in so many of the guest's memory, unless told: a Linux of 32 MiB has 13 left to run in."""


def pool_size(config: MachineConfig) -> int:
    """Return the pool's bytes, 0 for none. Raises UsageError for a size that the guest's memory does not hold."""
    if config.swiotlb is None:
        if config.protection is Protection.NONE or not config.devices:
            return 0
        return min(DEFAULT, config.memory // MOST_SHARE // layout.MIB * layout.MIB)
    if config.swiotlb % layout.MIB or config.swiotlb < 0:
        raise UsageError(f"{config.swiotlb} bytes of DMA pool: whole MiB are needed, 0 for none")
    if config.swiotlb > config.memory // 2:
        raise UsageError(
            f"a DMA pool of {config.swiotlb // layout.MIB} MiB in {config.memory // layout.MIB} MiB of memory: half of "
            "it is the most",
            hint=f"give the guest more memory: -m {2 * config.swiotlb // layout.MIB}M",
        )
    return config.swiotlb


def add_pool(tree: Tree, size: int) -> None:
    """Give the guest a pool of ``size`` bytes, and have all its virtio devices use it."""
    reserved = tree.root.add("reserved-memory", {"#address-cells": 2, "#size-cells": 2, "ranges": True})
    pool = reserved.add("restricted-dma-pool", {"compatible": "restricted-dma-pool"})
    pool.properties |= {"size": cells64(size), "alignment": cells64(PAGE_SIZE)}
    for node in tree.root.children:
        if b"virtio,mmio\0" in encode(node.properties.get("compatible", b"")):
            node.properties["memory-region"] = tree.phandle(pool)
