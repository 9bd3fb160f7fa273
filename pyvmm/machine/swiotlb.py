# SPDX-License-Identifier: Apache-2.0
"""The pool through which a guest with private memory does its I/O: how large it is, and how the guest is told.

Linux knows it as a restricted DMA pool (Documentation/devicetree/bindings/reserved-memory/shared-dma-pool.yaml): memory
that the guest sets aside and shares page by page when its first device comes up, and through which it then copies all
that its devices read and write. Where it is, is the guest's choice. Every kernel that shares memory with a hypervisor
of this kind knows such pools: CONFIG_ARM_PKVM_GUEST needs them.

A command line's ``swiotlb=`` would do for a kernel since 7.3, but is not heard by older ones.
"""

from __future__ import annotations

from pyvmm.errors import OptionError, UsageError
from pyvmm.machine.fdt import cells64, encode, parse
from pyvmm.memory.address import MIB, PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from pyvmm.machine.fdt import Node, Tree

DEFAULT: Final = 16 * MIB
"""Sharing it is 4096 calls, about 80 million instructions of a protected guest's boot under pkvm, as many as through
``swiotlb=``. Linux finds it full in a fifth of the times that it writes 64 MiB at once, says so, and waits for what is
under way: nothing fails."""
MOST_SHARE: Final = 8
"""A pool may take one part in so many of the guest's memory, unless told: a Linux of 32 MiB has 13 left to run in."""


def usual_pool(memory: int) -> int:
    """Return the bytes of a pool in so many of memory, unless somebody chooses."""
    return min(DEFAULT, memory // MOST_SHARE // MIB * MIB)


def check_pool(size: int, memory: int) -> None:
    """Raise UsageError for a pool's size that is none, or that does not fit into so many bytes of memory."""
    if size % MIB or size < 0:
        raise OptionError(f"{size} bytes of DMA pool: whole MiB are needed, 0 for none", "swiotlb")
    if size > memory // 2:
        raise OptionError(
            f"a DMA pool of {size // MIB} MiB in {memory // MIB} MiB of memory: half of it is the most",
            "swiotlb",
            "mem",
            hint=f"give the guest more memory: -m {2 * size // MIB}M",
        )


def pool_in(tree: bytes, what: str) -> int:
    """Return the bytes of the pool in a device tree, whole MiB, 0 for none; ``what`` names the tree in errors.

    Raises UsageError for a tree that cannot be read, and for a pool that is too small.
    """
    # Of several pools the smallest: a device may be sent to any, and what fits that one fits the others.
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
            f"{what} has a DMA pool of {min(sizes)} bytes: a disk's requests need 1 MiB",
            hint="make it larger, or leave it out of the tree's /reserved-memory",
        )
    return min(sizes, default=0) // MIB * MIB


def _size(pool: Node, reserved: Node, what: str) -> int:
    # Devicetree Specification v0.4, 3.5.1: reg, if it is there, says more than size. 2.3.5: cells, unless told.
    address, size = (
        4 * int.from_bytes(encode(reserved.properties.get(name, usual)), "big")
        for name, usual in (("#address-cells", 2), ("#size-cells", 1))
    )
    said = encode(pool.properties.get("size", b""))
    if "reg" in pool.properties:
        said = encode(pool.properties["reg"])[address:]
    if not 0 < size <= 8 or len(said) < size:
        raise UsageError(f"{what} does not say how large its DMA pool {pool.name!r} is, in reg or in size")
    return int.from_bytes(said[:size], "big")


def _strings(node: Node, name: str) -> list[str]:
    return encode(node.properties.get(name, b"")).decode("latin-1").split("\0")


def add_pool(tree: Tree, size: int) -> None:
    """Give the guest a pool of ``size`` bytes, and have all its virtio devices use it."""
    reserved = tree.root.add("reserved-memory", {"#address-cells": 2, "#size-cells": 2, "ranges": True})
    pool = reserved.add("restricted-dma-pool", {"compatible": "restricted-dma-pool"})
    pool.properties |= {"size": cells64(size), "alignment": cells64(PAGE_SIZE)}
    for node in tree.root.children:
        if b"virtio,mmio\0" in encode(node.properties.get("compatible", b"")):
            node.properties["memory-region"] = tree.phandle(pool)
