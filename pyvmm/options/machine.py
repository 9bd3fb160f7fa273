# SPDX-License-Identifier: Apache-2.0
"""Make a machine's configuration from the options of a guest."""

from __future__ import annotations

from pyvmm.errors import OptionError, hex_
from pyvmm.guest.kernels import DEBIAN, MEMORY, is_kernel
from pyvmm.machine import layout
from pyvmm.machine.config import MachineConfig, usual_backing
from pyvmm.memory.choices import DEFAULT_MEMORY, ConversionPolicy
from pyvmm.options.consoles import NOWHERE, places
from pyvmm.options.contradictions import check_run, kernel_of
from pyvmm.options.devices import device_specs
from pyvmm.protection import Protection

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Final

    from pyvmm.options.consoles import Ends

CRASH: Final = "payload:crash"


def machine_config(args: argparse.Namespace, serial: Ends = NOWHERE, console: Ends = NOWHERE) -> MachineConfig:
    """Return the machine's configuration, with the descriptors of both consoles. Raises UsageError."""
    kernel = kernel_of(args)
    places(args)
    size, gpa = args.mem
    if gpa is not None and gpa != layout.RAM_BASE:
        raise OptionError(f"memory at gpa {hex_(gpa)}: this machine's memory starts at {hex_(layout.RAM_BASE)}", "mem")
    _require_root(kernel, args)
    protection = Protection(args.protection)
    return MachineConfig(
        kernel=kernel,
        protection=protection,
        memory=(MEMORY if is_kernel(kernel) else DEFAULT_MEMORY) if size is None else size,
        cpus=args.cpus,
        params=params(kernel, args.params),
        initrd=args.initrd,
        backing=args.backing or usual_backing(protection),
        prefault=args.prefault,
        pmu=args.pmu,
        conversion=ConversionPolicy(args.conversion),
        dtb=args.dtb,
        deadline=args.deadline,
        serial_out=serial[0],
        serial_in=serial[1],
        devices=device_specs(args, console),
        swiotlb=args.swiotlb,
    )


def check_options(args: argparse.Namespace) -> None:
    """Raise UsageError for options that are invalid on every host and for every kernel.

    The error is an OptionError if the options at fault are known.
    """
    check_run(args)
    machine_config(args).check()


def params(kernel: str, texts: list[str]) -> tuple[str, ...]:
    """Return the guest's parameters. A bare word for the crash payload selects how it crashes."""
    if kernel != CRASH:
        return tuple(texts)
    return tuple(f"way={text}" if text and "=" not in text and " " not in text else text for text in texts)


def _require_root(kernel: str, args: argparse.Namespace) -> None:
    """Raise OptionError for a named kernel without a root file system: it panics, and waits for the deadline."""
    if not is_kernel(kernel) or args.initrd is not None or args.dtb is not None or args.restore is not None:
        return
    # Debian's finds no disk without the modules of an initramfs.
    if kernel.startswith(DEBIAN):
        raise OptionError(
            f"{kernel} needs an initramfs: its drivers of disks are modules, so it has no root file system without",
            "initrd",
            hint="-i shell: is one with a shell and those modules",
        )
    if not any(word.startswith("root=") for text in args.params for word in text.split()):
        raise OptionError(
            f"{kernel} needs a root file system, and none is named",
            "initrd",
            hint="-i shell: is one with a shell; or -d DISK -p root=/dev/vda",
        )


def with_files(config: MachineConfig) -> MachineConfig:
    """Replace names of kernels and initramfs by their files. Reports keep the kernel's name.

    Raises HostError if a file is missing.
    """
    from pyvmm.guest.kernels import resolve

    def make(name: str) -> str:
        from pyvmm.lab.guests import made

        return made(name)

    kernel, initrd = resolve(config.kernel, config.initrd, make)
    return config._replace(kernel=kernel, initrd=initrd, name=config.title)
