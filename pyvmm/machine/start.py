# SPDX-License-Identifier: Apache-2.0
"""How a guest begins: with a loaded kernel, or from a snapshot. A machine uses only the :class:`Start` interface.

A start belongs to one machine, which calls :meth:`Start.prepare` before it opens anything, :meth:`Start.enter` when all
is built, and :meth:`Start.close` while guest memory is still mapped. A start does not know the machine's class. It sees
the members of :class:`Built`.
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
        """A start's view of a machine that is built and has not run.

        ``loadable`` is the number of loadable bytes from RAM's start. ``tree`` is the guest's own device tree, if it
        has one. ``pool`` is the size of its DMA pool in bytes.
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
        """The way a guest begins."""

        @property
        def kind(self) -> str:
            """What it begins with, in one word. Known once prepared."""
            ...

        @property
        def lazy(self) -> bool:
            """Whether guest memory is loaded page by page, on first access, after :meth:`enter`."""
            ...

        def prepare(self, config: MachineConfig) -> None:
            """Open and check the files that a machine of ``config`` begins with. Raises UsageError."""

        def enter(self, machine: Built) -> boot.Entry:
            """Load it into ``machine``: memory, registers, devices. Raises UsageError or HostError."""
            ...

        def close(self) -> None:
            """Release everything. Idempotent. No vCPU may run, and guest memory must still be mapped."""


SHORT: Final = 2048
"""Bytes of a command line that every kernel accepts."""


class KernelImage:
    """The start with a configuration's kernel, initrd and device tree. Holds the files open until they are loaded."""

    lazy = False

    def __init__(self) -> None:
        self._files = contextlib.ExitStack()

    @property
    def kind(self) -> str:
        """Image, ELF or flat."""
        return self._image.kind

    def prepare(self, config: MachineConfig) -> None:
        """Open and identify the kernel and the initrd. Also raises UsageError for a command line that is too long."""
        self._image = boot.read(config.kernel, config.initrd, room=config.memory)
        self._files.callback(self._image.close)
        self._check_line(" ".join(config.params).encode("utf-8", "surrogateescape"), "params")

    def _check_line(self, line: bytes, option: str) -> None:
        # Few command lines are long or have words for init. Only those pay for the check.
        if len(line) >= SHORT or b"--" in line:
            from pyvmm.machine.cmdline import check, is_linux

            if is_linux(self._image):
                check(line, option)

    def enter(self, machine: Built) -> boot.Entry:
        """Load it, and set the first vCPU's start state."""
        config = machine.config
        if self._image.page:
            from pyvmm.machine.granule import require_granule

            require_granule(self._image, machine.vcpus[0])
        if machine.tree is not None:
            from pyvmm.machine.cmdline import line_in

            self._check_line(line_in(machine.tree, f"device tree {config.dtb}"), "dtb")
        board = boot.Board(
            cpus=config.cpus,
            command_line=" ".join(config.params),
            devices=[(placed.device, placed.base, placed.line) for placed in machine.bus.placed],
            gic=None if machine.gic is None else machine.gic.node,
            pool=machine.pool,
            pmu=config.pmu,
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
