# SPDX-License-Identifier: Apache-2.0
"""Options that make no sense together, as far as that is seen without knowing what a machine is."""

from __future__ import annotations

from pyvmm.errors import OptionError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def check_run(args: argparse.Namespace) -> None:
    """Raise OptionError for options about this side of a run that make no sense together."""
    if getattr(args, "reboot", False):
        for option in ("restore", "gdb", "map", "trace"):
            if getattr(args, option) is not None:
                raise OptionError(
                    f"--reboot with --{option}: that is about one VM, and a reset makes another", "reboot", option
                )
    if args.restore is not None and args.dump_dtb is not None:
        raise OptionError(
            "--dump-dtb with --restore: the device tree was made long ago, and is not in the snapshot", "dump-dtb"
        )
    for option in ("faults", "el2"):
        if args.trace is None and getattr(args, f"trace_{option}"):
            raise OptionError(
                f"--trace-{option} says what goes into a trace, but no file for it is named",
                f"trace-{option}",
                hint="--trace FILE",
            )


def kernel_of(args: argparse.Namespace) -> str:
    """Return the kernel to run. Raises UsageError where none is named, or two are."""
    named = [kernel for kernel in (args.kernel, args.kernel_option) if kernel is not None]
    if len(named) != 1:
        what = "no KERNEL given" if not named else f"two kernels given, {named[0]} and {named[1]}"
        raise UsageError(what, hint="pyvmm run payload:hello runs a built-in one")
    return str(named[0])
