# SPDX-License-Identifier: Apache-2.0
"""``pyvmm repl``: a live guest at a Python prompt. ``guest`` takes orders, ``vm`` shows the state of its memory.

The prompt's code runs in this process. The guest runs in its own threads and ends with the prompt. If stdin is not a
terminal, it is read and run as one script; exit status 1 if it raises.
"""

from __future__ import annotations

import argparse
import code
import contextlib
import sys
import traceback
from typing import TYPE_CHECKING, Any

from pyvmm.cli.common import add_common, require_arm64
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.memory.choices import BACKINGS, CONVERSIONS, DEFAULT_MEMORY
from pyvmm.protection import PROTECTIONS, Protection
from pyvmm.syntax.values import parse_count, parse_memory
from pyvmm.terminal import clean

if TYPE_CHECKING:
    from pyvmm.experiment import Experiment

BANNER = """\
A {protection} guest of {mib} MiB and {cpus} vCPU{s} is running and takes orders.
  page = vm.page()           a page that nothing has accessed
  guest.write64(page, 42)    the guest stores to it         guest.read64(page)
  vm.host64(page)            the host loads from it, guarded: None if it may not
  guest.share(page)          shares it with the host        guest.unshare(page)
  vm.map()  vm.exits()  vm.memory.describe(page)            the page's state now
help(guest) and help(vm) tell the rest; vCPU n is vm.others()[n - 1]. Leave with Ctrl-D."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    parser = subparsers.add_parser(
        "repl",
        help="a live guest at a Python prompt",
        allow_abbrev=False,
        description="Start a guest that takes orders, and a Python prompt to give them from: guest.share(...), "
        "vm.map(), vm.exits(). A script on stdin is run whole.",
    )
    parser.add_argument("--protection", choices=PROTECTIONS, default="none", help="as in pyvmm run (none)")
    parser.add_argument("--backing", choices=BACKINGS, default="memfd", help="as in pyvmm run (memfd)")
    parser.add_argument("--conversion", choices=CONVERSIONS, help="as in pyvmm run (preserve)")
    parser.add_argument(
        "-m", "--mem", metavar="SIZE", type=parse_memory, default=(DEFAULT_MEMORY, None), help="memory (64M)"
    )
    parser.add_argument("-c", "--cpus", metavar="N", type=parse_count, default=1, help="vCPUs (1)")
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Run the prompt, or the script on stdin; returns the exit status."""
    require_arm64(args, "pyvmm's guests are arm64")
    from pyvmm._native_source import require_fresh_native

    require_fresh_native()
    from pyvmm.experiment import Experiment

    size, gpa = args.mem
    if gpa is not None or size % (1 << 20):
        raise UsageError("the prompt's guest has memory in whole MiB, from 0x80000000")
    vm = Experiment(
        Protection(args.protection),
        args.backing,
        memory=size >> 20,
        cpus=args.cpus,
        conversion=args.conversion,
        faults=None,
    )
    with vm:
        names = {"vm": vm, "guest": vm.guest, "__name__": "__main__", "__doc__": None}
        if not sys.stdin.isatty():
            return _script(names)
        _prompt(names, vm)
    return 0


def _script(names: dict[str, Any]) -> int:
    try:
        exec(compile(sys.stdin.read(), "<stdin>", "exec"), names)
    except PyvmmError:
        raise
    except Exception:  # the script's own
        traceback.print_exc()
        return 1
    return 0


def _prompt(names: dict[str, Any], vm: Experiment) -> None:
    with contextlib.suppress(ImportError):
        import readline
        import rlcompleter

        readline.set_completer(rlcompleter.Completer(names).complete)
        readline.parse_and_bind("tab: complete")
    sys.ps1 = f"{vm.protection.value}> "
    sys.ps2 = f"{'.' * len(vm.protection.value)}  "
    banner = BANNER.format(
        protection="protected" if vm.protection.by_hypervisor else f"{vm.protection.value!r}",
        mib=vm.config.memory >> 20,
        cpus=vm.config.cpus,
        s="" if vm.config.cpus == 1 else "s",
    )
    _Console(names).interact(banner=banner, exitmsg="")


class _Console(code.InteractiveConsole):
    """Python's prompt, but a PyvmmError is shown as its message, without a traceback."""

    def showtraceback(self) -> None:
        """Print the exception."""
        error = sys.exc_info()[1]
        if isinstance(error, PyvmmError):
            self.write(clean(f"{type(error).__name__}: {error}\n"))
        else:
            super().showtraceback()
