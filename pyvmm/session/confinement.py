# SPDX-License-Identifier: Apache-2.0
"""Confine the process of a run (``--confine``). Only the command line's ``run`` does: it owns the process.

The order is: everything is opened and imported; the walls that bind a thread are raised before there is a second one
(capabilities, Landlock); the filter of system calls, which binds all threads, comes last. :class:`Confinement` owns the
list of inherited descriptors, and with ``log`` the process that reports.
"""

from __future__ import annotations

import contextlib
import os

from pyvmm.confine import filter as calls
from pyvmm.confine import landlock, privileges
from pyvmm.confine.rules import rules_of
from pyvmm.devices.roles import Reach, Reaching
from pyvmm.errors import OptionError
from pyvmm.log import get_logger
from pyvmm.protection import Protection
from pyvmm.session.early import import_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable
    from typing import Final

    from pyvmm.confine.reporter import Reporter
    from pyvmm.machine.machine import Machine

log = get_logger("confine")

CONNECTIONS: Final = 1024
"""Descriptors that a run may open beside those of its machine: clients of its sockets, a vsock's connections."""

_STANDARD: Final = range(3)


class Confinement:
    """The walls of one run. With ``reporter`` nothing is refused: it reports what would be."""

    def __init__(self, reporter: Reporter | None = None) -> None:
        self._reporter = reporter
        self._inherited = _open_descriptors()
        self._parts: set[str] = set()
        self._children: list[int] = []

    @classmethod
    def asked_for(cls, args: argparse.Namespace) -> Confinement | None:
        """Return the confinement that the options ask for, or None. Raises OptionError if they contradict it.

        Call it before anything is opened and before there is a second thread.
        """
        if args.confine == "off":
            return None
        if args.confine == "log":
            from pyvmm.confine.reporter import Reporter

            return cls(Reporter())
        for option, why in _CANNOT.items():
            if getattr(args, option):
                raise OptionError(f"--confine on with --{option}: {why}", "confine", option, hint="--confine off")
        return cls()

    @property
    def refuses(self) -> bool:
        """Whether it refuses anything, not only reports it."""
        return self._reporter is None

    def wall_in(self, machine: Machine, own: Iterable[str]) -> None:
        """Raise the walls that bind this thread and those that it makes, around ``machine``, which is ready.

        Files may still be removed from the directories ``own``. Call it before there is a second thread.
        """
        import_all()
        from pyvmm.observe.rates import keep_status_open

        keep_status_open()
        reaches = [device.reach() for device in machine.role(Reaching)]
        self._parts = {part for reach in reaches for part in reach.parts}
        if machine.lazy:
            self._parts.add("restore")
        self._children = [pid for reach in reaches for pid in reach.children]
        privileges.gain_no_more()
        if not self.refuses:
            return
        self._close_inherited()
        privileges.limit(machine.descriptors + CONNECTIONS)
        self._restrict_files(reaches, own)
        privileges.drop_capabilities(lock_memory=machine.config.protection is Protection.PKVM)

    def _restrict_files(self, reaches: Iterable[Reach], own: Iterable[str]) -> None:
        removes = [*own, *(directory for reach in reaches for directory in reach.removes)]
        connects = [directory for reach in reaches for directory in reach.connects]
        try:
            abi = landlock.restrict(removes, connects, signals=bool(self._children))
        except OSError as error:
            log.warning("confined_without_landlock", reason=error.strerror, hint="boot with lsm=landlock")
            return
        log.info("confined", landlock=abi)
        if connects and abi < landlock.FIRST_WITH_UNIX:
            what = "the guest's vsock can connect to every Unix socket of this user"
            log.warning("confined_in_part", landlock=abi, needs=landlock.FIRST_WITH_UNIX, what=what)

    def _close_inherited(self) -> None:
        # Only now: the options may have named one (/dev/fd/63), and what they name has been opened anew.
        for fd in self._inherited:
            with contextlib.suppress(OSError):
                os.close(fd)

    def seal(self, *, gdb: bool) -> None:
        """Refuse, or report, every system call that the run does not need. The last step before the guest starts."""
        parts = self._parts | ({"gdb"} if gdb else set())
        values = {"passt": self._children}
        if self._reporter is None:
            calls.seal(parts, values)
        else:
            self._reporter.take(calls.listen(rules_of(parts), values))


_CANNOT: Final = {
    "reboot": "a guest that starts again has its files opened again, and a confined run opens none",
    "map": "what draws the guest's history reads files of the kernel until the end",
    "trace": "what records a run reads files of the kernel until the end",
}


def _open_descriptors() -> list[int]:
    """Return the descriptors that this process has, but for the standard ones."""
    fds = [int(name) for name in os.listdir("/proc/self/fd")]
    still = []
    for fd in fds:
        with contextlib.suppress(OSError):  # the listing's own
            os.fstat(fd)
            still.append(fd)
    return [fd for fd in still if fd not in _STANDARD]
