# SPDX-License-Identifier: Apache-2.0
"""What verbs share: options every one of them takes, statuses in words."""

from __future__ import annotations

import argparse
import contextlib
import os

from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final

STATUSES: Final = """\
exit status:
  0  done; of run: the guest powered off      4  the deadline passed
  1  pyvmm failed                             5  this host cannot do what was asked
  2  the command line makes no sense        130  interrupted (128 + the signal's number)
  3  the guest crashed, was reset or failed
"""


class Help(argparse.RawDescriptionHelpFormatter):
    """Lays help out as wide as the terminal is.

    argparse makes one for every option that it checks, and its own asks shutil for the width: an import of six million
    instructions on the way to every guest.
    """

    def __init__(self, prog: str) -> None:
        columns = 0  # what a terminal says too that does not know, such as a serial one
        with contextlib.suppress(ValueError):
            columns = int(os.environ.get("COLUMNS", 0))
        if columns <= 0:
            with contextlib.suppress(OSError):
                columns = os.get_terminal_size().columns
        super().__init__(prog, width=(columns if columns > 0 else 80) - 2)


def require_arm64(args: argparse.Namespace, why: str, *, kvm: bool = False) -> None:
    """Raise HostError, which says ``why``, where KVM runs no arm64 guests; with ``kvm`` also where it may not be used.

    Asked before a verb does anything that takes long.
    """
    if (machine := os.uname().machine) != "aarch64":
        import shlex

        raise HostError(
            f"this host is {machine}, and {why}",
            hint=f"run it in the lab, an emulated arm64 host: pyvmm --lab {shlex.join(args.verb_argv)}",
        )
    if kvm:
        from pyvmm.kvm.system import System

        System.open().close()


def ready(args: argparse.Namespace) -> None:
    """Raise UsageError where the options name no kernel or contradict each other, HostError where no guest can run."""
    from pyvmm._native_source import require_fresh_native
    from pyvmm.options.contradictions import check_run, kernel_of

    check_run(args)
    kernel_of(args)
    require_arm64(args, "pyvmm's guests are arm64: KVM runs guests of its own architecture")
    require_fresh_native()


class _Misplaced(argparse.Action):
    """Catches ``--lab`` behind the verb, where it would be one of the verb's own."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: argparse.Namespace,
        _values: str | Sequence[Any] | None,
        _option_string: str | None = None,
    ) -> None:
        verb = parser.prog.split()[-1]
        parser.error(f"--lab goes before the verb: pyvmm --lab {verb} ...")


def add_common(parser: argparse.ArgumentParser, *, verb: bool = True) -> None:
    """Add the options that may stand before or behind the verb: to a verb's parser, or to the one before it."""
    # A verb's parser must not undo what stood before the verb, so there an option not given leaves nothing.
    default: Any = argparse.SUPPRESS if verb else 0
    group = parser.add_argument_group("messages")
    group.add_argument("-v", "--verbose", action="count", default=default, help="log events; twice, with details")
    group.add_argument("-q", "--quiet", action="count", default=default, help="log errors only, not warnings")
    group.add_argument("--log-json", action="store_true", default=default, help="write events as JSON lines")
    if verb:
        group.add_argument("--lab", action=_Misplaced, nargs=0, default=default, help=argparse.SUPPRESS)
