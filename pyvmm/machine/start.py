# SPDX-License-Identifier: Apache-2.0
"""How a guest begins: with a kernel that is loaded, or from a snapshot. A machine asks its :class:`Start` and no more.

A start belongs to one machine, which calls :meth:`Start.prepare` before it opens anything, :meth:`Start.enter` when all
is built, and :meth:`Start.close` while guest memory is still mapped. Nothing here knows the machine itself: a start
sees what :class:`Built` names.
"""

from __future__ import annotations

import contextlib
import os

from pyvmm.machine import boot
from pyvmm.uapi.kvm_arm64 import core_reg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Protocol

    from pyvmm.devices.bus import Bus
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.gic import Gic
    from pyvmm.memory.memory import Memory

    class Built(Protocol):
        """What a start sees of a machine, which is built and has not run.

        ``loadable`` is bytes from RAM's start that can be loaded into, ``tree`` the device tree that the guest brings,
        if it does, and ``pool`` bytes of its DMA pool.
        """

        config: MachineConfig
        tree: bytes | None
        pool: int
        memory: Memory
        loadable: int
        vcpus: list[Vcpu]
        gic: Gic | None
        bus: Bus

        def failed(self, error: BaseException) -> None:
            """End the run because of ``error``; from any thread."""
            ...

    class Start(Protocol):
        """Where a guest begins."""

        @property
        def kind(self) -> str:
            """What it begins with, in a word; known once it is prepared."""
            ...

        @property
        def lazy(self) -> bool:
            """Whether pages of guest memory come only when they are touched, after :meth:`enter`."""
            ...

        def prepare(self, config: MachineConfig) -> None:
            """Open and check what a machine of ``config`` begins with. Raises UsageError where it cannot."""

        def enter(self, machine: Built) -> boot.Entry:
            """Put it into ``machine``: memory, registers, devices. UsageError or HostError where that cannot be."""
            ...

        def close(self) -> None:
            """Give everything back; idempotent, at any time. No vCPU runs, and what was entered is still mapped."""


SHORT: Final = 2048
"""Bytes of a command line that no kernel cuts."""


class KernelImage:
    """The start with the kernel, initrd and device tree that a configuration names. Holds files open until they are
    loaded.
    """

    lazy = False

    def __init__(self) -> None:
        self._files = contextlib.ExitStack()

    @property
    def kind(self) -> str:
        """Image, ELF or flat."""
        return self._image.kind

    def prepare(self, config: MachineConfig) -> None:
        """Open the kernel and the initrd, and see what they are; UsageError too for a command line that is cut."""
        self._image = boot.read(config.kernel, config.initrd, room=config.memory)
        self._files.callback(self._image.close)
        self._check_line(" ".join(config.params).encode("utf-8", "surrogateescape"), "params")

    def _check_line(self, line: bytes, option: str) -> None:
        # Few lines are long or have words for init, and only theirs pay for the rules.
        if len(line) >= SHORT or b"--" in line:
            from pyvmm.machine.cmdline import check, is_linux

            if is_linux(self._image):
                check(line, option)

    def enter(self, machine: Built) -> boot.Entry:
        """Load it, and have the first vCPU start with it."""
        config = machine.config
        if machine.tree is not None:
            from pyvmm.machine.cmdline import line_in

            self._check_line(line_in(machine.tree, f"device tree {config.dtb}"), "dtb")
        board = boot.Board(
            cpus=config.cpus,
            command_line=" ".join(config.params),
            devices=[(placed.device, placed.base, placed.line) for placed in machine.bus.placed],
            gic=None if machine.gic is None else machine.gic.node,
            pool=machine.pool,
            entropy=os.urandom,
        )
        entry = boot.place(
            self._image, machine.memory, machine.tree or board, ram_size=config.memory, loadable=machine.loadable
        )
        self.close()
        for name, value in (("pc", entry.pc), ("x0", entry.fdt)):
            machine.vcpus[0].set_reg(core_reg(name), value)
        return entry

    def close(self) -> None:
        """Close the files."""
        self._files.close()
