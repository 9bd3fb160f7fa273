# SPDX-License-Identifier: Apache-2.0
"""Checks for contradicting options, without any knowledge of machines."""

from __future__ import annotations

from pyvmm.errors import OptionError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def check_run(args: argparse.Namespace) -> None:
    """Raise OptionError for options of the run (not of its machine) that contradict each other."""
    if getattr(args, "reboot", False):
        for option in ("restore", "gdb", "map", "trace"):
            if getattr(args, option) is not None:
                raise OptionError(
                    f"--reboot with --{option}: --{option} works on one VM, and a reset makes another", "reboot", option
                )
    for option in ("verify", "trust_snapshot"):
        if args.restore is None and getattr(args, option):
            name = option.replace("_", "-")
            raise OptionError(f"--{name} is about a snapshot, but --restore is missing", name, hint="--restore FILE")
    if args.restore is not None and args.dump_dtb is not None:
        raise OptionError("--dump-dtb with --restore: a snapshot does not contain the device tree", "dump-dtb")
    for option in ("faults", "el2"):
        if args.trace is None and getattr(args, f"trace_{option}"):
            raise OptionError(
                f"--trace-{option} adds to a trace, but --trace is missing",
                f"trace-{option}",
                hint="--trace FILE",
            )


def kernel_of(args: argparse.Namespace) -> str:
    """Return the kernel to run. Raises UsageError if none or two are given."""
    named = [kernel for kernel in (args.kernel, args.kernel_option) if kernel is not None]
    if len(named) != 1:
        what = "no KERNEL given" if not named else f"two kernels given, {named[0]} and {named[1]}"
        raise UsageError(what, hint="pyvmm run payload:hello runs a built-in one")
    return str(named[0])
