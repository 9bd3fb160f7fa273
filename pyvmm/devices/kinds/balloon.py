# SPDX-License-Identifier: Apache-2.0
"""A balloon that takes memory of the guest for the host: ``--balloon``."""

from __future__ import annotations

from pyvmm.devices.kind import DeviceKind, DeviceSpec
from pyvmm.errors import OptionError
from pyvmm.protection import Protection
from pyvmm.syntax.option import Option
from pyvmm.syntax.values import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.kind import Context, Guest
    from pyvmm.devices.virtio.balloon import VirtioBalloon


class Balloon(DeviceSpec):
    """A balloon that takes ``size`` bytes of guest memory from the start, with free page reporting."""

    def __init__(self, size: int = 0) -> None:
        self.size = size

    def check(self, guest: Guest) -> None:
        """Raise UsageError if this guest cannot return memory, or has less than ``size``."""
        if guest.protection is Protection.PKVM:
            raise OptionError(
                "a balloon with protection pkvm: the host's kernel pins a protected guest's pages until its end, "
                "so none could be returned; and Linux's driver keeps its rings in private memory",
                "balloon",
                "protection",
                hint="give the guest less memory: the host only allocates pages that the guest uses",
            )
        if guest.protection is Protection.EMULATED:
            raise OptionError(
                "a balloon with protection emulated: Linux's driver keeps its rings in private memory (it turns "
                "ACCESS_PLATFORM off), which the host cannot access",
                "balloon",
                "protection",
                hint="use --protection none for a balloon",
            )
        if guest.backing == "hugetlb":
            raise OptionError(
                "a balloon with the hugetlb backing: the guest returns pages of 4 KiB, only parts of huge ones",
                "balloon",
                "backing",
                hint="use --backing thp for huge pages that can be split",
            )
        if not 0 <= self.size <= guest.memory:
            raise OptionError(
                f"a balloon of {self.size:#x} bytes: the guest has {guest.memory:#x}",
                "balloon",
                "mem",
                hint="SIZE is the memory that the guest gives up, not the rest",
            )

    def make(self, context: Context) -> VirtioBalloon:
        """Make it."""
        from pyvmm.devices.virtio.balloon import VirtioBalloon

        return VirtioBalloon(context.memory, context.ram, self.size)


KIND = DeviceKind(
    Option(
        "--balloon",
        group="devices",
        metavar="SIZE",
        type=parse_size,
        help="a balloon that takes SIZE of the guest's memory, and its reported free pages; pyvmm ctl balloon SIZE "
        "changes it (protection none only)",
    ),
    lambda size, _around: Balloon(size),
)
